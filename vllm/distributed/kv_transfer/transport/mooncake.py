"""The Mooncake transport: peer-to-peer, no metadata service, every run submitted by itself.

Mooncake's batch calls block, and give up on a peer that does not move (``MC_TRANSFER_TIMEOUT``)
while bytes of the batch are still on their way. So each run is submitted alone, at most
``max_in_flight`` at a time, and asked for until Mooncake has ended it: with TCP the peer
acknowledges every write, so a run that is done has been stored. Importing costs are paid when a
port is made. Knows nothing of who copies what.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import msgspec
import numpy as np

from vllm.distributed.kv_transfer.transport.port import CopyPort, PeerLostError, PortError
from vllm.errors import ConfigError

__all__ = ["MooncakePort", "joined_runs", "load_engine"]

_LIMITS = {
    "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "16384",
    "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "16384",
}
"""More than Mooncake's own, which fail whatever comes beyond about 2,048 runs for one peer."""
_LONGEST_RUN = 64 << 20
"""A longer one is cut, so that several connections share it."""
_CONNECT_SECONDS = 1.0
_PENDING, _DONE = 0, 1


def load_engine() -> type[Any]:
    """Mooncake's ``TransferEngine``.

    Raises:
        ConfigError: the package, or a system library that it needs, is missing.
    """
    try:
        engine: type[Any] = import_module("mooncake.engine").TransferEngine
    except ModuleNotFoundError:
        raise ConfigError(
            "MooncakeConnector needs the package mooncake: pip install mooncake-transfer-engine, "
            "or mooncake-transfer-engine-non-cuda where there is no CUDA",
            parameter="kv_connector",
        ) from None
    except ImportError as error:
        raise ConfigError(
            f"MooncakeConnector: mooncake cannot be loaded: {error}; on Debian it needs apt-get "
            "install libibverbs1 libnuma1 libcurl4",
            parameter="kv_connector",
        ) from None
    return engine


class _Agent(msgspec.Struct):
    peer: str
    """``host:port`` of its engine."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    peer: str | None
    rows: np.ndarray
    ends: np.ndarray

    def resolve(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Addresses and lengths of descriptors, int64."""
        if not len(indices) or not len(self.ends):
            raise PortError("no descriptors")
        if indices.min() < 0 or indices.max() >= self.ends[-1]:
            raise PortError(f"descriptor numbers must be 0 to {self.ends[-1] - 1}")
        row = np.searchsorted(self.ends, indices, side="right")
        inside = indices - (self.ends[row] - self.rows[row, 3])
        return self.rows[row, 0] + inside * self.rows[row, 2], self.rows[row, 1]


@dataclass(slots=True)
class _Copy:
    """Runs of one peer: what is left, in reverse order, and what is under way."""

    peer: str
    left: list[tuple[int, int, int]]
    under_way: list[int] = field(default_factory=list)
    failed: bool = False


def joined_runs(
    own: np.ndarray, theirs: np.ndarray, lengths: np.ndarray, longest: int = _LONGEST_RUN
) -> list[tuple[int, int, int]]:
    """(own address, theirs, bytes), neighbours on both sides joined, none above ``longest``."""
    gap = np.ones(len(own), dtype=bool)
    gap[1:] = (np.diff(own) != lengths[:-1]) | (np.diff(theirs) != lengths[:-1])
    first = np.flatnonzero(gap)
    sizes = np.add.reduceat(lengths, first)
    joined = zip(own[first].tolist(), theirs[first].tolist(), sizes.tolist(), strict=True)
    return [
        (here + start, there + start, min(longest, size - start))
        for here, there, size in joined
        for start in range(0, size, longest)
    ]


class MooncakePort(CopyPort):
    """An engine of its own. Peers reach what it has registered; writing only.

    Args:
        host: this host as peers know it.
        protocol: ``tcp``, ``rdma`` or another that Mooncake was built with.
        device_name: comma-separated devices of the protocol; all where empty.
        max_in_flight: runs submitted and not ended, of all copies together.

    Raises:
        ConfigError: Mooncake is not installed, or has no such protocol here.
    """

    def __init__(
        self, host: str, protocol: str, device_name: str = "", max_in_flight: int = 64
    ) -> None:
        engine = load_engine()
        for name, value in _LIMITS.items():
            os.environ.setdefault(name, value)
        self._engine = engine()
        code = self._engine.initialize(host, "P2PHANDSHAKE", protocol, device_name)
        # Without a device for it Mooncake takes TCP and says nothing.
        if code != 0 or (protocol == "rdma" and not self._has_devices(device_name)):
            raise ConfigError(
                f"Mooncake cannot use mooncake_protocol {protocol!r} on {host}: "
                + (f"error {code}" if code else f"no RDMA device {device_name}".rstrip())
                + '; kv_connector_extra_config {"mooncake_protocol": "tcp"} works everywhere',
                parameter="kv_connector_extra_config",
                value=protocol,
            )
        name = f"[{host}]" if ":" in host else host
        self.name = f"{name}:{self._engine.get_rpc_port()}"
        self._max_in_flight = max_in_flight
        self._in_flight = 0
        self._regions: list[tuple[int, int]] = []

    def _has_devices(self, names: str) -> bool:
        topology = msgspec.json.decode(
            self._engine.get_local_topology(names), type=dict[str, list[list[str]]]
        )
        return any(devices for lists in topology.values() for devices in lists)

    def register(self, regions: Sequence[tuple[int, int]], device: str) -> None:
        for address, size in regions:
            if self._engine.register_memory(address, size) != 0:
                raise PortError(f"{size} bytes at {address} ({device}) cannot be registered")
            self._regions.append((address, size))

    def metadata(self) -> bytes:
        return msgspec.msgpack.encode(_Agent(self.name))

    def connect(self, metadata: bytes) -> str:
        try:
            peer = msgspec.msgpack.decode(metadata, type=_Agent).peer
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise PortError(f"not the metadata of a Mooncake engine: {error}") from error
        host, _, port = peer.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise PortError(f"{peer!r} is no host:port of a Mooncake engine")
        # Mooncake would wait for minutes where nobody is.
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        except OSError as error:
            raise PeerLostError(f"no Mooncake engine at {peer}: {error}") from error
        return peer

    def disconnect(self, peer: str) -> None:
        """Nothing is held for a peer."""

    def prepare(self, peer: str | None, rows: np.ndarray, *, on_host: bool = False) -> _Prepared:
        if peer is None:
            # Mooncake does not check what it reads from.
            for address, length, stride, count in rows.tolist():
                end = address + stride * (count - 1) + length
                if not any(at <= address and end <= at + size for at, size in self._regions):
                    raise PortError(f"[{address}, {end}) is not registered")
        return _Prepared(peer, rows.copy(), np.cumsum(rows[:, 3]))

    def forget(self, prepared: _Prepared) -> None:
        """Lists are plain arrays."""

    def read(
        self, local: _Prepared, into: np.ndarray, remote: _Prepared, out_of: np.ndarray
    ) -> _Copy:
        raise PortError("this port only writes: Mooncake has no read that can be waited for")

    def write(
        self, local: _Prepared, out_of: np.ndarray, remote: _Prepared, into: np.ndarray
    ) -> _Copy:
        assert remote.peer is not None
        assert local.peer is None
        own, lengths = local.resolve(out_of)
        theirs, same = remote.resolve(into)
        if len(own) != len(theirs) or not np.array_equal(lengths, same):
            raise PortError("descriptors of both sides differ in number or length")
        copy = _Copy(remote.peer, joined_runs(own, theirs, lengths)[::-1])
        self._submit(copy)
        return copy

    def poll(self, transfer: _Copy) -> bool:
        going = []
        for batch in transfer.under_way:
            state = self._engine.transfer_check_status(batch)
            if state == _PENDING:
                going.append(batch)
                continue
            self._in_flight -= 1
            transfer.failed |= state != _DONE
        transfer.under_way = going
        if transfer.failed:
            transfer.left.clear()
        self._submit(transfer)
        if transfer.under_way or transfer.left:
            return False
        if transfer.failed:
            raise PortError(f"writing to {transfer.peer} has failed")
        return True

    def _submit(self, copy: _Copy) -> None:
        while copy.left and self._in_flight < self._max_in_flight:
            own, theirs, length = copy.left.pop()
            batch = self._engine.transfer_submit_write(copy.peer, own, theirs, length)
            if batch <= 0:
                copy.failed = True
                copy.left.clear()
                return
            self._in_flight += 1
            copy.under_way.append(batch)

    def close(self) -> None:
        for address, _ in self._regions:
            self._engine.unregister_memory(address)
        self._regions.clear()
