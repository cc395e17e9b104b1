"""VLLM_KV_CACHE_DEBUG: proves after every step that each group wrote only its own bytes.

Owns the checks only. The pool is filled with a canary at start; a second copy of it holds what
every byte must be. A step says beforehand which blocks it writes for which group; all other bytes,
paddings and other layers' pages included, must be what they were.

A step costs what it touches: compared are the blocks that it writes, in all layers and with their
paddings, the blocks beside them and the null block, where wrong strides, spans and slots lead; and
of the rest of the pool a window that moves on with every step, so that a byte which changed far
away is found later, in a small pool (``WINDOW_BYTES``) at once. Costs the pool's memory once more.

The canary's bytes are NaN in bf16, fp16, fp32 and fp8: what is read before it is written shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

import torch

from vllm import envs
from vllm.v1.kv_cache.allocate import AllocatedKVCache
from vllm.v1.kv_cache.blocks import run_rows
from vllm.v1.kv_cache.config import KVCacheConfig
from vllm.v1.kv_cache.runs import ByteRun, block_extents, block_runs, runs_by_layer

__all__ = ["KVCacheDebugger", "NullKVCacheDebugger", "make_kv_cache_debugger"]

CANARY = -1
"""0xFF in every byte."""
WINDOW_BYTES = 2 << 20
"""Bytes of the whole pool that are compared before a step, and as many after it."""
_REPORT_BYTES = 64 << 20

Rows = list[tuple[torch.Tensor, torch.Tensor]]
"""Of each byte run: its words now and as they must be, ``(count, num_blocks, words)``."""


class NullKVCacheDebugger:
    """Debug mode is off."""

    def begin_step(self, written_blocks: Mapping[int, Sequence[int]]) -> None:
        """A step starts that may write these manager blocks, by group id."""

    def end_step(self) -> None:
        """The step is over."""

    def accept_blocks(self, block_ids: Sequence[int]) -> None:
        """These blocks were zeroed, copied to or loaded from outside, and whole."""

    def restart(self) -> None:
        """The pool is as good as new: nobody owns any of it."""

    def check_everything(self) -> None:
        """Compare the whole pool, whatever that costs."""


class KVCacheDebugger(NullKVCacheDebugger):
    """Raises AssertionError at the end of the step that wrote where it must not."""

    def __init__(self, cache: AllocatedKVCache) -> None:
        self._config: KVCacheConfig = cache.config
        self._backing = cache.backing
        self._backing.fill_(CANARY)
        self._expected = self._backing.clone()
        groups = range(len(self._config.kv_cache_groups))
        self._group_rows = [self._rows(block_runs(self._config, group)) for group in groups]
        self._any_rows = self._rows(block_runs(self._config))
        self._extent_rows = self._rows(block_extents(self._config))
        self._owner: dict[int, int] = {}
        self._writing: dict[int, list[int]] = {}
        self._window = 0
        self._reported = False
        self.bytes_compared = 0
        """Since the start."""

    def begin_step(self, written_blocks: Mapping[int, Sequence[int]]) -> None:
        """A step starts that may write these manager blocks, by group id.

        Raises:
            AssertionError: a block is given to two groups, or bytes changed since the last step.
        """
        claimed: dict[int, int] = {}
        for group_id, blocks in written_blocks.items():
            for block in blocks:
                other = claimed.setdefault(block, group_id)
                assert other == group_id, (
                    f"block {block} is written by groups {other} and {group_id} in one step"
                )
        self._check_blocks(claimed, "between two steps")
        self._check_window("between two steps")
        self._owner.update(claimed)
        self._writing = {group_id: list(blocks) for group_id, blocks in written_blocks.items()}

    def end_step(self) -> None:
        """Accept what the step was allowed to write, and compare what is round it.

        Raises:
            AssertionError: other bytes changed; names the first, its block, owner and layer.
        """
        around = {0}
        for group_id, blocks in self._writing.items():
            self._accept(self._group_rows[group_id], blocks)
            around.update(near for block in blocks for near in (block - 1, block, block + 1))
        self._writing = {}
        self._check_blocks(around & set(range(self._config.num_blocks)), "in the step")
        self._check_window("in the step")

    def accept_blocks(self, block_ids: Sequence[int]) -> None:
        """Take what any group may own of these blocks as it is now."""
        self._accept(self._any_rows, block_ids)

    def restart(self) -> None:
        """Fill the pool with the canary again."""
        self._backing.fill_(CANARY)
        self._expected.fill_(CANARY)
        self._owner = {}

    def check_everything(self) -> None:
        """Compare the whole pool, whatever that costs; not again after an error.

        Raises:
            AssertionError: bytes changed that nobody was allowed to write.
        """
        if not self._reported:
            self._compare(0, self._backing.numel(), "by now")

    def _rows(self, runs: Iterable[ByteRun]) -> Rows:
        num_blocks = self._config.num_blocks
        return [
            (run_rows(self._backing, run, num_blocks), run_rows(self._expected, run, num_blocks))
            for run in runs
        ]

    def _index(self, block_ids: Iterable[int]) -> torch.Tensor:
        return torch.tensor(sorted(block_ids), dtype=torch.int64, device=self._backing.device)

    def _accept(self, rows: Rows, block_ids: Sequence[int]) -> None:
        ids = self._index(block_ids)
        for now, expected in rows:
            expected.index_copy_(1, ids, now.index_select(1, ids))

    def _check_blocks(self, block_ids: Iterable[int], when: str) -> None:
        ids = self._index(block_ids)
        for now, expected in self._extent_rows:
            mine, theirs = now.index_select(1, ids), expected.index_select(1, ids)
            self.bytes_compared += mine.nbytes
            if not torch.equal(mine, theirs):
                self._report(when)

    def _check_window(self, when: str) -> None:
        """The next part of the pool."""
        size = self._backing.numel()
        if size > WINDOW_BYTES:
            when = f"in the last {-(-size // (2 * WINDOW_BYTES))} steps"
        end = min(self._window + WINDOW_BYTES, size)
        self._compare(self._window, end, when)
        self._window = end % size

    def _compare(self, start: int, end: int, when: str) -> None:
        self.bytes_compared += end - start
        if not torch.equal(self._backing[start:end], self._expected[start:end]):
            self._report(when)

    def _report(self, when: str) -> NoReturn:
        self._reported = True
        first, count = -1, 0
        for start in range(0, self._backing.numel(), _REPORT_BYTES):
            part = slice(start, start + _REPORT_BYTES)
            changed = torch.nonzero(self._backing[part] != self._expected[part])
            if len(changed) and first < 0:
                first = start + int(changed[0])
            count += len(changed)
        raise AssertionError(
            f"{count} bytes of the KV cache were written {when} by nobody who may: the first at "
            f"byte {first}, {self._describe(first)}"
        )

    def _describe(self, position: int) -> str:
        """Whose byte this is under each group that might own its block."""
        found = []
        for name, runs in runs_by_layer(self._config).items():
            for run in runs:
                for offset in run.offsets():
                    block, inside = divmod(position - offset, run.block_stride)
                    if 0 <= block < self._config.num_blocks and inside < run.length:
                        group = self._config.group_of(name)
                        owner = self._owner.get(block, "nobody")
                        found.append(
                            f"layer {name} of group {group}, block {block} (last written by "
                            f"group {owner})"
                        )
        return "; ".join(found) or "padding of no layer"


def make_kv_cache_debugger(cache: AllocatedKVCache) -> NullKVCacheDebugger:
    """The checker, or the null one unless VLLM_KV_CACHE_DEBUG is set."""
    return KVCacheDebugger(cache) if envs.VLLM_KV_CACHE_DEBUG else NullKVCacheDebugger()
