"""Zeroing and copying whole blocks, by the byte runs of the plan.

Knows no layer and no shape: a block's bytes are its runs. A GPU gets one launch a run for all
blocks; on the CPU plain copies block by block are several times faster than indexing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from vllm.errors import ConfigError
from vllm.v1.kv_cache.config import KVCacheConfig
from vllm.v1.kv_cache.runs import ByteRun, block_runs, fold_axes, merge_runs

__all__ = [
    "KVBlockZeroer",
    "KVCacheBlockCopy",
    "RunZeroer",
    "copy_block_runs",
    "copy_kv_cache_blocks_inplace",
    "run_rows",
    "runs_of_views",
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


def _check_blocks(block_ids: Sequence[int], num_blocks: int) -> None:
    assert all(0 <= block_id < num_blocks for block_id in block_ids), f"no such blocks: {block_ids}"


def _index(block_ids: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(block_ids, dtype=torch.int64, device=like.device)


def _starts(run: ByteRun, block_ids: Sequence[int]) -> list[int]:
    return [run.offset + block_id * run.block_stride for block_id in block_ids]


class RunZeroer:
    """Zeroes blocks of one allocation, given as byte runs."""

    def __init__(self, backing: torch.Tensor, runs: Iterable[ByteRun], num_blocks: int) -> None:
        self._backing = backing
        self._num_blocks = num_blocks
        self._runs = tuple(runs)
        self._rows = [run_rows(backing, run, num_blocks) for run in self._runs]

    def zero_block_ids(self, block_ids: Sequence[int]) -> None:
        """Clear the runs of these blocks."""
        if not block_ids:
            return
        _check_blocks(block_ids, self._num_blocks)
        if self._backing.device.type == "cpu":
            for rows in self._rows:
                for block_id in block_ids:
                    rows[:, block_id].zero_()
            return
        from vllm.v1.kv_cache.triton_movers import zero_box

        for run in self._runs:
            zero_box(
                self._backing,
                _starts(run, block_ids),
                counts=(run.count,),
                strides=(run.step,),
                length=run.length,
            )


class KVBlockZeroer(RunZeroer):
    """Zeroes blocks as they are taken from the pool (``KVCacheConfig.needs_kv_cache_zeroing``):
    every byte that any group may use of them.
    """

    def __init__(self, backing: torch.Tensor, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(backing, block_runs(kv_cache_config), kv_cache_config.num_blocks)


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
    runs = block_runs(kv_cache_config, group_id)
    copy_block_runs(backing, runs, kv_cache_config.num_blocks, copies)


def copy_block_runs(
    backing: torch.Tensor,
    runs: Iterable[ByteRun],
    num_blocks: int,
    copies: Sequence[KVCacheBlockCopy],
) -> None:
    """The same for blocks given as byte runs of one allocation."""
    if not copies:
        return
    sources, targets = [copy.src for copy in copies], [copy.dst for copy in copies]
    assert len(set(targets)) == len(targets), f"a block is copied to twice: {targets}"
    _check_blocks(sources + targets, num_blocks)
    apart = not set(sources) & set(targets)
    for run in runs:
        if apart and backing.is_cuda:
            _copy_run(backing, run, sources, targets)
            continue
        rows = run_rows(backing, run, num_blocks)
        if apart:
            for src, dst in zip(sources, targets, strict=True):
                rows[:, dst].copy_(rows[:, src])
        else:
            gathered = rows.index_select(1, _index(sources, backing))
            rows.index_copy_(1, _index(targets, backing), gathered)


def _copy_run(
    backing: torch.Tensor, run: ByteRun, sources: Sequence[int], targets: Sequence[int]
) -> None:
    from vllm.v1.kv_cache.triton_movers import move_box

    move_box(
        backing,
        backing,
        list(zip(_starts(run, sources), _starts(run, targets), strict=True)),
        counts=(run.count,),
        source_strides=(run.step,),
        target_strides=(run.step,),
        length=run.length,
    )


def runs_of_views(
    views: Iterable[torch.Tensor], num_blocks: int
) -> list[tuple[torch.Tensor, tuple[ByteRun, ...]]]:
    """The bytes of every block that these views show, by allocation: (int8 storage, runs).

    For callers who have tensors only. Strides decide; views that show the same bytes count once.
    dim 0 of each view is the block, or kernel blocks of it.

    Raises:
        ConfigError: dim 0 is not a multiple of ``num_blocks``.
    """
    storages: dict[int, tuple[torch.Tensor, list[ByteRun]]] = {}
    for view in views:
        if view.shape[0] % num_blocks:
            raise ConfigError(
                f"dim 0 of a cache of shape {tuple(view.shape)} is not a multiple of the "
                f"{num_blocks} blocks"
            )
        item = view.dtype.itemsize
        ratio = view.shape[0] // num_blocks
        strides = [stride * item for stride in view.stride()]
        axes = [*zip(view.shape[1:], strides[1:], strict=True), (ratio, strides[0])]
        start = int(view.storage_offset()) * item
        storage = view.untyped_storage()
        raw = view.new_empty(0, dtype=torch.int8).set_(storage)
        runs = fold_axes([start], axes, item, strides[0] * ratio)
        storages.setdefault(storage.data_ptr(), (raw, []))[1].extend(runs)
    return [(raw, merge_runs(runs)) for raw, runs in storages.values()]
