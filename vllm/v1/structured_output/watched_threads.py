"""Threads for work that may take forever, such as following a grammar that a client made up.

Nothing can stop a thread inside C++ code. So work that is over its time fails, and its thread is
given up: it ends by itself some day, at the lowest priority, while another takes its place.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

__all__ = ["WatchedThreads", "Work"]

_LOWEST_PRIORITY = 19


class Work(Future[Any]):
    """A call and its time limit, which is counted from when the call begins.

    Args:
        call: gets this object, for ``begin_part``.
        seconds: the limit; of each part, where the call has several.
        overdue: what the future fails with once the limit is over.
    """

    def __init__(
        self, call: Callable[[Work], Any], seconds: float, overdue: Callable[[], Exception]
    ) -> None:
        super().__init__()
        self.call = call
        self.seconds = seconds
        self.overdue = overdue
        self.part = 0
        """The part that is under way, or was when the time was over."""
        self._began: float | None = None
        self._lock = threading.Lock()

    def begin_part(self, part: int) -> bool:
        """Begin the next part; False once the work was given up: return, touching nothing."""
        with self._lock:
            if self.done():
                return False
            self.part = part
            self._began = time.monotonic()
            return True

    def settle(self, result: Any, error: BaseException | None) -> bool:
        """The call has ended; False if the work was given up before."""
        with self._lock:
            if self.done():
                return False
            if error is None:
                self.set_result(result)
            else:
                self.set_exception(error)
            return True

    def give_up_if_overdue(self) -> bool:
        """Fail the work if its time is over; True if this call did."""
        with self._lock:
            began = self._began
            if self.done() or began is None or time.monotonic() - began < self.seconds:
                return False
            self.set_exception(self.overdue())
            return True


class WatchedThreads:
    """``count`` threads that work on what is submitted, in turn. Daemons, started when needed.

    ``submit``, ``is_over``, ``run`` and ``shutdown`` belong to one thread, the owner's.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._threads: dict[threading.Thread, Work | None] = {}
        """Those in service, and what each works on."""
        self._given_up: list[threading.Thread] = []

    @property
    def num_given_up(self) -> int:
        """Threads that were given up and still run."""
        self._given_up = [thread for thread in self._given_up if thread.is_alive()]
        return len(self._given_up)

    def submit(
        self, call: Callable[[Work], Any], seconds: float, overdue: Callable[[], Exception]
    ) -> Work:
        """Have ``call`` done by one of the threads; see ``Work``."""
        work = Work(call, seconds, overdue)
        self._queue.put(work)
        self._start_missing()
        return work

    def is_over(self, work: Work) -> bool:
        """``work`` has ended, well or not; gives up all work whose time is over."""
        if not work.done():
            for thread, current in list(self._threads.items()):
                if current is not None and current.give_up_if_overdue():
                    del self._threads[thread]
                    self._given_up.append(thread)
                    thread.name += " (given up)"
                    _lower_priority(thread)
            self._start_missing()
        return work.done()

    def run(self, work: Work) -> Any:
        """Wait for ``work``, no longer than it may take; its result, or its error raised."""
        while True:
            try:
                return work.result(timeout=work.seconds)
            except TimeoutError:
                if self.is_over(work):
                    return work.result()

    def shutdown(self) -> None:
        """End the threads that wait; cancel what has not begun; don't wait for the others."""
        while not self._queue.empty():
            work = self._queue.get()
            if work is not None:
                work.cancel()
        for _ in self._threads:
            self._queue.put(None)
        self._threads = {}

    def _start_missing(self) -> None:
        if len(self._threads) < self._count and not self._queue.empty():
            thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._threads[thread] = None
            thread.start()

    def _serve(self) -> None:
        thread = threading.current_thread()
        while (work := self._queue.get()) is not None:
            if not work.set_running_or_notify_cancel():
                continue
            self._threads[thread] = work
            work.begin_part(0)
            result, error = None, None
            try:
                result = work.call(work)
            except BaseException as caught:  # noqa: BLE001 - raised again where the result is read
                error = caught
            if not work.settle(result, error):
                return
            if thread in self._threads:
                self._threads[thread] = None


def _lower_priority(thread: threading.Thread) -> None:
    # Only Linux gives threads priorities of their own.
    if sys.platform == "linux" and thread.native_id is not None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread.native_id, _LOWEST_PRIORITY)
