"""Starting an engine process and knowing whether it lives.

The child gets its configuration by a pipe and reports by another, whose end also tells when it
dies. Sockets lie in a private directory that is removed as soon as both sides are connected, so
nothing is left behind however they end.
"""

import contextlib
import os
import pickle
import select
import shutil
import subprocess

import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.errors import EngineDeadError, VLLMError
from vllm.utils.processes import describe_end, private_directory, start_child
from vllm.v1.engine import EngineFacts
from vllm.v1.engine.failures import exception_of
from vllm.v1.engine.serial import LaunchConfig, read_status

__all__ = ["EngineAddresses", "EngineProcess"]

_ENTRY = "vllm.v1.engine.core_proc:main"


class EngineAddresses:
    """Where an engine and its front ends meet: sockets in a private directory, and its status."""

    status_fd: int
    """Readable once the engine reports something, its end included."""

    def __init__(self, socket_dir: str) -> None:
        self.socket_dir = socket_dir

    @property
    def input_address(self) -> str:
        """The engine's, for all front ends."""
        return f"ipc://{self.socket_dir}/in"

    def output_address(self, client_index: int) -> str:
        return f"ipc://{self.socket_dir}/out{client_index}"

    def has_status(self, timeout: float | None) -> bool:
        """Whether the process reports something, its end included, within ``timeout`` seconds."""
        # Not select(), which refuses descriptors above 1,023.
        poller = select.poll()
        poller.register(self.status_fd, select.POLLIN)
        return bool(poller.poll(None if timeout is None else timeout * 1000))


class EngineProcess(EngineAddresses):
    """An engine process, from its start to its end.

    The constructor only starts it: it imports what it needs while the caller goes on to resolve
    the configuration that ``configure`` hands over.
    """

    ends_with_client = True
    """It has one client, which ends it when it is closed."""

    def __init__(self) -> None:
        from vllm.platforms import current_platform

        current_platform.prepare_environment()
        super().__init__(private_directory())
        config_read, self._config_fd = os.pipe()
        self.status_fd, status_write = os.pipe()
        """Readable once the process has ended (or failed); after ``wait_ready``."""
        arguments = [
            f"--parent={os.getpid()}",
            f"--config-fd={config_read}",
            f"--status-fd={status_write}",
            f"--socket-dir={self.socket_dir}",
        ]
        try:
            self._process = start_child(_ENTRY, arguments, (config_read, status_write))
        except BaseException:
            self.forget_sockets()
            raise
        finally:
            os.close(config_read)
            os.close(status_write)
        self._closed = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def configure(self, vllm_config: VllmConfig, *, log_stats: bool, num_clients: int = 1) -> None:
        """Hand over the configuration; the process goes on to load the model."""
        config = LaunchConfig(
            vllm_config=vllm_config,
            log_stats=log_stats,
            output_addresses=[self.output_address(index) for index in range(num_clients)],
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
            failure = status.failure
            raise exception_of(failure, VLLMError(f"the engine could not start: {failure}"))
        assert status.facts is not None
        return status.facts

    def forget_sockets(self) -> None:
        """Remove the directory of the sockets; what is connected stays connected."""
        shutil.rmtree(self.socket_dir, ignore_errors=True)

    def death_error(self) -> EngineDeadError:
        """Why the process is gone; call when ``status_fd`` has become readable."""
        status = read_status(self.status_fd)
        if status is not None and status.failure is not None:
            return EngineDeadError(f"the engine process failed: {status.failure}")
        return EngineDeadError(f"the engine process has died ({self._how()})")

    def _how(self) -> str:
        return describe_end(self._process)

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
