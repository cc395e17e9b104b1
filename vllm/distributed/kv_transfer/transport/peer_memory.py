"""A transport whose peers on the same host also open their GPU memory to each other's kernels.

Everything that a plain NIXL agent does, it does by NIXL. Beside that it hands out a handle of the
cache's allocation (CUDA's inter-process memory) and maps those of peers, so that a kernel here can
read a peer's blocks where they lie; and small numbers of a peer's host memory are read without its
help. Where that cannot be (another host, no peer access, memory that
has no such handle) nothing is mapped, and descriptors or staging remain.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
from collections.abc import Sequence
from pathlib import Path

import msgspec

from vllm.distributed.kv_transfer.transport.nixl import NixlPort
from vllm.distributed.kv_transfer.transport.peer_process import (
    PeerProcess,
    ProcessIdentity,
    own_identity,
)
from vllm.distributed.kv_transfer.transport.port import PortError
from vllm.logger import init_logger

__all__ = ["PeerMemoryPort"]

logger = init_logger(__name__)

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * _HANDLE_BYTES)]


class _Share(msgspec.Struct, array_like=True):
    """An allocation that peers of this host may map."""

    handle: bytes
    base: int
    """Address of the allocation in its own process."""
    size: int


class _Metadata(msgspec.Struct, array_like=True):
    nixl: bytes
    host: str
    shares: list[_Share]
    kind: str
    """Of the cache's memory, as NIXL calls it."""
    device: int
    process: ProcessIdentity


def host_identity() -> str:
    """The same for all processes that run on one kernel, and for no others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    own = boot.read_text().strip() if boot.exists() else ""
    return f"{socket.gethostname()} {own}"


class _Driver:
    """What is needed of CUDA's driver library.

    Raises:
        OSError: there is none.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.cuIpcOpenMemHandle_v2.argtypes = [
            ctypes.POINTER(ctypes.c_uint64),
            _Handle,
            ctypes.c_uint,
        ]

    def share(self, address: int) -> _Share | None:
        """The allocation around an address; None if it has no handle (virtual memory, say)."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        found = self._library.cuMemGetAddressRange_v2(
            ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)
        )
        handle = _Handle()
        if found or self._library.cuIpcGetMemHandle(ctypes.byref(handle), base):
            return None
        raw = ctypes.string_at(ctypes.addressof(handle), _HANDLE_BYTES)
        return _Share(raw, base.value, size.value)

    def open(self, share: _Share) -> int:
        """
        Raises:
            PortError: it cannot be mapped on the current device.
        """
        handle, place = _Handle(), ctypes.c_uint64()
        ctypes.memmove(ctypes.addressof(handle), share.handle, _HANDLE_BYTES)
        error = self._library.cuIpcOpenMemHandle_v2(ctypes.byref(place), handle, _LAZY_PEER_ACCESS)
        if error:
            raise PortError(f"cuIpcOpenMemHandle: error {error}")
        return place.value

    def close(self, place: int) -> None:
        self._library.cuIpcCloseMemHandle(ctypes.c_uint64(place))


class PeerMemoryPort(NixlPort):
    """A NIXL agent that also maps the memory of peers on this host."""

    def __init__(self, name: str, backends: Sequence[str] = ("UCX",), num_threads: int = 0) -> None:
        super().__init__(name, backends, num_threads)
        self._driver: _Driver | None = None
        self._shares: list[_Share] = []
        self._opened: dict[str, list[tuple[_Share, int]]] = {}
        """Of each peer: its allocations, and where they lie here."""
        self._processes: dict[str, PeerProcess] = {}

    def register(self, regions: Sequence[tuple[int, int]], device: str) -> None:
        super().register(regions, device)
        if not device.startswith("cuda"):
            return
        if self._driver is None:
            with contextlib.suppress(OSError):
                self._driver = _Driver()
        if self._driver is None:
            return
        for address, _ in regions:
            known = any(own.base <= address < own.base + own.size for own in self._shares)
            share = None if known else self._driver.share(address)
            if share is not None:
                self._shares.append(share)

    def metadata(self) -> bytes:
        whole = _Metadata(
            super().metadata(),
            host_identity(),
            self._shares,
            self._kind,
            self._device,
            own_identity(),
        )
        return msgspec.msgpack.encode(whole)

    def connect(self, metadata: bytes) -> str:
        try:
            whole = msgspec.msgpack.decode(metadata, type=_Metadata)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise PortError(f"not the metadata of an agent: {error}") from error
        peer = super().connect(whole.nixl)
        self._places[peer] = whole.kind, whole.device
        if whole.host == host_identity():
            with contextlib.suppress(PortError):
                self._processes[peer] = PeerProcess(whole.process)
            if self._driver is not None:
                self._map(peer, whole.shares)
        return peer

    def _map(self, peer: str, shares: Sequence[_Share]) -> None:
        assert self._driver is not None
        opened = self._opened.setdefault(peer, [])
        for share in shares:
            if len(share.handle) != _HANDLE_BYTES or any(share == known for known, _ in opened):
                continue
            try:
                opened.append((share, self._driver.open(share)))
            except PortError as error:
                logger.info("Memory of %s is not mapped: %s", peer, error)

    def mapped(self, peer: str, address: int) -> int | None:
        for share, place in self._opened.get(peer, ()):
            if share.base <= address < share.base + share.size:
                return place + address - share.base
        return None

    def process(self, peer: str) -> PeerProcess | None:
        return self._processes.get(peer)

    def disconnect(self, peer: str) -> None:
        super().disconnect(peer)
        self._processes.pop(peer, None)
        for _, place in self._opened.pop(peer, ()):
            assert self._driver is not None
            self._driver.close(place)
