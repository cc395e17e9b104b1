"""The ring: every reader gets every message, whole and in order, and sleeps in between."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from vllm.distributed.device_communicators.shm_broadcast import RingHandle, RingReader, RingWriter

CAPACITY = 1 << 12
READER = """
import hashlib, sys
from vllm.distributed.device_communicators.shm_broadcast import RingHandle, RingReader
memory, wakes, capacity, index, spin = sys.argv[1:]
handle = RingHandle(
    memory_fd=int(memory), wake_fds=tuple(map(int, wakes.split(","))), capacity=int(capacity)
)
reader = RingReader(handle, int(index), spin=float(spin))
digest = hashlib.sha256()
while (message := reader.receive())[0]:
    digest.update(message[0].to_bytes(8, "big") + message[1])
print(digest.hexdigest())
"""


@pytest.fixture
def handle() -> Iterator[RingHandle]:
    handle = RingHandle.create(2, CAPACITY)
    yield handle
    handle.close()


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_each_reader_gets_each_message(handle: RingHandle):
    writer = RingWriter(handle)
    readers = [RingReader(handle, 0), RingReader(handle, 1, spin=0.01)]
    writer.send(7, b"abc")
    writer.send(8, b"")
    for reader in readers:
        assert reader.has_message
        assert reader.receive() == (7, b"abc")
        assert reader.receive() == (8, b"")
        assert not reader.has_message


@pytest.mark.parametrize("size", [CAPACITY - 16, CAPACITY, 3 * CAPACITY + 5])
def test_a_message_larger_than_the_ring_flows_through_it(handle: RingHandle, size: int):
    payload = random.Random(size).randbytes(size)
    writer = RingWriter(handle)
    readers = [RingReader(handle, index) for index in range(2)]
    got: list[list[tuple[int, bytes] | None]] = [[], []]

    def read(index: int) -> None:
        got[index].extend(readers[index].receive() for _ in range(3))

    threads = [in_thread(lambda index=index: read(index)) for index in range(2)]
    for number in range(3):
        writer.send(number, payload)
    for thread in threads:
        thread.join(120)
    assert got == [[(number, payload) for number in range(3)]] * 2


def test_a_writer_waits_for_the_slowest_reader_and_asks_whether_it_lives(handle: RingHandle):
    looks = []

    def check() -> None:
        looks.append(None)
        if len(looks) > 3:
            raise RuntimeError("the reader is gone")

    writer = RingWriter(handle, check)
    quick = RingReader(handle, 0)
    with pytest.raises(RuntimeError, match="gone"):
        for _ in range(CAPACITY // 100):
            writer.send(1, bytes(100))
            assert quick.receive() == (1, bytes(100))


def test_waiting_can_be_interrupted(handle: RingHandle):
    interrupt = os.eventfd(0)
    reader = RingReader(handle, 0, interrupt_fd=interrupt)
    got: list[object] = []
    thread = in_thread(lambda: got.append(reader.receive()))
    os.eventfd_write(interrupt, 1)
    thread.join(120)
    assert got == [None]
    # What has been written can still be read.
    RingWriter(handle).send(3, b"x")
    assert reader.receive() == (3, b"x")
    os.close(interrupt)


def test_a_sleeping_reader_uses_no_time_and_wakes(handle: RingHandle):
    writer, reader = RingWriter(handle), RingReader(handle, 0)
    times: list[float] = []

    def read() -> None:
        begin = time.thread_time()
        assert reader.receive() == (1, b"x")
        times.append(time.thread_time() - begin)

    thread = in_thread(read)
    thread.join(0.3)
    assert thread.is_alive()
    writer.send(1, b"x")
    thread.join(120)
    assert times[0] < 0.1


def test_processes_read_a_long_random_stream_alike(handle: RingHandle):
    def start(index: int, spin: float) -> subprocess.Popen[str]:
        arguments = [handle.memory_fd, ",".join(map(str, handle.wake_fds)), CAPACITY, index, spin]
        return subprocess.Popen(
            [sys.executable, "-c", READER, *map(str, arguments)],
            pass_fds=handle.fds,
            stdout=subprocess.PIPE,
            text=True,
        )

    readers = [start(0, 0.0), start(1, 0.001)]
    writer = RingWriter(handle)
    generator = random.Random(1)
    expected = hashlib.sha256()
    for _ in range(2000):
        kind = generator.randrange(1, 100)
        payload = generator.randbytes(generator.choice((0, 1, 50, 700, 9000)))
        writer.send(kind, payload)
        expected.update(kind.to_bytes(8, "big") + payload)
    writer.send(0, b"")
    outputs = [reader.communicate(timeout=240)[0].strip() for reader in readers]
    assert outputs == [expected.hexdigest()] * 2
