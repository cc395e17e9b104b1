"""Starting an engine process and knowing whether it lives.

The child is a fresh interpreter (as multiprocessing's spawn would start, without running the
user's ``__main__`` again, so scripts need no guard). It gets its configuration by a pipe and
reports by another, whose end also tells when it dies. Sockets lie in a private directory that is
removed as soon as both sides are connected, so nothing is left behind however they end.
"""

import builtins
import contextlib
import json
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import tempfile

import vllm.envs as envs
import vllm.errors
from vllm.config import VllmConfig
from vllm.errors import EngineDeadError, VLLMError, VLLMValidationError
from vllm.v1.engine import EngineFacts
from vllm.v1.engine.serial import EngineFailure, LaunchConfig, read_status

__all__ = ["EngineProcess"]

# struct sockaddr_un holds 108 bytes; "/out" and a terminator must fit too.
_MAX_SOCKET_DIR = 100


def _private_directory() -> str:
    path = tempfile.mkdtemp(prefix="vllm-")
    if len(path) > _MAX_SOCKET_DIR:
        os.rmdir(path)
        path = tempfile.mkdtemp(prefix="vllm-", dir="/tmp")
    return path


def _python_command() -> list[str]:
    """This interpreter, with its flags and its import path, running ``core_proc``.

    The path is handed over rather than made anew, lest the child find other modules than we did
    (in the current directory, say).
    """
    return [
        sys.executable,
        *subprocess._args_from_interpreter_flags(),  # type: ignore[attr-defined]
        "-P",
        "-c",
        "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
        "from vllm.v1.engine.core_proc import main; main()",
        json.dumps(sys.path),
    ]


def _exception_of(failure: EngineFailure) -> Exception:
    """The child's exception again, in its own class where that is one of ours or built in."""
    cls = getattr(vllm.errors, failure.type, None)
    if isinstance(cls, type) and issubclass(cls, VLLMValidationError):
        return cls(failure.message, parameter=failure.parameter)
    if isinstance(cls, type) and issubclass(cls, VLLMError):
        return cls(failure.message)
    cls = getattr(builtins, failure.type, None)
    if isinstance(cls, type) and issubclass(cls, ValueError | OSError | ImportError | MemoryError):
        with contextlib.suppress(TypeError):  # UnicodeDecodeError and the like want more
            return cls(failure.message)
    return VLLMError(f"the engine could not start: {failure.type}: {failure.message}")


class EngineProcess:
    """An engine process, from its start to its end.

    The constructor only starts it: it imports what it needs while the caller goes on to resolve
    the configuration that ``configure`` hands over.
    """

    def __init__(self) -> None:
        from vllm.platforms import current_platform

        current_platform.prepare_environment()
        self.socket_dir = _private_directory()
        config_read, self._config_fd = os.pipe()
        self.status_fd, status_write = os.pipe()
        """Readable once the process has ended (or failed); after ``wait_ready``."""
        arguments = [
            f"--parent={os.getpid()}",
            f"--config-fd={config_read}",
            f"--status-fd={status_write}",
            f"--socket-dir={self.socket_dir}",
        ]
        # Blocked until the child has its handlers: a Ctrl-C now must not kill it half-way.
        blocked = {signal.SIGINT, signal.SIGTERM}
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            self._process = subprocess.Popen(
                [*_python_command(), *arguments],
                pass_fds=(config_read, status_write),
                stdin=subprocess.DEVNULL,
            )
        except BaseException:
            self.forget_sockets()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
            os.close(config_read)
            os.close(status_write)
        self._closed = False

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def input_address(self) -> str:
        return f"ipc://{self.socket_dir}/in"

    @property
    def output_address(self) -> str:
        return f"ipc://{self.socket_dir}/out"

    def configure(self, vllm_config: VllmConfig, *, log_stats: bool) -> None:
        """Hand over the configuration; the process goes on to load the model."""
        config = LaunchConfig(
            vllm_config=vllm_config, log_stats=log_stats, output_addresses=[self.output_address]
        )
        pipe = os.fdopen(self._config_fd, "wb")
        self._config_fd = -1
        # A child that is gone already is reported by wait_ready.
        with contextlib.suppress(BrokenPipeError), pipe:
            pickle.dump(config, pipe)

    def wait_ready(self) -> EngineFacts:
        """Wait until the engine can take requests.

        Raises:
            VLLMValidationError, VLLMError, ValueError, OSError: why it could not start.
            EngineDeadError: it ended without a word.
        """
        timeout = envs.VLLM_ENGINE_READY_TIMEOUT_S
        if not self.has_status(timeout):
            self.kill()
            raise VLLMError(
                f"the engine was not ready after {timeout} s; raise VLLM_ENGINE_READY_TIMEOUT_S"
            )
        status = read_status(self.status_fd)
        if status is None:
            raise EngineDeadError(f"the engine process ended while starting ({self._how()})")
        if status.failure is not None:
            raise _exception_of(status.failure)
        assert status.facts is not None
        return status.facts

    def has_status(self, timeout: float | None) -> bool:
        """Whether the process reports something, its end included, within ``timeout`` seconds."""
        # Not select(), which refuses descriptors above 1,023.
        poller = select.poll()
        poller.register(self.status_fd, select.POLLIN)
        return bool(poller.poll(None if timeout is None else timeout * 1000))

    def forget_sockets(self) -> None:
        """Remove the directory of the sockets; what is connected stays connected."""
        shutil.rmtree(self.socket_dir, ignore_errors=True)

    def death_error(self) -> EngineDeadError:
        """Why the process is gone; call when ``status_fd`` has become readable."""
        status = read_status(self.status_fd)
        if status is not None and status.failure is not None:
            failure = status.failure
            return EngineDeadError(f"the engine process failed: {failure.type}: {failure.message}")
        return EngineDeadError(f"the engine process has died ({self._how()})")

    def _how(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "still ending"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}"

    def kill(self) -> None:
        """End the process at once and forget its sockets; may be called twice."""
        self.shutdown(timeout=0)

    def shutdown(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds for the process to end, then kill it."""
        if self._closed:
            return
        self._closed = True
        if timeout > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self.forget_sockets()
        os.close(self.status_fd)
        if self._config_fd != -1:
            os.close(self._config_fd)
            self._config_fd = -1
