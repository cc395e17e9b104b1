"""Time of transfer threads, so that nothing depends on the machine's speed."""

from __future__ import annotations

import threading
import time
from collections import Counter

from tests.entrypoints.server import PATIENCE


class ThreadsClock:
    """Stands still until told to go on, and then until the threads have had some turns.

    Args:
        looks: at the clock, that each thread has in some turns.
    """

    def __init__(self, looks: int) -> None:
        self._least = looks
        self.now = time.monotonic()
        self.threads: list[threading.Thread] = []
        self._looks: Counter[threading.Thread] = Counter()

    def __call__(self) -> float:
        self._looks[threading.current_thread()] += 1
        return self.now

    def go_on(self, seconds: float) -> None:
        before = self._looks.copy()
        self.now += seconds
        deadline = time.monotonic() + PATIENCE
        while any(self._looks[thread] < before[thread] + self._least for thread in self.threads):
            assert time.monotonic() < deadline, "a transfer thread has stopped"
            time.sleep(0.001)
