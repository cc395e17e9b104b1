"""What a transfer thread reports to the thread of the steps: ended transfers, counters."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

__all__ = ["Reports"]


def _nothing() -> KVConnectorTransferResults:
    return KVConnectorTransferResults(set(), set(), set(), set())


class Reports:
    """Written by the transfer thread, taken by another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._results = _nothing()
        self._stats: dict[str, float] = {}
        self._callback: Callable[[], None] | None = None

    def register_callback(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called by the transfer thread when ``take_results`` has something."""
        self._callback = callback

    def _say_so(self) -> None:
        if self._callback is not None:
            self._callback()

    def sent(self, request_id: str) -> None:
        with self._lock:
            assert self._results.finished_sending is not None
            self._results.finished_sending.add(request_id)
        self._say_so()

    def received(self, request_id: str, *, failed: bool) -> None:
        with self._lock:
            ended = self._results.failed_recving if failed else self._results.finished_recving
            assert ended is not None
            ended.add(request_id)
        self._say_so()

    def stuck(self, request_id: str) -> None:
        with self._lock:
            assert self._results.stuck_recving is not None
            self._results.stuck_recving.add(request_id)
        self._say_so()

    def count(self, **values: float) -> None:
        with self._lock:
            for name, value in values.items():
                self._stats[name] = self._stats.get(name, 0) + value

    def take_results(self) -> KVConnectorTransferResults:
        with self._lock:
            results, self._results = self._results, _nothing()
        return results

    def take_stats(self) -> dict[str, float] | None:
        with self._lock:
            stats, self._stats = self._stats, {}
        return stats or None
