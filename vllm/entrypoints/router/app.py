"""The proxy before prefill and decode servers; by itself in NIXL's sequential protocol.

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
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import Receive, Scope, Send

from vllm.entrypoints.openai.http import until_disconnect
from vllm.entrypoints.router.pool import Pool, Server
from vllm.errors import ConfigError

if TYPE_CHECKING:
    from vllm.entrypoints.cli.router import RouterArgs

__all__ = [
    "FailedError",
    "RefusedError",
    "Router",
    "has_several_prompts",
    "make_app",
    "prefill_body",
    "serve",
]

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


class FailedError(Exception):
    """A server could not do its part before anything was said to the client.

    Args:
        what: the outcome that is counted if nothing else works.
        answer: what the client gets then.
    """

    def __init__(self, what: str, answer: Response) -> None:
        super().__init__(what)
        self.what = what
        self.answer = answer


class RefusedError(Exception):
    """A server says that the request itself is wrong; ``answer`` is its answer."""

    def __init__(self, answer: Response) -> None:
        super().__init__(answer.status_code)
        self.answer = answer


class _Relayed(StreamingResponse):
    """A stream that lets go of the server it comes from, however it ends."""

    def __init__(
        self, events: AsyncIterator[bytes], let_go: Callable[[], Awaitable[None]], media_type: str
    ) -> None:
        super().__init__(events, media_type=media_type)
        self._let_go = let_go

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._let_go()


class Router:
    """Pools, counters and the way of a request.

    A request that fails before its first token has reached the client is tried again from the
    start, prefill and all: the KV that the first decoder fetched is gone with it. After that a
    stream ends with an error event, as one of a single server does: what was drawn so far cannot
    be drawn again elsewhere.
    """

    def __init__(self, args: RouterArgs) -> None:
        self.args = args
        self.prefill = Pool("prefill", args.prefill)
        self.decode = Pool("decode", args.decode)
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(args.timeout, connect=10),
            # Servers close what is idle for 5 s: a request must not meet that.
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2),
        )
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vllm_router_requests", "Requests by outcome.", ["outcome"], registry=self.registry
        )
        self.retries = Counter(
            "vllm_router_retries", "Requests tried again elsewhere.", registry=self.registry
        )
        self.failures = Counter(
            "vllm_router_server_failures",
            "Requests that a server did not answer.",
            ["kind"],
            registry=self.registry,
        )
        self.prefill_seconds = Histogram(
            "vllm_router_prefill_seconds", "Time until a prefill was done.", registry=self.registry
        )
        self.first_byte_seconds = Histogram(
            "vllm_router_first_byte_seconds",
            "Time from a request to the first byte of its answer.",
            registry=self.registry,
        )
        healthy = Gauge(
            "vllm_router_healthy_servers", "Servers in use.", ["kind"], registry=self.registry
        )
        in_flight = Gauge(
            "vllm_router_requests_in_flight",
            "Requests at servers, by their kind.",
            ["kind"],
            registry=self.registry,
        )
        for pool in (self.prefill, self.decode):
            self.failures.labels(pool.kind)
            healthy.labels(pool.kind).set_function(
                lambda pool=pool: sum(s.healthy for s in pool.servers.values())  # type: ignore[misc]
            )
            in_flight.labels(pool.kind).set_function(
                lambda pool=pool: sum(s.in_flight for s in pool.servers.values())  # type: ignore[misc]
            )

    async def look(self, *pools: Pool) -> None:
        """See how the servers are, of all pools or of these."""
        args = self.args
        await asyncio.gather(
            *(
                pool.look(self.client, args.health_timeout, args.health_misses)
                for pool in pools or (self.prefill, self.decode)
            )
        )

    def join(self, pool: Pool, given: dict[str, Any]) -> Server:
        """A server joins with ``{"url": ...}``.

        Raises:
            ConfigError, KeyError, TypeError: that is not what was given.
        """
        return pool.join(str(given["url"]))

    async def watch(self) -> None:
        """Look at all servers from time to time, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self.args.health_interval)

    async def answer(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Response:
        """Prefill somewhere, decode elsewhere; the decoder's answer."""
        # What a decoder fetches, and from where, is not the client's to say.
        body.pop("kv_transfer_params", None)
        avoided: set[str] = set()
        failure: FailedError | None = None
        with self.first_byte_seconds.time():
            for attempt in range(self.args.retries + 1):
                if attempt:
                    self.retries.inc()
                try:
                    return await self._attempt(path, body, headers, avoided)
                except RefusedError as refusal:
                    self.requests.labels("refused").inc()
                    return refusal.answer
                except FailedError as error:
                    failure = error
        assert failure is not None
        self.requests.labels(failure.what).inc()
        return failure.answer

    async def _attempt(
        self, path: str, body: dict[str, Any], headers: dict[str, str], avoided: set[str]
    ) -> Response:
        """Prefill, then decode, once.

        Raises:
            FailedError: a server is missing, or failed; it is in ``avoided`` now.
            RefusedError: the request is wrong.
        """
        if has_several_prompts(body):
            return await self._decode(path, body, headers, avoided)
        params = await self._prefill(path, body, headers, avoided)
        wanted = {**body, "kv_transfer_params": params} if params else body
        return await self._decode(path, wanted, headers, avoided)

    async def _prefill(
        self, path: str, body: dict[str, Any], headers: dict[str, str], avoided: set[str]
    ) -> dict[str, Any] | None:
        """The parameters for the decoder, if there are any.

        Raises:
            FailedError: no server is there, or the chosen one failed.
            RefusedError: the request is wrong.
        """
        short = prefill_body(body, _ASK)
        with self.prefill_seconds.time():
            server, response = await self._ask(self.prefill, path, short, headers, avoided)
        try:
            answer = _copy(response)
            if response.status_code != 200:
                raise RefusedError(answer)
            return response.json().get("kv_transfer_params")
        except (ValueError, AttributeError):
            raise self._failed(self.prefill, server, avoided, 502, "answered no JSON") from None
        finally:
            server.in_flight -= 1

    async def _decode(
        self, path: str, body: dict[str, Any], headers: dict[str, str], avoided: set[str]
    ) -> Response:
        """The decoder's answer: whole, or a stream that has begun.

        Raises:
            FailedError: no server is there, or the chosen one failed.
            RefusedError: the request is wrong.
        """
        server, response = await self._ask(self.decode, path, body, headers, avoided)
        media_type = response.headers.get("content-type", "")
        if "event-stream" in media_type:
            self.requests.labels("ok").inc()

            async def let_go() -> None:
                server.in_flight -= 1
                await response.aclose()

            return _Relayed(self._pass_on(server, response), let_go, media_type)
        server.in_flight -= 1
        if response.status_code != 200:
            raise RefusedError(_copy(response))
        self.requests.labels("ok").inc()
        return _copy(response)

    async def _ask(
        self,
        pool: Pool,
        path: str,
        body: dict[str, Any],
        headers: dict[str, str],
        avoided: set[str],
    ) -> tuple[Server, httpx.Response]:
        """A server of ``pool`` and its answer: read whole, or the start of a stream of events.

        The request counts as in flight there until the caller says otherwise.

        Raises:
            FailedError: there is none, or it gave no answer, or one that is an error of its own.
        """
        server = self._choose(pool, avoided)
        return server, await self._ask_server(server, pool, path, body, headers, avoided)

    def _choose(self, pool: Pool, avoided: set[str]) -> Server:
        """
        Raises:
            FailedError: no server of this pool is healthy.
        """
        server = pool.choose(avoided)
        if server is None:
            message = f"no {pool.kind} server could take the request"
            raise FailedError(f"{pool.kind}_failed", _error(503, message))
        return server

    async def _ask_server(
        self,
        server: Server,
        pool: Pool,
        path: str,
        body: dict[str, Any],
        headers: dict[str, str],
        avoided: set[str],
    ) -> httpx.Response:
        """``_ask`` of one server of the pool."""
        server.in_flight += 1
        timeout = self.args.prefill_timeout if pool is self.prefill else None
        try:
            async with server.working(timeout):
                response = await self._send(server, path, body, headers)
        except (httpx.TimeoutException, TimeoutError):
            server.in_flight -= 1
            raise self._failed(pool, server, avoided, 504, "did not answer in time") from None
        except httpx.HTTPError as error:
            server.in_flight -= 1
            server.healthy = False
            raise self._failed(pool, server, avoided, 502, f"failed: {error!r}") from None
        except BaseException:
            server.in_flight -= 1
            raise
        if response.status_code < 500:
            return response
        server.in_flight -= 1
        avoided.add(server.url)
        self.failures.labels(pool.kind).inc()
        logger.warning("%s server %s answered %d", pool.kind, server.url, response.status_code)
        raise FailedError(f"{pool.kind}_failed", _copy(response))

    async def _send(
        self, server: Server, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> httpx.Response:
        request = self.client.build_request("POST", server.url + path, json=body, headers=headers)
        response = await self.client.send(request, stream=True)
        if "event-stream" not in response.headers.get("content-type", ""):
            await response.aread()
        return response

    def _failed(
        self, pool: Pool, server: Server, avoided: set[str], status: int, why: str
    ) -> FailedError:
        avoided.add(server.url)
        self.failures.labels(pool.kind).inc()
        logger.warning("%s server %s %s", pool.kind, server.url, why)
        kind = pool.kind
        return FailedError(f"{kind}_failed", _error(status, f"the {kind} server {why}"))

    async def _pass_on(self, server: Server, response: httpx.Response) -> AsyncIterator[bytes]:
        """Whole events only, so that an error can follow as one."""
        chunks = response.aiter_raw()
        rest = b""
        try:
            while True:
                async with server.working():
                    chunk = await anext(chunks, None)
                if chunk is None:
                    break
                events, end, rest = (rest + chunk).rpartition(b"\n\n")
                if end:
                    yield events + end
        except httpx.HTTPError as error:
            if not isinstance(error, httpx.TimeoutException):
                server.healthy = False
            logger.warning("decode server %s failed within an answer: %r", server.url, error)
            self.failures.labels(self.decode.kind).inc()
            self.requests.labels("broken_off").inc()
            yield b"data: " + _error(502, "the decode server failed within its answer").body
            yield b"\n\ndata: [DONE]\n\n"
        else:
            if rest:
                yield rest


def has_several_prompts(body: dict[str, Any]) -> bool:
    """Each would need a prefill and a lease of its own: a decoder computes them by itself."""
    prompt = body.get("prompt")
    return isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)


def prefill_body(body: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """What a prefill server is asked: one token of one answer, in one piece."""
    short = {**body, "max_tokens": 1, "n": 1, "stream": False, "kv_transfer_params": params}
    if "max_completion_tokens" in short:
        short["max_completion_tokens"] = 1
    for name in ("stream_options", "min_tokens", "best_of"):
        short.pop(name, None)
    return short


def _copy(response: httpx.Response) -> Response:
    headers = {n: response.headers[n] for n in ("retry-after",) if n in response.headers}
    media_type = response.headers.get("content-type")
    return Response(response.content, response.status_code, headers, media_type)


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
        return await until_disconnect(request, router.answer(request.url.path, body, headers))

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
        server = router.decode.choose()
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
            server = router.join(pool, await request.json())
        except (ConfigError, ValueError, KeyError, TypeError) as error:
            return _error(400, f"url: {error}")
        await router.look(pool)
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
    from vllm.entrypoints.router.mooncake import MooncakeRouter

    app = make_app(MooncakeRouter(args) if args.connector == "mooncake" else Router(args))
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")
    return 0
