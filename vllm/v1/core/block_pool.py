"""The pool of KV cache blocks: who is free, who holds what, and what can be found by hash.

Knows block ids and hashes, not bytes; the same pool serves every cache group. A block whose
last holder lets go keeps its content and stays findable until it is taken for something else,
least recently used first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NoReturn

from vllm.distributed.kv_events import (
    MEDIUM_GPU,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
)
from vllm.errors import CapacityError
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    FreeKVCacheBlockQueue,
    KVCacheBlock,
    first_block_extra_keys,
    group_block_hashes,
)

if TYPE_CHECKING:
    from vllm.v1.request import Request

__all__ = ["BlockPool"]


class BlockPool:
    """``num_gpu_blocks`` blocks, ids from 0; block 0 is the null block and never given out.

    Args:
        num_gpu_blocks: size of the pool, the null block included; at least 1.
        enable_caching: whether blocks can be found by hash.
        hash_block_size: tokens that one of a request's ``block_hashes`` covers.
        enable_kv_cache_events: whether to collect events for ``take_events``.

    The prefix cache holds one block per (hash, group). A second block of the same content is
    left out of it: whoever holds it keeps it, but nobody else will find it.
    """

    def __init__(
        self,
        num_gpu_blocks: int,
        enable_caching: bool,
        hash_block_size: int = 16,
        enable_kv_cache_events: bool = False,
    ) -> None:
        assert num_gpu_blocks >= 1
        self.num_gpu_blocks = num_gpu_blocks
        self.enable_caching = enable_caching
        self.hash_block_size = hash_block_size
        self.enable_kv_cache_events = enable_kv_cache_events
        self.blocks = [KVCacheBlock(block_id) for block_id in range(num_gpu_blocks)]
        self.null_block = self.blocks[0]
        self.null_block.is_null = True
        self.free_block_queue = FreeKVCacheBlockQueue(self.blocks[1:])
        # One map per cache group, by hash.
        self.cached_blocks: dict[int, dict[BlockHash, KVCacheBlock]] = {}
        self._events: list[KVCacheEvent] = []

    # Counting

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that can be given out at all: all but the null block."""
        return self.num_gpu_blocks - 1

    def get_num_free_blocks(self) -> int:
        return self.free_block_queue.num_free_blocks

    def get_usage(self) -> float:
        """Share of the blocks that somebody holds, 0 to 1."""
        if self.num_gpu_blocks == 1:
            return 0.0
        return 1.0 - self.free_block_queue.num_free_blocks / (self.num_gpu_blocks - 1)

    # The prefix cache

    def get_group_cache(self, kv_cache_group_id: int) -> dict[BlockHash, KVCacheBlock]:
        """The findable blocks of one group by hash. Read-only for callers."""
        cache = self.cached_blocks.get(kv_cache_group_id)
        if cache is None:
            cache = self.cached_blocks[kv_cache_group_id] = {}
        return cache

    def get_cached_block(
        self, block_hash: BlockHash, kv_cache_group_ids: Sequence[int]
    ) -> list[KVCacheBlock] | None:
        """The block of each group under ``block_hash``; None unless every group has one."""
        found = []
        for group_id in kv_cache_group_ids:
            block = self.get_group_cache(group_id).get(block_hash)
            if block is None:
                return None
            found.append(block)
        return found

    def cache_full_blocks(
        self,
        request: Request,
        blocks: list[KVCacheBlock],
        num_cached_blocks: int,
        num_full_blocks: int,
        block_size: int,
        kv_cache_group_id: int,
    ) -> None:
        """Let ``blocks[num_cached_blocks:num_full_blocks]`` of ``request`` be found by hash.

        Null blocks, and blocks whose hash another block is already known under, are passed
        over. ``block_size`` is the group's, a multiple of ``hash_block_size``.
        """
        if num_cached_blocks >= num_full_blocks:
            return
        hashes = group_block_hashes(request.block_hashes, block_size // self.hash_block_size)
        assert len(hashes) >= num_full_blocks, f"{request} has {len(hashes)} block hashes"
        cache = self.get_group_cache(kv_cache_group_id)
        stored: list[int] = []
        for index in range(num_cached_blocks, num_full_blocks):
            block = blocks[index]
            if block.is_null or block.block_hash is not None:
                continue
            block_hash = hashes[index]
            if cache.setdefault(block_hash, block) is block:
                block.block_hash = block_hash
                block.group_id = kv_cache_group_id
                stored.append(index)
        if self.enable_kv_cache_events:
            self._record_stored(request, hashes, stored, block_size, kv_cache_group_id)

    def _record_stored(
        self,
        request: Request,
        hashes: list[BlockHash],
        stored: list[int],
        block_size: int,
        kv_cache_group_id: int,
    ) -> None:
        """One event per run of consecutive blocks in ``stored`` (indices, ascending)."""
        runs: list[list[int]] = []
        for index in stored:
            if runs and runs[-1][-1] == index - 1:
                runs[-1].append(index)
            else:
                runs.append([index])
        for run in runs:
            first, end = run[0], run[-1] + 1
            extra_keys = [first_block_extra_keys(request) if i == 0 else None for i in run]
            self._events.append(
                BlockStored(
                    block_hashes=list(hashes[first:end]),
                    parent_block_hash=hashes[first - 1] if first else None,
                    token_ids=request.all_token_ids[first * block_size : end * block_size],
                    block_size=block_size,
                    medium=MEDIUM_GPU,
                    extra_keys=extra_keys if any(extra_keys) else None,
                    group_idx=kv_cache_group_id,
                )
            )

    def _forget(self, block: KVCacheBlock) -> None:
        """Take a findable block out of the prefix cache."""
        block_hash = block.block_hash
        assert block_hash is not None
        del self.cached_blocks[block.group_id][block_hash]
        block.block_hash = None
        if self.enable_kv_cache_events:
            self._events.append(
                BlockRemoved([block_hash], medium=MEDIUM_GPU, group_idx=block.group_id)
            )

    def evict_blocks(self, block_ids: Iterable[int]) -> None:
        """Make these blocks unfindable, whoever holds them; their content is bad."""
        for block_id in block_ids:
            block = self.blocks[block_id]
            if block.block_hash is not None:
                self._forget(block)

    def reset_prefix_cache(self) -> bool:
        """Forget every hash. Refused, with False, while any block is held."""
        if self.free_block_queue.num_free_blocks != self.num_usable_blocks:
            return False
        for cache in self.cached_blocks.values():
            for block in cache.values():
                block.block_hash = None
            cache.clear()
        if self.enable_kv_cache_events:
            self._events.append(AllBlocksCleared())
        return True

    def take_events(self) -> list[KVCacheEvent]:
        events, self._events = self._events, []
        return events

    # Taking and giving back

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Take ``num_blocks`` for one holder; what they held before can't be found any more.

        Raises:
            CapacityError: fewer are free.
        """
        if num_blocks > self.free_block_queue.num_free_blocks:
            raise CapacityError(
                f"{num_blocks} KV cache blocks asked for, "
                f"{self.free_block_queue.num_free_blocks} of {self.num_usable_blocks} are free"
            )
        blocks = self.free_block_queue.popleft_n(num_blocks)
        for block in blocks:
            if block.block_hash is not None:
                self._forget(block)
            block.ref_cnt = 1
        return blocks

    def touch(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Hold found blocks once more, taking those that nobody holds out of the free queue."""
        remove = self.free_block_queue.remove
        for block in blocks:
            if block.ref_cnt == 0 and not block.is_null:
                remove(block)
            block.ref_cnt += 1

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        """Let go of blocks; of those nobody else holds, the first will be evicted first.

        Blocks that can't be found go to the front of the queue: taking them costs no hit.
        """
        findable: list[KVCacheBlock] = []
        worthless: list[KVCacheBlock] = []
        for block in ordered_blocks:
            block.ref_cnt -= 1
            if block.ref_cnt == 0 and not block.is_null:
                (worthless if block.block_hash is None else findable).append(block)
        if findable:
            self.free_block_queue.append_n(findable)
        if worthless:
            self.free_block_queue.prepend_n(worthless)

    # Checking

    def check_integrity(self, held: dict[int, int] | None = None) -> None:
        """Check every invariant of the pool. O(blocks).

        Args:
            held: how often each block id is in a block table, where the caller knows it.

        Raises:
            AssertionError: naming the block and what is wrong with it.
        """
        if [block.block_id for block in self.blocks] != list(range(self.num_gpu_blocks)):
            _fail("block ids are not 0..n-1")
        null = self.null_block
        if null is not self.blocks[0] or not null.is_null or null.block_hash is not None:
            _fail(f"{null} is not a proper null block")
        free = {block.block_id for block in self.free_block_queue.get_all_free_blocks()}
        if len(free) != self.free_block_queue.num_free_blocks or 0 in free:
            _fail("a block is free twice, or the null block is free")
        num_hashed = 0
        for block in self.blocks[1:]:
            if block.is_null:
                _fail(f"{block} claims to be the null block")
            if block.ref_cnt < 0:
                _fail(f"{block} was freed more often than it was held")
            if (block.block_id in free) != (block.ref_cnt == 0):
                _fail(f"{block} is {'' if block.block_id in free else 'not '}in the free queue")
            if block.block_hash is not None:
                num_hashed += 1
                known = self.cached_blocks.get(block.group_id, {}).get(block.block_hash)
                if known is not block:
                    _fail(f"{block} has a hash under which {known} is found")
            if held is not None and block.ref_cnt != held.get(block.block_id, 0):
                _fail(f"{block} is in {held.get(block.block_id, 0)} block tables")
        num_found = sum(len(cache) for cache in self.cached_blocks.values())
        if num_found != num_hashed:
            _fail(f"{num_found} hashes lead to {num_hashed} blocks")


def _fail(problem: str) -> NoReturn:
    raise AssertionError(f"KV cache block pool: {problem}")
