"""One report of a step out of those of all workers' connectors.

A transfer has ended for the scheduler when every worker has said so, in whatever steps; it has
failed if it failed on any of them. Imports no torch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.outputs import KVConnectorOutput

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.v1.outputs import ModelRunnerOutput

__all__ = ["KVOutputAggregator"]

_JOINED = ("kv_connector_stats", "kv_cache_events", "kv_connector_worker_meta")


class _Countdown:
    """Which requests all workers have reported."""

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._missing: dict[str, int] = {}

    def report(self, request_ids: set[str]) -> set[str]:
        """One worker's report; the requests that it was the last to report."""
        complete = set()
        for request_id in request_ids:
            missing = self._missing.get(request_id, self._expected) - 1
            if missing > 0:
                self._missing[request_id] = missing
            else:
                self._missing.pop(request_id, None)
                complete.add(request_id)
        return complete


class KVOutputAggregator:
    """Keeps count over the steps of an engine.

    Args:
        expected_finished_count: workers that report each transfer.
    """

    def __init__(self, expected_finished_count: int) -> None:
        self._sending = _Countdown(expected_finished_count)
        self._recving = _Countdown(expected_finished_count)
        self._failed: set[str] = set()
        """Requests whose loading has failed on a worker, and others have not reported yet."""

    @classmethod
    def from_connector(cls, connector: KVConnectorBase_V1, world_size: int) -> KVOutputAggregator:
        return cls(connector.get_finished_count() or world_size)

    def aggregate(
        self, outputs: Sequence[ModelRunnerOutput], output_rank: int = 0
    ) -> ModelRunnerOutput:
        """The output of ``output_rank``, with what all of ``outputs`` (one a worker) report."""
        reports = [o.kv_connector_output for o in outputs if o.kv_connector_output is not None]
        result = copy.copy(outputs[output_rank])
        result.kv_connector_output = self._join(reports) if reports else None
        return result

    def _join(self, reports: Sequence[KVConnectorOutput]) -> KVConnectorOutput | None:
        sent: set[str] = set()
        received: set[str] = set()
        joined = KVConnectorOutput()
        for report in reports:
            sent |= self._sending.report(report.finished_sending or set())
            failed = report.failed_recving
            self._failed |= failed
            received |= self._recving.report((report.finished_recving or set()) | failed)
            joined.invalid_block_ids |= report.invalid_block_ids
            # Who waits for one worker waits for all.
            joined.stuck_recving |= report.stuck_recving
            for name in _JOINED:
                setattr(joined, name, _add(getattr(joined, name), getattr(report, name)))
        joined.finished_sending = sent or None
        joined.failed_recving = received & self._failed
        joined.finished_recving = (received - self._failed) or None
        self._failed -= received
        return None if joined.is_empty() else joined


def _add(mine: Any, other: Any) -> Any:
    """Reports of one kind: their own ``aggregate`` makes one of two; counters are added up, lists
    put together.
    """
    if mine is None or other is None:
        return other if mine is None else mine
    if hasattr(mine, "aggregate"):
        return mine.aggregate(other)
    if isinstance(mine, dict):
        return {name: mine.get(name, 0) + other.get(name, 0) for name in mine.keys() | other.keys()}
    return [*mine, *other]
