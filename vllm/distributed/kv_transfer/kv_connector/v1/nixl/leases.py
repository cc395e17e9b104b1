"""The leases of a prefill engine: what peers may read, and until when.

A lease's generation number lies in memory that peers read after the blocks. It goes on before the
blocks may be used again, so that a late reader sees it. Runs in the transfer thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.giving import LeaseView
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import LeaseStart, NixlSettings
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.peers import LocalSide
from vllm.distributed.kv_transfer.kv_connector.v1.reports import Reports
from vllm.distributed.kv_transfer.kv_connector.v1.topology import TransferTopology
from vllm.logger import init_logger

__all__ = ["Leases"]

logger = init_logger(__name__)

_PROLONGS_BY = 2 / 3
_MOST_EARLY = 4096


@dataclass(slots=True)
class _Lease:
    slot: int
    deadline: float
    block_ids: tuple[frozenset[int], ...]
    done: set[str] = field(default_factory=set)
    """Agents that have said so."""


class Leases:
    """
    Args:
        table: int64 ``(max_leases,)`` that peers may read: generations by slot.
        seconds: that a lease lasts before anybody has prolonged it.
        has_ended: called with a request whose blocks go, after its generation has gone on.
    """

    def __init__(
        self,
        local: LocalSide,
        settings: NixlSettings,
        table: np.ndarray,
        reports: Reports,
        clock: Callable[[], float],
        *,
        seconds: float,
        has_ended: Callable[[str], None],
    ) -> None:
        self._local = local
        self._settings = settings
        self._table = table
        self._reports = reports
        self._clock = clock
        self._seconds = seconds
        self._has_ended = has_ended
        self._held: dict[str, _Lease] = {}
        self._early: OrderedDict[str, dict[str, int]] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()

    @property
    def held(self) -> set[str]:
        """Requests whose blocks may be read."""
        return set(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def add(self, request_id: str, start: LeaseStart) -> None:
        """The blocks of this request may be read from now on."""
        rows = tuple(frozenset(row) - {0} for row in start.block_ids)
        self._held[request_id] = _Lease(start.slot, self._clock() + self._seconds, rows)

    def hear_early(self, request_id: str) -> None:
        """Take up what consumers said before the lease was there."""
        for sender, size in self._early.pop(request_id, {}).items():
            self.consumer_is_done(sender, request_id, size)

    def view(self, request_id: str) -> LeaseView | None:
        """What a job may touch; None where there is no lease yet.

        Raises:
            KeyError: it has ended.
        """
        lease = self._held.get(request_id)
        if lease is not None:
            generation = int(self._table[lease.slot])
            return LeaseView(generation=generation, block_ids=lease.block_ids)
        if request_id in self._ended:
            raise KeyError(request_id)
        return None

    def prolong(self, request_ids: Iterable[str]) -> bool:
        """By a heartbeat; False where no lease is meant."""
        leases = [self._held[name] for name in request_ids if name in self._held]
        more = self._settings.kv_lease_duration * _PROLONGS_BY
        for lease in leases:
            lease.deadline = max(lease.deadline, self._clock() + more)
        return bool(leases)

    def consumer_is_done(self, sender: str, request_id: str, tp_size: int) -> bool:
        """An agent of a consumer of ``tp_size`` ranks reads no more; False where that is absurd."""
        shard = self._local.shard
        large, small = max(tp_size, shard.tp_size), min(tp_size, shard.tp_size)
        if small < 1 or large % small or request_id in self._ended:
            return False
        lease = self._held.get(request_id)
        if lease is None:
            # The step that tells us of the lease may be on its way.
            self._early.setdefault(request_id, {})[sender] = tp_size
            while len(self._early) > _MOST_EARLY:
                self._early.popitem(last=False)
            return True
        lease.done.add(sender)
        topology = TransferTopology(
            tp_rank=shard.rank,
            tp_size=shard.tp_size,
            remote_tp_size=tp_size,
            total_heads=tuple(sorted({h for h in self._local.total_heads.values() if h})),
        )
        if len(lease.done) >= len(topology.consumers()):
            self._release(request_id)
        return True

    def _release(self, request_id: str) -> None:
        """The blocks may go: first make late readers see it."""
        lease = self._held.pop(request_id)
        self._table[lease.slot] += 1
        self._has_ended(request_id)
        self._ended[request_id] = None
        while len(self._ended) > _MOST_EARLY:
            self._ended.popitem(last=False)
        self._reports.sent(request_id)

    def expire(self) -> None:
        """End what nobody has fetched in time."""
        now = self._clock()
        for request_id, lease in list(self._held.items()):
            if now > lease.deadline:
                self._reports.count(expired_leases=1)
                logger.warning(
                    "Nobody fetched the KV of request %s within its lease; its blocks are freed",
                    request_id,
                )
                self._release(request_id)
