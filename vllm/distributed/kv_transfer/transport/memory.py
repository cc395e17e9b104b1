"""A transport inside one process: the oracle of real ones, and the place where faults are made.

Copies really happen, byte by byte of the prepared lists, when a transfer is polled; what is not
registered cannot be reached. ``MemoryFabric.faults`` decides the fate of each transfer and message.
"""

from __future__ import annotations

import ctypes
import json
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm.distributed.kv_transfer.transport.channel import Channel
from vllm.distributed.kv_transfer.transport.port import PeerLostError, PortError, TransferPort

__all__ = ["Faults", "MemoryChannel", "MemoryFabric", "MemoryPort"]


@dataclass(slots=True)
class Faults:
    """Probabilities of what may go wrong, drawn from a seeded generator. None by default."""

    rng: random.Random = field(default_factory=lambda: random.Random(0))
    delay: float = 0.0
    """A copy takes up to 20 more polls."""
    hang: float = 0.0
    """A copy never ends, but writes its bytes at some time."""
    fail: float = 0.0
    """A copy fails half way."""
    corrupt: float = 0.0
    """A copy delivers a wrong byte and says nothing."""
    lose: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    garbage: float = 0.0
    """A message is lost, comes twice, comes before its elders, or is followed by noise."""
    count: int = 0
    """Faults made so far."""

    def happens(self, what: str) -> bool:
        probability: float = getattr(self, what)
        if probability and self.rng.random() < probability:
            self.count += 1
            return True
        return False


class MemoryFabric:
    """All agents of one process that can meet."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.ports: dict[str, MemoryPort] = {}
        self.channels: dict[str, MemoryChannel] = {}
        self.faults = faults or Faults()
        self.dead: set[str] = set()
        self.frozen: set[str] = set()

    def kill(self, name: str) -> None:
        """The agent is gone, as if its process had been killed."""
        self.dead.add(name)


@dataclass(slots=True)
class _Copy:
    peer: str
    runs: list[tuple[int, int, int]]
    """(from, to, bytes)."""
    polls_left: int = 0
    fails: bool = False
    corrupts: bool = False
    done: bool = False


@dataclass(frozen=True, slots=True)
class _Prepared:
    peer: str | None
    rows: np.ndarray
    ends: np.ndarray

    def resolve(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Addresses and lengths."""
        if len(indices) == 0 or indices.min() < 0 or indices.max() >= self.ends[-1]:
            raise PortError("descriptor numbers out of range, or none")
        row = np.searchsorted(self.ends, indices, side="right")
        inside = indices - (self.ends[row] - self.rows[row, 3])
        return self.rows[row, 0] + inside * self.rows[row, 2], self.rows[row, 1]


class MemoryPort(TransferPort):
    def __init__(self, fabric: MemoryFabric, name: str) -> None:
        assert name not in fabric.ports, f"two agents named {name}"
        self.name = name
        self._fabric = fabric
        fabric.ports[name] = self
        self._regions: list[tuple[int, int]] = []
        self._peers: set[str] = set()
        self._inbox: deque[tuple[str, bytes]] = deque()
        self._hung: list[_Copy] = []
        self.num_descriptors = 0
        """Runs copied so far, neighbours on both sides joined."""

    def register(self, regions: Sequence[tuple[int, int]], device: str) -> None:
        self._regions.extend(regions)

    def metadata(self) -> bytes:
        return json.dumps({"name": self.name}).encode()

    def connect(self, metadata: bytes) -> str:
        try:
            name = json.loads(metadata)["name"]
        except (ValueError, KeyError, TypeError) as error:
            raise PortError(f"not the metadata of an agent: {error!r}") from error
        self._alive(name)
        self._peers.add(name)
        return name

    def _alive(self, peer: str) -> MemoryPort:
        if peer not in self._fabric.ports or peer in self._fabric.dead:
            raise PeerLostError(f"{peer} is gone")
        return self._fabric.ports[peer]

    def disconnect(self, peer: str) -> None:
        self._peers.discard(peer)

    def prepare(self, peer: str | None, rows: np.ndarray, *, on_host: bool = False) -> _Prepared:
        owner = self if peer is None else self._alive(peer)
        for address, length, stride, count in rows.tolist():
            end = address + stride * (count - 1) + length
            if not any(start <= address and end <= start + size for start, size in owner._regions):
                raise PortError(f"[{address}, {end}) is not registered by {owner.name}")
        return _Prepared(peer, rows.copy(), np.cumsum(rows[:, 3]))

    def forget(self, prepared: _Prepared) -> None:
        """Nothing is held."""

    def read(
        self, local: _Prepared, into: np.ndarray, remote: _Prepared, out_of: np.ndarray
    ) -> _Copy:
        return self._start(remote.peer, remote.resolve(out_of), local.resolve(into))

    def write(
        self, local: _Prepared, out_of: np.ndarray, remote: _Prepared, into: np.ndarray
    ) -> _Copy:
        return self._start(remote.peer, local.resolve(out_of), remote.resolve(into))

    def _start(
        self,
        peer: str | None,
        source: tuple[np.ndarray, np.ndarray],
        target: tuple[np.ndarray, np.ndarray],
    ) -> _Copy:
        assert peer is not None
        self._alive(peer)
        if len(source[0]) != len(target[0]) or not np.array_equal(source[1], target[1]):
            raise PortError("descriptors of both sides differ in number or length")
        runs: list[tuple[int, int, int]] = []
        for start, to, length in zip(
            source[0].tolist(), target[0].tolist(), source[1].tolist(), strict=True
        ):
            if runs and runs[-1][0] + runs[-1][2] == start and runs[-1][1] + runs[-1][2] == to:
                runs[-1] = runs[-1][0], runs[-1][1], runs[-1][2] + length
            else:
                runs.append((start, to, length))
        self.num_descriptors += len(runs)
        faults = self._fabric.faults
        copy = _Copy(peer, runs)
        if faults.happens("hang") or peer in self._fabric.frozen:
            copy.polls_left = 1 << 60
            self._hung.append(copy)
        elif faults.happens("delay"):
            copy.polls_left = faults.rng.randint(1, 20)
        copy.fails = faults.happens("fail")
        # Lease numbers stay right: they would give a wrong byte away.
        is_data = sum(size for *_, size in runs) > 8
        copy.corrupts = is_data and faults.happens("corrupt")
        return copy

    def poll(self, transfer: _Copy) -> bool:
        if transfer.done:
            return True
        self._alive(transfer.peer)
        if transfer.polls_left > 0:
            transfer.polls_left -= 1
            return False
        self._run(transfer)
        return True

    def release_hung(self) -> None:
        """What hung goes on: the bytes are written now."""
        for copy in self._hung:
            copy.polls_left = 0
        self._hung.clear()

    def _run(self, copy: _Copy) -> None:
        runs = copy.runs
        if copy.fails:
            for start, to, length in runs[: len(runs) // 2]:
                ctypes.memmove(to, start, length)
            raise PortError("the copy has failed")
        for start, to, length in runs:
            ctypes.memmove(to, start, length)
        if copy.corrupts:
            _, to, length = self._fabric.faults.rng.choice(runs)
            place = to + self._fabric.faults.rng.randrange(length)
            ctypes.memset(place, ctypes.c_ubyte.from_address(place).value ^ 0x55, 1)
        copy.done = True

    def notify(self, peer: str, message: bytes) -> None:
        if peer not in self._peers:
            raise PortError(f"{peer} is not known")
        inbox = self._alive(peer)._inbox
        faults = self._fabric.faults
        if faults.happens("lose"):
            return
        item = self.name, message
        if faults.happens("reorder"):
            inbox.appendleft(item)
        else:
            inbox.append(item)
        if faults.happens("duplicate"):
            inbox.append(item)
        if faults.happens("garbage"):
            inbox.append((self.name, faults.rng.randbytes(faults.rng.randrange(40))))

    def take_notifications(self) -> list[tuple[str, bytes]]:
        taken = list(self._inbox)
        self._inbox.clear()
        return taken

    def close(self) -> None:
        self._regions.clear()
        self._fabric.ports.pop(self.name, None)


class MemoryChannel(Channel):
    """Questions and answers inside one process; the fabric's faults befall them, both ways.

    Args:
        name: that of the port beside it, with which it dies.
    """

    def __init__(self, fabric: MemoryFabric, name: str) -> None:
        self._fabric = fabric
        self._name = name
        self.address = f"tcp://{name}:1"
        self._questions: deque[tuple[str, bytes]] = deque()
        self._answers: deque[tuple[str, bytes]] = deque()
        fabric.channels[self.address] = self

    def _put(self, inbox: deque[tuple[str, bytes]], message: bytes) -> None:
        faults, item = self._fabric.faults, (self.address, message)
        if faults.happens("lose"):
            return
        if faults.happens("reorder"):
            inbox.appendleft(item)
        else:
            inbox.append(item)
        if faults.happens("duplicate"):
            inbox.append(item)
        if faults.happens("garbage"):
            inbox.append((self.address, faults.rng.randbytes(faults.rng.randrange(40))))

    def ask(self, address: str, message: bytes) -> bool:
        other = self._fabric.channels.get(address)
        if other is None or self.is_gone(address):
            return False
        self._put(other._questions, message)
        return True

    def answer(self, who: str, message: bytes) -> None:
        other = self._fabric.channels.get(who)
        if other is not None and not self.is_gone(who):
            self._put(other._answers, message)

    def take_questions(self) -> list[tuple[str, bytes]]:
        taken = list(self._questions)
        self._questions.clear()
        return taken

    def take_answers(self) -> list[tuple[str, bytes]]:
        taken = list(self._answers)
        self._answers.clear()
        return taken

    def is_gone(self, address: str) -> bool:
        return address.removeprefix("tcp://").rpartition(":")[0] in self._fabric.dead

    def wait(self, seconds: float) -> None:
        """Time is the caller's."""

    def wake(self) -> None:
        """Nobody waits."""

    def close(self) -> None:
        self._fabric.channels.pop(self.address, None)
