"""The proxy before prefill and decode servers, in NIXL's sequential protocol.

A request goes to a prefill server with ``max_tokens`` 1; what that server answers as
``kv_transfer_params`` goes with the original request to a decode server, whose answer is passed on
as it comes. Knows nothing of models, tokens or KV.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vllm.entrypoints.router.pool import Pool, Server
from vllm.errors import ConfigError

if TYPE_CHECKING:
    from vllm.entrypoints.cli.router import RouterArgs

__all__ = ["Router", "make_app", "serve"]

logger = logging.getLogger("vllm.entrypoints.router")

PATHS = ("/v1/completions", "/v1/chat/completions")
_ASK = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_LARGEST_BODY = 256 << 20
_PASSED_HEADERS = ("authorization", "x-request-id", "content-type")


class Router:
    """Pools, counters and the way of a request."""

    def __init__(self, args: RouterArgs) -> None:
        self.args = args
        self.prefill = Pool("prefill", args.prefill)
        self.decode = Pool("decode", args.decode)
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(args.timeout, connect=10),
            limits=httpx.Limits(max_connections=None),
        )
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vllm_router_requests", "Requests by outcome.", ["outcome"], registry=self.registry
        )
        self.retries = Counter(
            "vllm_router_retries", "Prefills tried again elsewhere.", registry=self.registry
        )
        self.prefill_seconds = Histogram(
            "vllm_router_prefill_seconds", "Time until a prefill was done.", registry=self.registry
        )
        healthy = Gauge(
            "vllm_router_healthy_servers", "Servers in use.", ["kind"], registry=self.registry
        )
        for pool in (self.prefill, self.decode):
            healthy.labels(pool.kind).set_function(
                lambda pool=pool: sum(s.healthy for s in pool.servers.values())  # type: ignore[misc]
            )

    async def watch(self) -> None:
        """Look at all servers from time to time, until cancelled."""
        while True:
            await asyncio.gather(self.prefill.look(self.client), self.decode.look(self.client))
            await asyncio.sleep(self.args.health_interval)

    async def answer(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Response:
        """Prefill somewhere, decode elsewhere; the decoder's answer."""
        params, refusal = await self._prefill(path, body, headers)
        if refusal is not None:
            self.requests.labels("prefill_failed").inc()
            return refusal
        wanted = {**body, "kv_transfer_params": params} if params else body
        return await self._decode(path, wanted, headers)

    async def _prefill(
        self, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> tuple[dict[str, Any] | None, Response | None]:
        """The parameters for the decoder; or why there are none, as an answer."""
        short = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": _ASK}
        if "max_completion_tokens" in short:
            short["max_completion_tokens"] = 1
        for name in ("stream_options", "min_tokens"):
            short.pop(name, None)
        tried: set[str] = set()
        for attempt in range(self.args.retries + 1):
            server = self.prefill.choose(tried)
            if server is None:
                break
            if attempt:
                self.retries.inc()
            tried.add(server.url)
            response = await self._post(server, path, short, headers)
            if response is None or response.status_code >= 500:
                continue
            if response.status_code != 200:
                return None, _copy(response)
            try:
                return response.json().get("kv_transfer_params"), None
            except (ValueError, AttributeError):
                continue
        message = "no prefill server could take the request"
        return None, _error(503, f"{message}: {len(tried)} tried")

    async def _post(
        self, server: Server, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> httpx.Response | None:
        server.in_flight += 1
        try:
            with self.prefill_seconds.time():
                return await self.client.post(server.url + path, json=body, headers=headers)
        except httpx.HTTPError as error:
            server.healthy = False
            logger.warning("Prefill server %s failed: %r", server.url, error)
            return None
        finally:
            server.in_flight -= 1

    async def _decode(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Response:
        tried: set[str] = set()
        while (server := self.decode.choose(tried)) is not None:
            tried.add(server.url)
            request = self.client.build_request(
                "POST", server.url + path, json=body, headers=headers
            )
            server.in_flight += 1
            try:
                response = await self.client.send(request, stream=True)
            except httpx.HTTPError as error:
                server.in_flight -= 1
                server.healthy = False
                logger.warning("Decode server %s failed: %r", server.url, error)
                continue
            self.requests.labels("ok" if response.status_code == 200 else "refused").inc()
            return StreamingResponse(
                self._pass_on(server, response),
                status_code=response.status_code,
                media_type=response.headers.get("content-type"),
            )
        self.requests.labels("decode_failed").inc()
        return _error(503, f"no decode server could take the request: {len(tried)} tried")

    async def _pass_on(self, server: Server, response: httpx.Response) -> AsyncIterator[bytes]:
        is_stream = "event-stream" in response.headers.get("content-type", "")
        try:
            async for chunk in response.aiter_raw():
                yield chunk
        except httpx.HTTPError as error:
            server.healthy = False
            logger.warning("Decode server %s failed within an answer: %r", server.url, error)
            self.requests.labels("broken_off").inc()
            if not is_stream:
                raise
            text = json.dumps({"error": {"message": "the decode server failed", "code": 502}})
            yield f"data: {text}\n\n".encode()
        finally:
            server.in_flight -= 1
            await response.aclose()


def _copy(response: httpx.Response) -> Response:
    return Response(
        response.content, response.status_code, media_type=response.headers.get("content-type")
    )


def _error(status: int, message: str) -> JSONResponse:
    body = {"error": {"message": message, "type": "router_error", "param": None, "code": status}}
    return JSONResponse(body, status)


def make_app(router: Router) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(router.watch())
        yield
        watching.cancel()
        await router.client.aclose()

    app = FastAPI(title="vllm router", lifespan=lifespan)

    async def forward(request: Request) -> Response:
        raw = await request.body()
        try:
            body = json.loads(raw)
        except ValueError:
            return _error(400, "the body is not JSON")
        if not isinstance(body, dict) or len(raw) > _LARGEST_BODY:
            return _error(400, "the body must be a JSON object")
        headers = {n: v for n, v in request.headers.items() if n in _PASSED_HEADERS}
        headers.setdefault("x-request-id", uuid.uuid4().hex)
        headers["content-type"] = "application/json"
        return await router.answer(request.url.path, body, headers)

    for path in PATHS:
        app.add_api_route(path, forward, methods=["POST"])

    @app.get("/health")
    @app.get("/healthcheck")
    async def health() -> JSONResponse:
        counts = {
            f"{pool.kind}_instances": sum(s.healthy for s in pool.servers.values())
            for pool in (router.prefill, router.decode)
        }
        ready = all(counts.values())
        return JSONResponse(
            {"status": "ok" if ready else "waiting", **counts}, 200 if ready else 503
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(router.registry), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        server = router.decode.choose(set())
        if server is None:
            return _error(503, "no decode server is healthy")
        headers = {n: v for n, v in request.headers.items() if n == "authorization"}
        try:
            return _copy(await router.client.get(f"{server.url}/v1/models", headers=headers))
        except httpx.HTTPError as error:
            return _error(502, f"the decode server failed: {error!r}")

    def refusal(request: Request, kind: str) -> JSONResponse | None:
        key = router.args.admin_key
        given = request.headers.get("authorization", "")
        if key is None or not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            return _error(401, "servers join and leave with the bearer token of --admin-key")
        if kind not in ("prefill", "decode"):
            return _error(404, f"there are prefill and decode servers, no {kind!r}")
        return None

    @app.post("/servers/{kind}")
    async def join(kind: str, request: Request) -> JSONResponse:
        refused = refusal(request, kind)
        if refused is not None:
            return refused
        pool: Pool = getattr(router, kind)
        try:
            server = pool.join(str((await request.json())["url"]))
        except (ConfigError, ValueError, KeyError, TypeError) as error:
            return _error(400, f"url: {error}")
        await pool.look(router.client)
        return JSONResponse({"url": server.url, "healthy": server.healthy})

    @app.delete("/servers/{kind}")
    async def leave(kind: str, url: str, request: Request) -> JSONResponse:
        refused = refusal(request, kind)
        if refused is not None:
            return refused
        pool: Pool = getattr(router, kind)
        if not pool.leave(url):
            return _error(404, f"{url} is not among the {kind} servers")
        return JSONResponse({"url": url})

    return app


def serve(args: RouterArgs) -> int:
    """Serve until a signal."""
    app = make_app(Router(args))
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0
