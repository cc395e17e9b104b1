"""``--api-server-count N``: several API server processes on one port, in front of one engine.

This process starts the engine and the servers, passes signals and the engine's fate on to the
servers, and ends all of them together. It answers no requests itself. Imports no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import zmq

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.cli_args import FrontendArgs
from vllm.errors import EngineDeadError
from vllm.logger import init_logger
from vllm.utils.processes import (
    adopt_child_manners,
    describe_end,
    end_with_parent,
    start_child,
)
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.failures import failure_of, is_expected
from vllm.v1.engine.launch import EngineProcess
from vllm.v1.engine.serial import EngineStatus, write_status

__all__ = ["ServerLaunch", "main", "run_group"]

logger = init_logger(__name__)

_ENTRY = "vllm.entrypoints.openai.api_server_group:main"
_POLL_SECONDS = 0.1
# After the engine's death: servers report it for some seconds, then end by themselves.
_DEATH_SECONDS = 15.0
_ENGINE_STOP_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLaunch:
    """What an API server process is started with; pickled, through an inherited pipe."""

    vllm_config: VllmConfig
    frontend: FrontendArgs
    client_index: int
    log_requests: bool
    engine_pid: int
    socket_dir: str
    status_fd: int
    """What the engine says, passed on."""
    control_fd: int
    """Signals, a byte each."""
    listen_fd: int
    address: str
    begin: float


class _ServerProcess:
    """One API server, from its start to its end."""

    def __init__(self, index: int, env: dict[str, str], listen_fd: int) -> None:
        self.index = index
        config_read, self._config_fd = os.pipe()
        self._status_read, self._status_fd = os.pipe()
        self._control_read, self._control_fd = os.pipe()
        arguments = [f"--parent={os.getpid()}", f"--config-fd={config_read}", f"--index={index}"]
        fds = (config_read, self._status_read, self._control_read, listen_fd)
        try:
            self._process: subprocess.Popen[bytes] = start_child(_ENTRY, arguments, fds, env)
        finally:
            os.close(config_read)

    def configure(self, **fields: Any) -> None:
        """Hand over what it serves; it goes on to get ready."""
        launch = ServerLaunch(
            client_index=self.index,
            status_fd=self._status_read,
            control_fd=self._control_read,
            **fields,
        )
        # A server that is gone already is noticed by who waits for its end.
        with contextlib.suppress(BrokenPipeError), os.fdopen(self._config_fd, "wb") as pipe:
            self._config_fd = -1
            pickle.dump(launch, pipe)

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def describe(self) -> str:
        return f"API server {self.index} has ended ({describe_end(self._process)})"

    def tell(self, status: EngineStatus) -> None:
        write_status(self._status_fd, status)

    def signal(self, signum: int) -> None:
        os.write(self._control_fd, bytes([signum]))

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for fd in (
            self._config_fd,
            self._status_read,
            self._status_fd,
            self._control_read,
            self._control_fd,
        ):
            if fd != -1:
                os.close(fd)


class _Group:
    """An engine and its servers, watched from one loop."""

    def __init__(self, engine: EngineProcess, servers: list[_ServerProcess]) -> None:
        self._engine = engine
        self._servers = servers
        self._signals: list[int] = []
        self._passed_on = 0
        self._engine_is_ready = False
        self._engine_is_dead = False
        self._deadline = float("inf")
        self._exit_status = 0

    def run(self) -> int:
        """Until all servers have ended; returns the exit status.

        Raises:
            VLLMValidationError, VLLMError, ValueError, OSError: why the engine could not start.
        """
        while any(server.exit_code is None for server in self._servers):
            self._watch_engine()
            self._pass_signals_on()
            self._watch_servers()
            if time.monotonic() > self._deadline:
                break
        codes = [server.exit_code or 0 for server in self._servers]
        # A negative one is the signal that ended a server.
        return self._exit_status or (1 if min(codes) < 0 else max(codes))

    def take_signals(self) -> None:
        """From now on SIGTERM and SIGINT are the servers' to follow."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda number, _frame: self._signals.append(number))

    def _watch_engine(self) -> None:
        if self._engine_is_dead:
            time.sleep(_POLL_SECONDS)
            return
        if not select.select([self._engine.status_fd], [], [], _POLL_SECONDS)[0]:
            return
        if not self._engine_is_ready:
            facts = self._engine.wait_ready()
            self._engine_is_ready = True
            self.take_signals()
            self._tell(EngineStatus(facts=facts))
            return
        error = self._engine.death_error()
        self._engine_is_dead = True
        self._exit_status = 1
        self._deadline = time.monotonic() + _DEATH_SECONDS
        self._tell(EngineStatus(failure=failure_of(error)))

    def _tell(self, status: EngineStatus) -> None:
        for server in self._servers:
            server.tell(status)

    def _pass_signals_on(self) -> None:
        for signum in self._signals[self._passed_on :]:
            self._passed_on += 1
            for server in self._servers:
                server.signal(signum)

    def _watch_servers(self) -> None:
        """One server's unexpected end is the end of all."""
        if self._signals or self._engine_is_dead:
            return
        for server in self._servers:
            if server.exit_code is not None:
                logger.error("%s; the others end with it", server.describe())
                self._exit_status = self._exit_status or 1
                self._signals.append(signal.SIGTERM)
                if not self._engine_is_ready:
                    # The others wait for an engine that waits for all of them.
                    self._deadline = 0.0
                return


def _stop_engine(engine: EngineProcess) -> None:
    context = zmq.Context()
    control = context.socket(zmq.PUSH)
    control.setsockopt(zmq.LINGER, 1000)
    control.connect(engine.input_address)
    control.send_multipart([EngineCoreRequestType.SHUTDOWN.value])
    control.close()
    context.term()
    engine.shutdown(_ENGINE_STOP_SECONDS)


def run_group(
    engine_args: AsyncEngineArgs,
    frontend: FrontendArgs,
    count: int,
    sock: socket.socket,
    address: str,
    begin: float,
) -> int:
    """Serve on ``sock``, which is closed here, with ``count`` processes until a signal, the
    engine's death or that of a server ends them; returns the exit status.

    Raises:
        VLLMValidationError, VLLMError, ValueError, OSError: why the engine cannot start.
    """
    metrics_dir = tempfile.mkdtemp(prefix="vllm-metrics-")
    engine: EngineProcess | None = None
    servers: list[_ServerProcess] = []
    ready = False
    try:
        engine = EngineProcess()
        env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": metrics_dir}
        servers.extend(_ServerProcess(index, env, sock.fileno()) for index in range(count))
        vllm_config = engine_args.create_engine_config()
        engine.configure(vllm_config, log_stats=True, num_clients=count)
        for server in servers:
            server.configure(
                vllm_config=vllm_config,
                frontend=frontend,
                log_requests=engine_args.enable_log_requests,
                engine_pid=engine.pid,
                socket_dir=engine.socket_dir,
                listen_fd=sock.fileno(),
                address=address,
                begin=begin,
            )
        # Once the servers stop listening, nobody does.
        sock.close()
        group = _Group(engine, servers)
        status = group.run()
        ready = True
        return status
    finally:
        for server in servers:
            server.end()
        if engine is not None:
            if ready:
                _stop_engine(engine)
            engine.kill()
        shutil.rmtree(metrics_dir, ignore_errors=True)


def _serve(launch: ServerLaunch) -> int:
    from vllm.entrypoints.openai.api_server import check_options
    from vllm.entrypoints.openai.server import serve
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.attached import AttachedEngine
    from vllm.v1.engine.core_client import AsyncMPClient
    from vllm.v1.engine.startup import StartedEngine
    from vllm.v1.engine.tokenizer import tokenizer_from_config

    check_options(launch.frontend)
    engine_process = AttachedEngine(launch.socket_dir, launch.status_fd, launch.engine_pid)
    client = AsyncMPClient(engine_process, launch.client_index)
    tokenizer = tokenizer_from_config(launch.vllm_config.model_config)
    client.wait_ready()
    engine = AsyncLLM(
        StartedEngine(launch.vllm_config, client, tokenizer),
        log_requests=launch.log_requests,
        log_stats=False,
    )
    try:
        with socket.socket(fileno=launch.listen_fd) as sock:
            return serve(
                engine,
                launch.frontend,
                sock,
                launch.address,
                launch.begin,
                control_fd=launch.control_fd,
            )
    finally:
        engine.shutdown()


def main() -> None:
    """Run one API server until its parent or the engine ends it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--config-fd", type=int, required=True)
    parser.add_argument("--index", type=int, required=True)
    arguments = parser.parse_args()
    adopt_child_manners(f"VLLM::ApiServer{arguments.index}", (arguments.config_fd,))
    # The parent removes the metrics' directory, unless it is killed.
    end_with_parent(arguments.parent, os.environ["PROMETHEUS_MULTIPROC_DIR"])
    try:
        # What the parent still resolves is imported meanwhile.
        import vllm.entrypoints.openai.server  # noqa: F401

        with os.fdopen(arguments.config_fd, "rb") as pipe:
            launch: ServerLaunch = pickle.load(pipe)
        code = _serve(launch)
    except EOFError:
        code = 1  # the parent could not go on, and says why
    except EngineDeadError:
        code = 1
    except Exception as error:
        if not is_expected(error):
            raise
        logger.error("API server %d: %s", arguments.index, error)
        code = 1
    sys.exit(code)
