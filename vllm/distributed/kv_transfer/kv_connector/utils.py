"""Helpers that connectors call under the names that vLLM gave them; the work is done lower down."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm.distributed.kv_transfer.kv_connector.aggregator import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.topology import TransferTopology
from vllm.v1.kv_cache.pack import permute_received_blocks

__all__ = [
    "KVOutputAggregator",
    "TransferTopology",
    "kv_postprocess_blksize_and_layout_on_receive",
    "kv_postprocess_blksize_on_receive",
    "kv_postprocess_layout_on_receive",
]

Blocks = Sequence[int] | torch.Tensor


def kv_postprocess_blksize_on_receive(
    cache: torch.Tensor, indices: Blocks, block_size_ratio: int, layout: str | None = None
) -> None:
    """Blocks ``indices`` hold ``block_size_ratio`` smaller ones of a peer: join them, in place.

    ``cache`` is ``(B, H, N, C)``; ``layout`` the peer's order in a page (HND, NHD), ours if None.
    """
    permute_received_blocks(cache, indices, block_size_ratio, layout)


def kv_postprocess_layout_on_receive(cache: torch.Tensor, indices: Blocks) -> None:
    """Blocks ``indices`` arrived in the order HND: put them in the cache's own, in place."""
    permute_received_blocks(cache, indices, 1, "HND")


def kv_postprocess_blksize_and_layout_on_receive(
    cache: torch.Tensor, indices: Blocks, block_size_ratio: int
) -> None:
    """Both: smaller blocks of a peer, each in the order HND."""
    permute_received_blocks(cache, indices, block_size_ratio, "HND")
