"""VLLM_KV_CACHE_DEBUG: proves after every step that each group wrote only its own bytes.

Owns the checks only. The pool is filled with a canary at start; a second copy of it holds what
every byte must be. A step says beforehand which blocks it writes for which group; afterwards all
other bytes, paddings and other layers' pages included, must be what they were. Costs the pool's
memory once more and a comparison a step: for tests and small pools.

The canary's bytes are NaN in bf16, fp16, fp32 and fp8: what is read before it is written shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from vllm import envs
from vllm.v1.kv_cache.allocate import AllocatedKVCache
from vllm.v1.kv_cache.blocks import run_rows
from vllm.v1.kv_cache.config import KVCacheConfig
from vllm.v1.kv_cache.runs import ByteRun, block_runs, runs_by_layer

__all__ = ["KVCacheDebugger", "NullKVCacheDebugger", "make_kv_cache_debugger"]

CANARY = -1
"""0xFF in every byte."""


class NullKVCacheDebugger:
    """Debug mode is off."""

    def begin_step(self, written_blocks: Mapping[int, Sequence[int]]) -> None:
        """A step starts that may write these manager blocks, by group id."""

    def end_step(self) -> None:
        """The step is over."""

    def accept_blocks(self, block_ids: Sequence[int]) -> None:
        """These blocks were zeroed, copied to or loaded from outside, and whole."""


class KVCacheDebugger(NullKVCacheDebugger):
    """Raises AssertionError at the end of the step that wrote where it must not."""

    def __init__(self, cache: AllocatedKVCache) -> None:
        self._config: KVCacheConfig = cache.config
        self._backing = cache.backing
        self._backing.fill_(CANARY)
        self._expected = self._backing.clone()
        self._runs = [
            block_runs(self._config, group_id)
            for group_id in range(len(self._config.kv_cache_groups))
        ]
        self._owner: dict[int, int] = {}
        self._writing: dict[int, list[int]] = {}

    def begin_step(self, written_blocks: Mapping[int, Sequence[int]]) -> None:
        """A step starts that may write these manager blocks, by group id.

        Raises:
            AssertionError: a block is given to two groups, or bytes changed since the last step.
        """
        self._check("between two steps")
        claimed: dict[int, int] = {}
        for group_id, blocks in written_blocks.items():
            for block in blocks:
                other = claimed.setdefault(block, group_id)
                assert other == group_id, (
                    f"block {block} is written by groups {other} and {group_id} in one step"
                )
        self._owner.update(claimed)
        self._writing = {group_id: list(blocks) for group_id, blocks in written_blocks.items()}

    def end_step(self) -> None:
        """Accept what the step was allowed to write, and compare everything else.

        Raises:
            AssertionError: other bytes changed; names the first, its block, owner and layer.
        """
        for group_id, blocks in self._writing.items():
            self._accept(self._runs[group_id], blocks)
        self._writing = {}
        self._check("in the step")

    def accept_blocks(self, block_ids: Sequence[int]) -> None:
        """Take what any group may own of these blocks as it is now."""
        self._accept(block_runs(self._config), block_ids)

    def _accept(self, runs: Iterable[ByteRun], block_ids: Sequence[int]) -> None:
        ids = torch.tensor(block_ids, dtype=torch.int64, device=self._backing.device)
        for run in runs:
            now = run_rows(self._backing, run, self._config.num_blocks)
            expected = run_rows(self._expected, run, self._config.num_blocks)
            expected.index_copy_(1, ids, now.index_select(1, ids))

    def _check(self, when: str) -> None:
        if torch.equal(self._backing, self._expected):
            return
        changed = torch.nonzero(self._backing != self._expected)
        first = int(changed[0])
        raise AssertionError(
            f"{len(changed)} bytes of the KV cache were written {when} by nobody who may: the "
            f"first at byte {first}, {self._describe(first)}"
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
