"""``run_server``: from parsed arguments to a server that answers, and its end.

The address is taken first, so that a port in use is known at once; the HTTP stack is imported
while the engine's process loads. Imports nothing heavy itself, and never torch.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
import stat
import sys
import threading
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.cli_args import DEFAULT_HOST, FrontendArgs
from vllm.entrypoints.openai.plugins import load_middleware
from vllm.entrypoints.openai.tool_parsers.manager import ToolParserManager
from vllm.errors import VLLMError
from vllm.logger import init_logger
from vllm.reasoning.manager import ReasoningParserManager
from vllm.utils.system import raise_open_files_limit

if TYPE_CHECKING:
    from fastapi import FastAPI

    from vllm.v1.engine.async_llm import AsyncLLM

__all__ = ["StartupStop", "build_app", "check_options", "run_server"]

logger = init_logger(__name__)

_HTTP_STACK = "vllm.entrypoints.openai.server"
_JOIN_SECONDS = 0.2
# An idle server has 26 open.
_FEWEST_FILES = 64


def _bind_tcp(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as exc:
        # A UnicodeError: no name of a host can be like that.
        why = getattr(exc, "strerror", None) or exc
        raise VLLMError(f"--host {host}: {why}; try 127.0.0.1") from None
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        # A bound address alone does not keep others from binding it: listening does.
        sock.listen(2048)
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRINUSE:
            raise VLLMError(
                f"--port {port} is in use on {host}; choose another, or 0 for a free one"
            ) from None
        if exc.errno == errno.EACCES:
            raise VLLMError(f"--port {port} needs privileges; choose one above 1023") from None
        raise VLLMError(f"--host {host} --port {port}: {exc.strerror}") from None
    return sock


def _bind_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path):
            _remove_stale_socket(path)
        sock.bind(path)
        sock.listen(2048)
    except OSError as exc:
        sock.close()
        raise VLLMError(f"--uds {path}: {exc.strerror or exc}") from None
    except VLLMError:
        sock.close()
        raise
    return sock


def _remove_stale_socket(path: str) -> None:
    """Remove a socket that nobody listens on any more; leave everything else alone."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise VLLMError(f"--uds {path}: there is a file that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise VLLMError(f"--uds {path}: another server listens there")


def _address(frontend: FrontendArgs, sock: socket.socket) -> str:
    if frontend.uds:
        return f"unix socket {frontend.uds}"
    host, port = sock.getsockname()[:2]
    scheme = "https" if frontend.uses_tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def build_app(engine: AsyncLLM, frontend: FrontendArgs | None = None) -> FastAPI:
    """The application that serves ``engine``; for embedding it in another server.

    Raises:
        ConfigError: an option of ``frontend`` cannot be used.
    """
    from vllm.entrypoints.openai.app import make_app
    from vllm.entrypoints.openai.server import make_context

    return make_app(make_context(engine, frontend or FrontendArgs()))


def check_options(frontend: FrontendArgs) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        ConfigError: naming the option.
    """
    frontend.check()
    if frontend.chat_template is not None:
        from vllm.entrypoints.chat_utils import load_chat_template

        load_chat_template(frontend.chat_template)
    if frontend.tool_parser_plugin:
        ToolParserManager.import_tool_parser(frontend.tool_parser_plugin)
    if frontend.tool_call_parser:
        ToolParserManager.check(frontend.tool_call_parser)
    if frontend.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(frontend.reasoning_parser_plugin)
    if frontend.reasoning_parser:
        ReasoningParserManager.check(frontend.reasoning_parser)
    for path in frontend.middleware:
        load_middleware(path)


class StartupStop:
    """The SIGTERM handler of a server that is still starting: SystemExit, wherever it is.

    Python drops an exception that comes up in a weak reference's callback, of which importing has
    many, and the import lock may then stay taken; so each step of the start calls ``check``, and
    no thread that imports is waited for without end.
    """

    def __init__(self) -> None:
        self._stopped = False

    def __call__(self, signum: int, _frame: Any) -> None:
        self._stopped = True
        logger.info("%s while starting: nothing to drain", signal.Signals(signum).name)
        raise SystemExit(0)

    def check(self) -> None:
        """Raises SystemExit if a signal has come."""
        if self._stopped:
            raise SystemExit(0)

    def join(self, thread: threading.Thread) -> None:
        """Wait for ``thread``, or until a signal has come."""
        while thread.is_alive():
            self.check()
            thread.join(_JOIN_SECONDS)
        self.check()


def run_server(args: argparse.Namespace) -> int:
    """Serve until a signal or the engine's death ends it; returns the exit status.

    Raises:
        VLLMValidationError: an option cannot work.
        VLLMError: the address is taken, or the engine could not start.
    """
    begin = time.monotonic()
    frontend = FrontendArgs.from_namespace(args)
    check_options(frontend)
    files = raise_open_files_limit()
    if files < _FEWEST_FILES:
        raise VLLMError(
            f"this process may open {files} files, and a server needs at least {_FEWEST_FILES}, "
            "with one more for each connection: raise the limit with ulimit -n"
        )
    sock = (
        _bind_unix(frontend.uds)
        if frontend.uds
        else _bind_tcp(frontend.host or DEFAULT_HOST, frontend.port)
    )
    try:
        address = _address(frontend, sock)
        where = "" if frontend.host or frontend.uds else " (this machine only; --host opens it)"
        logger.info("Starting the server for %s%s", address, where)
        stop = StartupStop()
        previous = signal.signal(signal.SIGTERM, stop)
        count = getattr(args, "api_server_count", None) or 1
        if count > 1:
            from vllm.entrypoints.openai.api_server_group import run_group

            try:
                return run_group(
                    AsyncEngineArgs.from_cli_args(args), frontend, count, sock, address, begin
                )
            finally:
                signal.signal(signal.SIGTERM, previous)
        imports = threading.Thread(target=import_module, args=(_HTTP_STACK,), daemon=True)
        imports.start()
        from vllm.v1.engine.async_llm import AsyncLLM

        engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args))
        try:
            stop.join(imports)
            from vllm.entrypoints.openai.server import serve

            return serve(engine, frontend, sock, address, begin)
        finally:
            engine.shutdown()
            signal.signal(signal.SIGTERM, previous)
    finally:
        sock.close()
        if frontend.uds and os.path.exists(frontend.uds):
            os.unlink(frontend.uds)


if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.exit(main(["serve", *sys.argv[1:]]))
