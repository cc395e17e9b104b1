"""Host memory to files and back through NIXL's POSIX backend. Knows no blocks and no hashes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from vllm.distributed.kv_transfer.transport.nixl import load_api

__all__ = ["FileCopy", "NixlFiles"]

_MOST_OPEN = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCopy:
    """``size`` bytes of memory at ``address``, and the whole of a file."""

    path: Path
    address: int
    size: int


class NixlFiles:
    """An agent that copies between registered host memory and files.

    Args:
        memory: (address, bytes) of what is copied from and to.

    Raises:
        ConfigError: NIXL is not installed.
    """

    def __init__(self, name: str, memory: tuple[int, int]) -> None:
        api = load_api()
        errors = import_module(api.__name__.replace("._api", "._bindings"))
        self._errors: tuple[type[BaseException], ...] = (
            OSError,
            *(
                value
                for key, value in vars(errors).items()
                if key.startswith("nixl") and key.endswith("Error") and isinstance(value, type)
            ),
        )
        config = api.nixl_agent_config(enable_prog_thread=False, backends=["POSIX"])
        self._agent = api.nixl_agent(name, config)
        address, size = memory
        self._memory = self._agent.register_memory([(address, size, 0, "")], "DRAM")

    def write(self, copies: Sequence[FileCopy]) -> list[FileCopy]:
        """Make or replace files; returns those that could not be. None is ever there in part."""
        failed = []
        for copy, is_done in self._run("WRITE", copies):
            part = _unfinished(copy.path)
            try:
                if is_done:
                    part.replace(copy.path)
                    continue
            except OSError:
                is_done = False
            with contextlib.suppress(OSError):
                part.unlink()
            failed.append(copy)
        return failed

    def read(self, copies: Sequence[FileCopy]) -> list[FileCopy]:
        """Fill memory from files; returns those that are missing, too short, or unreadable."""
        return [copy for copy, is_done in self._run("READ", copies) if not is_done]

    def _run(self, what: str, copies: Sequence[FileCopy]) -> Iterator[tuple[FileCopy, bool]]:
        for start in range(0, len(copies), _MOST_OPEN):
            batch = copies[start : start + _MOST_OPEN]
            begun = [self._begin(what, copy) for copy in batch]
            for copy, transfer in zip(batch, begun, strict=True):
                yield copy, transfer is not None and self._end(*transfer)

    def _begin(self, what: str, copy: FileCopy) -> tuple[int, Any, Any] | None:
        """Start one copy: (file descriptor, registration, transfer), or None where it fails."""
        flags = os.O_RDONLY if what == "READ" else os.O_RDWR | os.O_CREAT | os.O_TRUNC
        path = copy.path if what == "READ" else _unfinished(copy.path)
        descriptor, registered = -1, None
        try:
            if what == "WRITE":
                path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, flags, 0o600)
            registered = self._agent.register_memory([(0, copy.size, descriptor, "")], "FILE")
            transfer = self._agent.initialize_xfer(
                what,
                self._agent.get_xfer_descs([(copy.address, copy.size, 0)], "DRAM"),
                self._agent.get_xfer_descs([(0, copy.size, descriptor)], "FILE"),
                self._agent.name,
            )
            self._agent.transfer(transfer)
        except self._errors:
            self._close(descriptor, registered)
            return None
        return descriptor, registered, transfer

    def _end(self, descriptor: int, registered: Any, transfer: Any) -> bool:
        """Wait for one copy; whether all of it was made."""
        try:
            while (state := self._agent.check_xfer_state(transfer)) == "PROC":
                os.sched_yield()
            return state == "DONE"
        except self._errors:
            return False
        finally:
            with contextlib.suppress(*self._errors):
                self._agent.release_xfer_handle(transfer)
            self._close(descriptor, registered)

    def _close(self, descriptor: int, registered: Any) -> None:
        if registered is not None:
            with contextlib.suppress(*self._errors):
                self._agent.deregister_memory(registered)
        if descriptor >= 0:
            os.close(descriptor)

    def close(self) -> None:
        with contextlib.suppress(*self._errors):
            self._agent.deregister_memory(self._memory)


def _unfinished(path: Path) -> Path:
    """Where a file is until all of it is there."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")
