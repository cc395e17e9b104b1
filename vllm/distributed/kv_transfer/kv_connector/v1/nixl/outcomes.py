"""What a transfer thread has come to, as the thread of the steps takes it."""

from __future__ import annotations

import threading

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

__all__ = ["Outcomes"]


class Outcomes:
    """Requests that have ended, and counters; written by one thread, taken by another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats: dict[str, float] = {}
        self._clear()

    def _clear(self) -> None:
        self._received: set[str] = set()
        self._failed: set[str] = set()
        self._stuck: set[str] = set()
        self._sent: set[str] = set()

    def count(self, **values: float) -> None:
        """Add to counters: ``vllm:kv_<name>_total``."""
        with self._lock:
            for name, value in values.items():
                self._stats[name] = self._stats.get(name, 0) + value

    def received(self, request_id: str, *, is_right: bool) -> None:
        """A load has ended: nothing more is written to its blocks."""
        with self._lock:
            (self._received if is_right else self._failed).add(request_id)

    def is_stuck(self, request_id: str) -> None:
        """A load was given up; its blocks may still be written to."""
        with self._lock:
            self._stuck.add(request_id)

    def sent(self, request_id: str) -> None:
        """Nobody reads the blocks of a lease any more."""
        with self._lock:
            self._sent.add(request_id)

    def take_results(self) -> KVConnectorTransferResults:
        """What has ended since the last call."""
        with self._lock:
            results = KVConnectorTransferResults(
                finished_sending=self._sent,
                finished_recving=self._received,
                failed_recving=self._failed,
                stuck_recving=self._stuck,
            )
            self._clear()
        return results

    def take_stats(self) -> dict[str, float] | None:
        """Counters since the last call; None where nothing was counted."""
        with self._lock:
            stats, self._stats = self._stats, {}
        return stats or None
