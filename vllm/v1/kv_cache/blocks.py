"""Zeroing and copying whole blocks, by the byte runs of the plan.

Knows no layer and no shape: a block's bytes are its runs, on every device one operation a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from vllm.v1.kv_cache.config import KVCacheConfig
from vllm.v1.kv_cache.runs import ByteRun, block_runs

__all__ = [
    "KVBlockZeroer",
    "KVCacheBlockCopy",
    "copy_kv_cache_blocks_inplace",
    "run_rows",
]

_WORD_DTYPES = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.int8))


class KVCacheBlockCopy(NamedTuple):
    """Copy the content of block ``src`` into block ``dst``."""

    src: int
    dst: int


def run_rows(backing: torch.Tensor, run: ByteRun, num_blocks: int) -> torch.Tensor:
    """View of a run as ``(count, num_blocks, length)``, in the widest words that it divides into.

    ``backing`` is the 1-D int8 allocation.
    """
    numbers = (backing.data_ptr(), run.offset, run.length, run.block_stride, run.step)
    alignment = math.gcd(*numbers)
    width, dtype = next(pair for pair in _WORD_DTYPES if alignment % pair[0] == 0)
    words = backing.new_empty(0, dtype=dtype).set_(backing.untyped_storage())
    start = (int(backing.storage_offset()) + run.offset) // width
    return words.as_strided(
        (run.count, num_blocks, run.length // width),
        (run.step // width, run.block_stride // width, 1),
        start,
    )


def _block_index(block_ids: Iterable[int], num_blocks: int, device: torch.device) -> torch.Tensor:
    ids = list(block_ids)
    assert all(0 <= block_id < num_blocks for block_id in ids), f"no such blocks: {ids}"
    return torch.tensor(ids, dtype=torch.int64, device=device)


class KVBlockZeroer:
    """Zeroes blocks as they are taken from the pool (``KVCacheConfig.needs_kv_cache_zeroing``)."""

    def __init__(self, backing: torch.Tensor, kv_cache_config: KVCacheConfig) -> None:
        self._backing = backing
        self._num_blocks = kv_cache_config.num_blocks
        self._rows = [
            run_rows(backing, run, kv_cache_config.num_blocks)
            for run in block_runs(kv_cache_config)
        ]

    def zero_block_ids(self, block_ids: Sequence[int]) -> None:
        """Clear every byte that any group may use of these blocks."""
        if not block_ids:
            return
        ids = _block_index(block_ids, self._num_blocks, self._backing.device)
        for rows in self._rows:
            rows.index_fill_(1, ids, 0)


def copy_kv_cache_blocks_inplace(
    backing: torch.Tensor,
    kv_cache_config: KVCacheConfig,
    copies: Sequence[KVCacheBlockCopy],
    group_id: int | None = None,
) -> None:
    """Copy whole blocks; all sources are read before any destination is written.

    Args:
        backing: the 1-D int8 allocation.
        group_id: the owner of the blocks; None copies what any group may use of them.
    """
    if not copies:
        return
    targets = [copy.dst for copy in copies]
    assert len(set(targets)) == len(targets), f"a block is copied to twice: {targets}"
    num_blocks = kv_cache_config.num_blocks
    sources = _block_index((copy.src for copy in copies), num_blocks, backing.device)
    destinations = _block_index(targets, num_blocks, backing.device)
    for run in block_runs(kv_cache_config, group_id):
        rows = run_rows(backing, run, num_blocks)
        rows.index_copy_(1, destinations, rows.index_select(1, sources))
