"""A ring of bytes in shared memory: one process writes messages, some others read them all.

Each reader sees every message, in order, whatever its size: one larger than the ring flows through
it. A reader spins for a moment, then sleeps in ``poll``. The memory and the descriptors that wake
have no names in any file system, so nothing is left behind however the processes end. Knows
nothing of what messages mean.

====================  ==========================================================================
offset                what is there
====================  ==========================================================================
0                     bytes ever written, as are all counters a word of 8 bytes
64 * (1 + i)          bytes that reader ``i`` has ever read
4096                  the ring: byte ``n`` of the stream lies at ``4096 + n % capacity``
====================  ==========================================================================

In the stream each message is its kind (8 bytes), its length (8 bytes) and its payload.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from vllm.errors import ConfigError

__all__ = ["RingHandle", "RingReader", "RingWriter"]

_DATA = 4096
_LINE = 64
_MAX_READERS = _DATA // _LINE - 1
_HEADER = struct.Struct("=QQ")
_CAPACITY = 4 << 20
# How long a writer sleeps between two looks at a full ring, in seconds.
_ROOM_POLL = 50e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class RingHandle:
    """The descriptors of a ring: what a child has to inherit, under the same numbers."""

    memory_fd: int
    wake_fds: tuple[int, ...]
    """An eventfd for each reader."""
    capacity: int

    @property
    def fds(self) -> tuple[int, ...]:
        return (self.memory_fd, *self.wake_fds)

    @classmethod
    def create(cls, num_readers: int, capacity: int = _CAPACITY) -> RingHandle:
        """A new, empty ring; memory is taken as it is first written.

        Raises:
            ConfigError: the system has no anonymous shared memory.
        """
        assert 1 <= num_readers <= _MAX_READERS
        if not hasattr(os, "memfd_create") or not hasattr(os, "eventfd"):
            raise ConfigError(
                "--distributed-executor-backend mp needs Linux; use uni with "
                "--tensor-parallel-size 1",
                parameter="distributed_executor_backend",
                value="mp",
            )
        memory_fd = os.memfd_create("vllm-ring")
        os.ftruncate(memory_fd, _DATA + capacity)
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        wake_fds = tuple(os.eventfd(0, flags) for _ in range(num_readers))
        return cls(memory_fd=memory_fd, wake_fds=wake_fds, capacity=capacity)

    def close(self) -> None:
        """Close this process's descriptors; mappings live on until their owners are closed."""
        for fd in self.fds:
            with contextlib.suppress(OSError):
                os.close(fd)


class _Mapping:
    """The memory of a ring, as counters and as bytes."""

    def __init__(self, handle: RingHandle) -> None:
        self._mapping = mmap.mmap(handle.memory_fd, _DATA + handle.capacity)
        self._whole = memoryview(self._mapping)
        self.counters = self._whole[:_DATA].cast("Q")
        self.data = self._whole[_DATA:]
        # A release followed by an acquire orders what comes before them with what comes after,
        # on machines that reorder stores or loads too.
        self._lock = threading.Lock()
        self._lock.acquire()

    def fence(self) -> None:
        self._lock.release()
        self._lock.acquire()

    def close(self) -> None:
        self.counters.release()
        self.data.release()
        self._whole.release()
        self._mapping.close()


def _reader_counter(index: int) -> int:
    return _LINE * (1 + index) // 8


class RingWriter:
    """The writing end.

    Args:
        check: called while the ring is full; raises where a reader will never read again.
    """

    def __init__(self, handle: RingHandle, check: Callable[[], None] = lambda: None) -> None:
        self._map = _Mapping(handle)
        self._capacity = handle.capacity
        self._wake_fds = handle.wake_fds
        self._readers = [_reader_counter(i) for i in range(len(handle.wake_fds))]
        self._check = check
        self._written = 0
        self._limit = handle.capacity
        """Up to where may be written without looking at the readers."""

    def send(self, kind: int, payload: bytes) -> None:
        """Write a message; waits while the slowest reader is a whole ring behind."""
        self._write(_HEADER.pack(kind, len(payload)))
        self._write(payload)
        self._publish()

    def _write(self, payload: bytes) -> None:
        rest = memoryview(payload)
        while len(rest):
            if self._written >= self._limit:
                self._wait_for_room()
            at = self._written % self._capacity
            count = min(len(rest), self._limit - self._written, self._capacity - at)
            self._map.data[at : at + count] = rest[:count]
            self._written += count
            rest = rest[count:]

    def _publish(self) -> None:
        self._map.fence()
        self._map.counters[0] = self._written
        for fd in self._wake_fds:
            os.eventfd_write(fd, 1)

    def _wait_for_room(self) -> None:
        published = False
        while True:
            counters = self._map.counters
            self._limit = min(counters[i] for i in self._readers) + self._capacity
            if self._limit > self._written:
                self._map.fence()
                return
            if not published:
                self._publish()
                published = True
            self._check()
            time.sleep(_ROOM_POLL)

    def close(self) -> None:
        self._map.close()


class RingReader:
    """One reading end.

    Args:
        index: which of the ring's readers this is.
        spin: seconds to look for a message before sleeping.
        interrupt_fd: a descriptor that, once readable, ends all waiting.
    """

    def __init__(
        self, handle: RingHandle, index: int, *, spin: float = 0.0, interrupt_fd: int | None = None
    ) -> None:
        self._map = _Mapping(handle)
        self._capacity = handle.capacity
        self._fd = handle.wake_fds[index]
        self._counter = _reader_counter(index)
        self._spin = spin
        self._read = 0
        self._interrupt_fd = interrupt_fd
        self._poller = select.poll()
        self._poller.register(self._fd, select.POLLIN)
        if interrupt_fd is not None:
            self._poller.register(interrupt_fd, select.POLLIN)

    @property
    def wake_fd(self) -> int:
        """Readable since a message has come, until ``forget_wakeups``."""
        return self._fd

    @property
    def has_message(self) -> bool:
        return self._map.counters[0] != self._read

    def forget_wakeups(self) -> None:
        """To be followed by a look at ``has_message``."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def receive(self) -> tuple[int, bytes] | None:
        """The next message, as soon as there is one; None where waiting was interrupted."""
        header = self._take(_HEADER.size)
        if header is None:
            return None
        kind, length = _HEADER.unpack(header)
        payload = self._take(length)
        return None if payload is None else (kind, payload)

    def _take(self, count: int) -> bytes | None:
        parts: list[bytes] = []
        while count:
            there = self._map.counters[0] - self._read
            if not there:
                if not self._wait():
                    return None
                continue
            self._map.fence()
            at = self._read % self._capacity
            size = min(count, there, self._capacity - at)
            parts.append(bytes(self._map.data[at : at + size]))
            self._map.fence()
            self._read += size
            self._map.counters[self._counter] = self._read
            count -= size
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _wait(self) -> bool:
        """Until something has been written; False where the interrupt came first."""
        counters, read = self._map.counters, self._read
        if self._spin:
            end = time.perf_counter() + self._spin
            while time.perf_counter() < end:
                if counters[0] != read:
                    return True
                os.sched_yield()
        while counters[0] == read:
            ready = {fd for fd, _ in self._poller.poll()}
            if self._fd in ready:
                # It counts messages that were read without sleeping, too: look again.
                self.forget_wakeups()
            elif ready:
                return counters[0] != read
        return True

    def close(self) -> None:
        self._map.close()
