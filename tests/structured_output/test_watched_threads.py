"""Work that does not end fails in time, and what comes after it goes on elsewhere."""

import threading
import time

import pytest

from vllm.v1.structured_output import watched_threads
from vllm.v1.structured_output.watched_threads import WatchedThreads


class Overdue(Exception):
    pass


@pytest.fixture
def gate():
    """Work waits for it; open at the end of a test."""
    gate = threading.Event()
    yield gate
    gate.set()


class Clock:
    """Time goes by when the test says so; what waits for it looks again soon."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watched_threads, "time", clock)
    return clock


def wait_until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_results_and_errors_come_back():
    threads = WatchedThreads(1, "t")
    assert threads.run(threads.submit(lambda _: 5, 60, Overdue)) == 5
    with pytest.raises(ZeroDivisionError):
        threads.run(threads.submit(lambda _: 1 // 0, 60, Overdue))
    # An error of the same kind as that of a wait is no reason to wait on.
    with pytest.raises(TimeoutError, match="own"):
        threads.run(threads.submit(_raise_timeout, 60, Overdue))
    threads.shutdown()


def _raise_timeout(_work):
    raise TimeoutError("own")


def test_work_without_an_end_fails_and_others_go_on(gate):
    threads = WatchedThreads(1, "t")
    with pytest.raises(Overdue):
        threads.run(threads.submit(lambda _: gate.wait(), 0.1, Overdue))
    assert threads.num_given_up == 1
    assert threads.run(threads.submit(lambda _: "next", 60, Overdue)) == "next"
    gate.set()
    wait_until(lambda: threads.num_given_up == 0)
    assert threads.run(threads.submit(lambda _: "after", 60, Overdue)) == "after"
    threads.shutdown()


def test_the_wait_for_a_thread_does_not_count(gate, clock):
    threads = WatchedThreads(1, "t")
    begun = threading.Event()
    first = threads.submit(lambda _: begun.set() or gate.wait(), 60, Overdue)
    second = threads.submit(lambda _: 2, 0.05, Overdue)
    assert begun.wait(120)
    clock.now += 0.2
    assert not threads.is_over(second)
    gate.set()
    assert threads.run(second) == 2 and threads.is_over(first)
    threads.shutdown()


def test_who_waits_in_vain_gives_up_what_nobody_asks_about_any_more(gate):
    threads = WatchedThreads(1, "t")
    threads.submit(lambda _: gate.wait(), 0.05, Overdue)
    waiting = threads.submit(lambda _: 2, 60, Overdue)
    wait_until(lambda: threads.is_over(waiting))
    assert waiting.result() == 2
    threads.shutdown()


def test_each_part_has_the_time_and_none_begins_after_the_end(gate, clock):
    threads = WatchedThreads(1, "t")
    begun = []
    hangs = threading.Event()

    def work(work):
        for part in range(4):
            if not work.begin_part(part):
                begun.append("stopped")
                return
            begun.append(part)
            if part == 2:
                hangs.set()
                gate.wait()
            else:
                clock.now += 0.15

    hanging = threads.submit(work, 0.25, Overdue)
    assert hangs.wait(120)
    assert not threads.is_over(hanging)
    clock.now += 0.25
    with pytest.raises(Overdue):
        threads.run(hanging)
    assert hanging.part == 2
    gate.set()
    wait_until(lambda: threads.num_given_up == 0)
    assert begun == [0, 1, 2, "stopped"]
    threads.shutdown()


def test_shutdown_cancels_what_waits_and_does_not_wait(gate):
    threads = WatchedThreads(1, "t")
    threads.submit(lambda _: gate.wait(), 60, Overdue)
    waiting = threads.submit(lambda _: 2, 60, Overdue)
    threads.shutdown()
    threads.shutdown()
    # The other has not ended.
    assert waiting.cancelled() and not gate.is_set()
