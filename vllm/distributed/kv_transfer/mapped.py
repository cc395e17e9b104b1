"""Copies out of a peer's GPU memory that is mapped here, by a kernel.

The copy engines are no quicker with runs of 2 MiB and three times slower with pages of 64 KiB
(``benchmarks/kv_transfer/peer_copies.py``). Knows addresses and plans; no message, no peer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm.distributed.kv_transfer.plan import UnitBlocks
from vllm.distributed.kv_transfer.staging import Done, TableMovers

__all__ = ["MappedMemory"]


class MappedMemory:
    """What a rank of a peer has, where it can be read here.

    Args:
        movers: of each table of the plan.
        source: address here of its cache.
        target: address of the own cache, on ``device``.
    """

    def __init__(
        self,
        movers: Sequence[TableMovers],
        source: int,
        target: int,
        device: torch.device,
    ) -> None:
        self._movers = movers
        self._source = source
        self._target = target
        self._device = device

    def copy(self, units: Sequence[UnitBlocks]) -> Done:
        """Queue the copies of a request's units on the current stream."""
        for movers, own in zip(self._movers, units, strict=True):
            if len(own):
                movers.copy.move(self._source, self._target, *own.starts)
        return Done(self._device)
