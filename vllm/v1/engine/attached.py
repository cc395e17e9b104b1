"""An engine process that another process started and watches, as one of its front ends sees it."""

from __future__ import annotations

import contextlib
import os

from vllm.errors import EngineDeadError
from vllm.v1.engine import EngineFacts
from vllm.v1.engine.failures import exception_of
from vllm.v1.engine.launch import EngineAddresses
from vllm.v1.engine.serial import read_status

__all__ = ["AttachedEngine"]


class AttachedEngine(EngineAddresses):
    """What ``EngineProcess`` is to its parent, but for the power to end it.

    Args:
        status_fd: where the parent passes on what the engine says: that it is ready, and why it
            has ended.
    """

    ends_with_client = False

    def __init__(self, socket_dir: str, status_fd: int, pid: int) -> None:
        super().__init__(socket_dir)
        self.status_fd = status_fd
        self.pid = pid

    def wait_ready(self) -> EngineFacts:
        """Wait until the engine can take requests; raises why it could not start."""
        status = read_status(self.status_fd)
        if status is None:
            raise EngineDeadError("the engine has ended while starting")
        if status.failure is not None:
            raise exception_of(status.failure, RuntimeError(str(status.failure)))
        assert status.facts is not None
        return status.facts

    def death_error(self) -> EngineDeadError:
        """Why the engine is gone; call when ``status_fd`` has become readable."""
        status = read_status(self.status_fd)
        if status is not None and status.failure is not None:
            return EngineDeadError(status.failure.message)
        return EngineDeadError("the engine has ended")

    def forget_sockets(self) -> None:
        """The parent's to do, when all front ends are connected."""

    def kill(self) -> None:
        self.shutdown(timeout=0)

    def shutdown(self, timeout: float) -> None:
        """Let go of the engine, which goes on; may be called twice."""
        fd, self.status_fd = self.status_fd, -1
        if fd != -1:
            with contextlib.suppress(OSError):
                os.close(fd)
