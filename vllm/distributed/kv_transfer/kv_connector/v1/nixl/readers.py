"""Counts the requests here that fetch the same leased blocks: the owner is told once.

A request for several answers is several requests of the engine with one lease between them. Knows
nothing of transfers.
"""

from __future__ import annotations

from collections import OrderedDict

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import RemoteParams

__all__ = ["Readers"]

_MOST = 1 << 14


class Readers:
    """A lease of which some readers never come is left to its end: its owner does not wait."""

    def __init__(self) -> None:
        self._left: OrderedDict[str, int] = OrderedDict()
        """Readers that are still to end, by the seal of their lease."""

    def is_last(self, params: RemoteParams) -> bool:
        """One reader has ended, well or not; whether no other will come."""
        if params.num_readers == 1:
            return True
        left = self._left.pop(params.remote_seal, params.num_readers) - 1
        if left > 0:
            self._left[params.remote_seal] = left
            while len(self._left) > _MOST:
                self._left.popitem(last=False)
        return left == 0
