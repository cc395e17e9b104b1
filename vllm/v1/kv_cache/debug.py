"""VLLM_KV_CACHE_DEBUG: proves after every step that each group wrote only its own bytes.

Owns the checks only. The pool is filled with a canary at start; a second copy of it holds what
every byte must be. A step says beforehand which blocks it writes for which group; all other bytes,
paddings and other layers' pages included, must be what they were.

A step costs what it touches: compared are the blocks that it writes, with their paddings, and the
blocks beside them and the null block, where wrong strides, spans and slots lead (as many as fit
into a window); and of the rest of the pool a window that moves on with every step, so that a byte
which changed far away is found later, in a small pool (``WINDOW_BYTES``) at once. Costs the pool's
memory once more.

The canary's bytes are NaN in bf16, fp16, fp32 and fp8: what is read before it is written shows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch

from vllm import envs
from vllm.v1.kv_cache.allocate import AllocatedKVCache
from vllm.v1.kv_cache.blocks import run_rows
from vllm.v1.kv_cache.config import KVCacheConfig
from vllm.v1.kv_cache.runs import (
    ByteRun,
    block_extents,
    block_runs,
    runs_by_layer,
    subtract_runs,
)

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
        """These blocks were zeroed or copied to, and are whole."""

    def expect_outside_writes(self, block_ids: Collection[int]) -> None:
        """A transfer may write all of these blocks, paddings too, until the next call."""

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
        self._on_cpu = self._backing.device.type == "cpu"
        groups = range(len(self._config.kv_cache_groups))
        extents = block_extents(self._config)
        runs = [block_runs(self._config, group) for group in groups]
        self._group_rows = [self._rows(own) for own in runs]
        self._gap_rows = [self._rows(subtract_runs(extents, own)) for own in runs]
        self._any_rows = self._rows(block_runs(self._config))
        self._extent_rows = self._rows(extents)
        self._owner: dict[int, int] = {}
        self._writing: dict[int, list[int]] = {}
        self._window = 0
        self._reported = False
        self._arriving: list[int] = []
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
        self._take_arrived()
        self._check_blocks(self._extent_rows, claimed, "between two steps")
        self._check_window("between two steps")
        self._owner.update(claimed)
        self._writing = {group_id: list(blocks) for group_id, blocks in written_blocks.items()}

    def end_step(self) -> None:
        """Accept what the step was allowed to write, and compare what is round it.

        Raises:
            AssertionError: other bytes changed; names the first, its block, owner and layer.
        """
        written = self._writing
        self._writing = {}
        for group_id, blocks in written.items():
            self._accept(self._group_rows[group_id], blocks)
        self._take_arrived()
        for group_id, blocks in written.items():
            self._check_blocks(self._gap_rows[group_id], blocks, "in the step")
        self._check_blocks(self._extent_rows, self._beside(written.values()), "in the step")
        self._check_window("in the step")

    def accept_blocks(self, block_ids: Sequence[int]) -> None:
        """Take what any group may own of these blocks as it is now."""
        self._accept(self._any_rows, block_ids)

    def restart(self) -> None:
        """Fill the pool with the canary again."""
        self._backing.fill_(CANARY)
        self._expected.fill_(CANARY)
        self._owner = {}
        self._writing = {}
        self._arriving = []

    def expect_outside_writes(self, block_ids: Collection[int]) -> None:
        """A transfer may write all of these blocks, paddings too, until the next call."""
        self._take_arrived()
        self._arriving = sorted(block_ids)

    def _take_arrived(self) -> None:
        if self._arriving:
            self._accept(self._extent_rows, self._arriving)

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

    def _beside(self, written: Iterable[Sequence[int]]) -> list[int]:
        """The null block and blocks beside those written, as many as fit into a window."""
        own = {block for blocks in written for block in blocks}
        near = {block + step for block in own for step in (-1, 1)}
        near &= set(range(1, self._config.num_blocks))
        most = 1 + WINDOW_BYTES // self._config.bytes_per_block
        return [0, *sorted(near - own)[:most]]

    def _accept(self, rows: Rows, block_ids: Sequence[int]) -> None:
        for now, expected in rows:
            if self._on_cpu:
                for block in block_ids:
                    expected[:, block].copy_(now[:, block])
            else:
                ids = self._index(block_ids)
                expected.index_copy_(1, ids, now.index_select(1, ids))

    def _check_blocks(self, rows: Rows, block_ids: Collection[int], when: str) -> None:
        for now, expected in rows:
            self.bytes_compared += len(block_ids) * now[:, 0].nbytes
            if self._on_cpu:
                # Where they lie: gathered, each would be copied first, 30 times as slow.
                same = all(torch.equal(now[:, block], expected[:, block]) for block in block_ids)
            else:
                ids = self._index(block_ids)
                same = torch.equal(now.index_select(1, ids), expected.index_select(1, ids))
            if not same:
                self._report(when)

    def _index(self, block_ids: Iterable[int]) -> torch.Tensor:
        return torch.tensor(sorted(block_ids), dtype=torch.int64, device=self._backing.device)

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
        mine, theirs = (
            pool[start:end].view(torch.int64) for pool in (self._backing, self._expected)
        )
        if not torch.equal(mine, theirs):
            self._report(when)

    def _report(self, when: str) -> None:
        """Raise, unless it was a transfer that wrote while bytes were compared.

        One may be writing now, so its blocks are left out instead of being accepted first.
        """
        arriving = torch.zeros_like(self._backing)
        for rows in (
            run_rows(arriving, run, self._config.num_blocks) for run in block_extents(self._config)
        ):
            for block in self._arriving:
                rows[:, block] = -1
        first, count = -1, 0
        for start in range(0, self._backing.numel(), _REPORT_BYTES):
            part = slice(start, start + _REPORT_BYTES)
            differs = (self._backing[part] != self._expected[part]) & (arriving[part] == 0)
            changed = torch.nonzero(differs)
            if len(changed) and first < 0:
                first = start + int(changed[0])
            count += len(changed)
        if not count:
            return
        self._reported = True
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
