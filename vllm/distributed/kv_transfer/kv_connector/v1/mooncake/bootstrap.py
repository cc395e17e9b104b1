"""The bootstrap server of a prefill engine: where its workers register, and decoders find them.

Run by the first rank, on the configured address only. Knows addresses, and passes on to all workers
what nobody will fetch; knows nothing of blocks.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import threading
import time
from collections.abc import Callable

import httpx
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.messages import Discard, sealed
from vllm.errors import ConfigError, KVTransferError

__all__ = ["BootstrapServer", "make_bootstrap_app", "register"]

_RETRY_SECONDS = 0.1


class Registration(BaseModel):
    """One worker."""

    engine_id: str = Field(min_length=1, max_length=512)
    dp_rank: int = Field(ge=0, lt=1024)
    tp_rank: int = Field(ge=0, lt=1024)
    pp_rank: int = Field(ge=0, lt=1024)
    addr: str = Field(pattern=r"^tcp://\S{1,300}:\d{1,5}$")
    session: str = Field(max_length=512)
    """What only workers of this engine know."""


class DiscardRequest(BaseModel):
    transfer_ids: list[str] = Field(max_length=1024)


def make_bootstrap_app(
    engine_id: str, tp_size: int, session: str, tell: Callable[[str, bytes], object]
) -> FastAPI:
    """POST ``/register`` for workers, GET ``/query`` for decoders and routers, POST ``/discard``
    for a router whose decoder will not fetch.

    Args:
        tell: sends a message to the worker at an address.
    """
    app = FastAPI(title="Mooncake bootstrap server", openapi_url=None)
    entries: dict[int, dict[str, object]] = {}

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        # Without what was sent: bytes that are no text could not be sent back.
        problems = [{"loc": each["loc"], "msg": each["msg"]} for each in error.errors()]
        return JSONResponse({"detail": problems}, 422)

    @app.post("/register")
    async def register_worker(worker: Registration) -> dict[str, str]:
        if not hmac.compare_digest(worker.session.encode(), session.encode()):
            raise HTTPException(403, "only workers of this engine register here")
        if worker.engine_id != engine_id:
            raise HTTPException(400, f"this is engine {engine_id}, not {worker.engine_id}")
        if worker.tp_rank >= tp_size:
            raise HTTPException(400, f"there are {tp_size} ranks, no rank {worker.tp_rank}")
        entry = entries.setdefault(
            worker.dp_rank, {"engine_id": engine_id, "tp_size": tp_size, "worker_addr": {}}
        )
        addresses = entry["worker_addr"]
        assert isinstance(addresses, dict)
        stages = addresses.setdefault(worker.tp_rank, {})
        known = stages.setdefault(worker.pp_rank, worker.addr)
        if known != worker.addr:
            raise HTTPException(400, f"rank {worker.tp_rank} is at {known} already")
        return {"status": "ok"}

    @app.post("/discard")
    async def discard(given: DiscardRequest) -> dict[str, str]:
        message = sealed(Discard(transfer_ids=given.transfer_ids))
        for entry in entries.values():
            addresses = entry["worker_addr"]
            assert isinstance(addresses, dict)
            for stages in addresses.values():
                for address in stages.values():
                    tell(address, message)
        return {"status": "ok"}

    @app.get("/query")
    async def query() -> dict[int, dict[str, object]]:
        return entries

    return app


class BootstrapServer:
    """Serves in a thread until ``close``.

    Raises:
        ConfigError: the address cannot be bound.
    """

    def __init__(self, host: str, port: int, app: FastAPI) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            raise ConfigError(
                f"the bootstrap server cannot listen on {host}:{port}: {error}; each prefill "
                "engine of a host needs a VLLM_MOONCAKE_BOOTSTRAP_PORT of its own, on an address "
                "of this machine (VLLM_HOST_IP, or bootstrap_server_address)",
                parameter="VLLM_MOONCAKE_BOOTSTRAP_PORT",
                value=port,
            ) from None
        config = uvicorn.Config(app, log_level="warning", lifespan="off", access_log=False)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="mooncake-bootstrap", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=5)
        self._socket.close()


def register(url: str, worker: Registration, timeout: float) -> None:
    """Tell the bootstrap server of a worker, as soon as it listens.

    Raises:
        KVTransferError: it does not within ``timeout`` seconds, or refuses.
    """
    deadline = time.monotonic() + timeout
    with httpx.Client(timeout=5, trust_env=False) as client:
        while True:
            try:
                response = client.post(f"{url}/register", json=worker.model_dump())
            except httpx.HTTPError as error:
                if time.monotonic() > deadline:
                    raise KVTransferError(
                        f"the bootstrap server {url} cannot be reached: {error!r}"
                    ) from error
                time.sleep(_RETRY_SECONDS)
                continue
            if response.status_code != 200:
                raise KVTransferError(f"the bootstrap server {url} refused: {response.text[:500]}")
            return
