"""The HTTP server round an engine that is ready: event loop, signals, draining, the engine's death.

Owns how the process ends. Knows nothing of what requests mean.
"""

import asyncio
import contextlib
import copy
import gc
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
import uvloop
from uvicorn.config import LOGGING_CONFIG

import vllm.envs as envs
from vllm.entrypoints.openai.app import make_app
from vllm.entrypoints.openai.cli_args import FrontendArgs
from vllm.entrypoints.openai.middleware import AccessLogFilter
from vllm.entrypoints.openai.serving_engine import ServerContext
from vllm.entrypoints.openai.serving_models import OpenAIServingModels
from vllm.logger import init_logger, read_logging_config
from vllm.v1.engine.async_llm import AsyncLLM

__all__ = ["make_context", "serve"]

logger = init_logger(__name__)

# How long a dead engine is reported, by 500s and a failing /health, before the process ends.
_DEATH_NOTICE_S = 3.0
_DEATH_POLL_S = 0.2
# How long answers that have ended may take to reach slow clients.
_FLUSH_S = 5
_BACKLOG = 2048


def make_context(engine: AsyncLLM, frontend: FrontendArgs) -> ServerContext:
    """What the endpoints share."""
    return ServerContext(
        engine=engine, frontend=frontend, models=OpenAIServingModels(engine.model_config)
    )


class _Server(uvicorn.Server):
    """uvicorn, whose signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop_listening(self) -> None:
        for server in self.servers:
            server.close()


class _Lifetime:
    """When and how the server ends.

    The first SIGTERM or SIGINT: no new requests, those in flight get ``--shutdown-timeout``
    seconds, then they are aborted (their answers end with finish_reason "abort"). The second:
    at once.
    """

    def __init__(
        self, server: _Server, context: ServerContext, control_fd: int | None = None
    ) -> None:
        self._server = server
        self._context = context
        self._control_fd = control_fd
        self._tasks: set[asyncio.Task[None]] = set()
        self.exit_status = 0

    def begin(self) -> None:
        loop = asyncio.get_running_loop()
        if self._control_fd is not None:
            loop.add_reader(self._control_fd, self._on_control, self._control_fd)
        else:
            for signum in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(signum, self._on_signal, signum)
        self._start(self._watch_engine())

    def _start(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_control(self, fd: int) -> None:
        """The parent passes signals on, a byte each."""
        numbers = os.read(fd, 16)
        if not numbers:
            asyncio.get_running_loop().remove_reader(fd)
        for signum in numbers:
            self._on_signal(signum)

    def _on_signal(self, signum: int) -> None:
        name = signal.Signals(signum).name
        if self._context.draining:
            logger.warning("%s again: ending at once", name)
            self.exit_status = 128 + signum
            self._server.force_exit = True
            self._server.should_exit = True
            return
        self._context.draining = True
        self._start(self._drain(name))

    async def _drain(self, name: str) -> None:
        context, engine = self._context, self._context.engine
        self._server.stop_listening()
        timeout = context.frontend.shutdown_timeout
        count = len(context.in_flight)
        if count and timeout:
            logger.info("%s: waiting up to %d s for %d requests", name, timeout, count)
            await engine.wait_for_requests_to_drain(timeout)
        if context.in_flight:
            logger.info("%s: aborting %d requests", name, len(context.in_flight))
            await engine.abort(list(context.in_flight))
        logger.info("%s: shutting down", name)
        self._server.should_exit = True

    async def _watch_engine(self) -> None:
        engine = self._context.engine
        while not engine.errored:
            await asyncio.sleep(_DEATH_POLL_S)
        logger.error("The engine is dead; the server ends in %.0f s", _DEATH_NOTICE_S)
        self.exit_status = 1
        await asyncio.sleep(_DEATH_NOTICE_S)
        self._server.should_exit = True


def _uvicorn_config(app: Any, frontend: FrontendArgs) -> uvicorn.Config:
    log_config: dict[str, Any] | None = None
    if not _logs_http_itself():
        # Lines of the access log go where all other lines go.
        log_config = copy.deepcopy(LOGGING_CONFIG)
        log_config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    optional: dict[str, Any] = {}
    if frontend.ssl_ciphers:
        optional["ssl_ciphers"] = frontend.ssl_ciphers
    if frontend.h11_max_incomplete_event_size is not None:
        optional["h11_max_incomplete_event_size"] = frontend.h11_max_incomplete_event_size
        optional["http"] = "h11"
    return uvicorn.Config(
        app,
        log_config=log_config,
        log_level=frontend.uvicorn_log_level,
        access_log=not frontend.disable_uvicorn_access_log,
        lifespan="off",
        ws="none",
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=_FLUSH_S,
        ssl_keyfile=frontend.ssl_keyfile,
        ssl_certfile=frontend.ssl_certfile,
        ssl_ca_certs=frontend.ssl_ca_certs,
        ssl_cert_reqs=ssl.VerifyMode(frontend.ssl_cert_reqs),
        **optional,
    )


def _logs_http_itself() -> bool:
    """Whether the user's logging file says how uvicorn logs."""
    path = envs.VLLM_LOGGING_CONFIG_PATH
    if not path or not envs.VLLM_CONFIGURE_LOGGING:
        return False
    config = read_logging_config(path)
    return "root" in config or any(
        name.split(".")[0] in ("", "uvicorn") for name in config.get("loggers", {})
    )


async def _serve(
    engine: AsyncLLM,
    frontend: FrontendArgs,
    sock: socket.socket,
    address: str,
    begin: float,
    control_fd: int | None,
) -> int:
    context = make_context(engine, frontend)
    config = _uvicorn_config(make_app(context), frontend)
    if frontend.disable_access_log_for_endpoints:
        paths = frontend.disable_access_log_for_endpoints.split(",")
        logging.getLogger("uvicorn.access").addFilter(AccessLogFilter(paths))
    # uvicorn's own lines at start and end say less than ours.
    logging.getLogger("uvicorn.error").addFilter(_is_worth_a_line)
    server = _Server(config)
    lifetime = _Lifetime(server, context, control_fd)
    lifetime.begin()
    # What start-up made stays; the collector need not look at it again.
    gc.collect()
    gc.freeze()
    logger.info("Application startup complete: ready in %.1f s", time.monotonic() - begin)
    logger.info("Serving %s on %s", ", ".join(context.models.names), address)
    await server.serve(sockets=[sock])
    return lifetime.exit_status


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Leave out uvicorn's own news, and the ends of requests when the server ends at once."""
    error = record.exc_info[1] if record.exc_info else None
    return record.levelno != logging.INFO and not isinstance(error, asyncio.CancelledError)


def serve(
    engine: AsyncLLM,
    frontend: FrontendArgs,
    sock: socket.socket,
    address: str,
    begin: float,
    *,
    control_fd: int | None = None,
) -> int:
    """Serve ``engine`` on ``sock`` until a signal or its death; returns the exit status.

    Args:
        address: ``sock``'s, for the log.
        begin: ``time.monotonic()`` when the command began.
        control_fd: where signals come from instead of the system, a byte each: the server is one
            of several, and their parent decides what a signal means.

    Raises:
        ConfigError: an option cannot be used.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(engine, frontend, sock, address, begin, control_fd))
