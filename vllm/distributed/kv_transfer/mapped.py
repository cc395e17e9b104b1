"""Copies out of a peer's GPU memory that is mapped here, by a kernel.

The copy engines are no quicker with runs of 2 MiB and three times slower with pages of 64 KiB
(``benchmarks/kv_transfer/peer_copies.py``). Knows addresses and plans; no message, no peer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm.distributed.kv_transfer.plan import TransferPlan, UnitBlocks
from vllm.distributed.kv_transfer.staging import Done, TableMovers

__all__ = ["MappedMemory"]


class MappedMemory:
    """What a rank of a peer has, where it can be read here.

    Args:
        source: address here of its cache.
        target: address of the own cache, on ``device``.
    """

    def __init__(
        self,
        plan: TransferPlan,
        movers: Sequence[TableMovers],
        source: int,
        target: int,
        device: torch.device,
    ) -> None:
        self._plan = plan
        self._movers = movers
        self._source = source
        self._target = target
        self._device = device

    def copy(self, units: Sequence[UnitBlocks]) -> Done:
        """Queue the copies of a request's units on the current stream."""
        for movers, table, own in zip(self._movers, self._plan.tables, units, strict=True):
            if not len(own):
                continue
            movers.copy.move(
                self._source,
                self._target,
                table.starts("source", own.source_blocks, own.source_parts),
                table.starts("target", own.target_blocks, own.target_parts),
            )
        return Done(self._device)
