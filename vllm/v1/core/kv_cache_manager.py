"""The scheduler's one door to the KV cache: hits, blocks for a step, and giving them back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.distributed.kv_events import KVCacheEvent
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import (
    NoPrefixCacheCoordinator,
    get_kv_cache_coordinator,
)
from vllm.v1.core.kv_cache_utils import KVCacheBlock, count_by_id, resolve_hash_block_size
from vllm.v1.kv_cache_interface import KVCacheConfig

if TYPE_CHECKING:
    from vllm.v1.request import Request

__all__ = ["KVCacheBlocks", "KVCacheManager", "PrefixCacheStats"]


@dataclass(slots=True)
class KVCacheBlocks:
    """Blocks of one request: a sequence per cache group."""

    blocks: tuple[Sequence[KVCacheBlock], ...]

    def get_block_ids(self) -> tuple[list[int], ...]:
        return tuple([block.block_id for block in group] for group in self.blocks)

    def get_unhashed_block_ids(self) -> list[int]:
        """Blocks of the only group that nobody can find: where a connector must write.

        Raises:
            AssertionError: there are several groups.
        """
        assert len(self.blocks) == 1, "block ids of several groups have no one order"
        return [
            block.block_id
            for block in self.blocks[0]
            if block.block_hash is None and not block.is_null
        ]

    def is_empty(self) -> bool:
        return not any(self.blocks)


@dataclass(slots=True)
class PrefixCacheStats:
    """Tokens looked up and found since the last time it was taken."""

    requests: int = 0
    queries: int = 0
    hits: int = 0

    def record(self, num_tokens: int, num_hits: int) -> None:
        self.requests += 1
        self.queries += num_tokens
        self.hits += num_hits


class KVCacheManager:
    """Allocates blocks to requests, over all cache groups of one pool.

    Args:
        kv_cache_config: the plan; its ``num_blocks`` includes the null block.
        max_model_len: tokens of one request, at most.
        enable_caching: whether requests may share blocks by hash.
        hash_block_size: tokens that one of a request's ``block_hashes`` covers; None for the
            plan's.
        enable_kv_cache_events: whether ``take_events`` has something to tell.
        max_tokens_per_step: tokens that one step may add to a request, at most.
    """

    def __init__(
        self,
        kv_cache_config: KVCacheConfig,
        max_model_len: int,
        enable_caching: bool = True,
        hash_block_size: int | None = None,
        enable_kv_cache_events: bool = False,
        max_tokens_per_step: int | None = None,
    ) -> None:
        self.kv_cache_config = kv_cache_config
        self.max_model_len = max_model_len
        self.max_tokens_per_step = max_tokens_per_step or max_model_len
        self.num_kv_cache_groups = len(kv_cache_config.kv_cache_groups)
        self.block_pool = BlockPool(
            kv_cache_config.num_blocks,
            enable_caching,
            hash_block_size or resolve_hash_block_size(kv_cache_config, default=16),
            enable_kv_cache_events,
        )
        self.coordinator = get_kv_cache_coordinator(kv_cache_config, self.block_pool)
        self.managers = self.coordinator.managers
        self.enable_caching = not isinstance(self.coordinator, NoPrefixCacheCoordinator)
        self.empty_kv_cache_blocks = KVCacheBlocks(tuple(() for _ in self.managers))
        self.prefix_cache_stats = PrefixCacheStats()
        self.max_blocks_per_token = sum(manager.max_blocks_per_token for manager in self.managers)
        """Blocks that one more token of a running request may take."""
        # A block that held states, or another dtype, holds NaNs as K and V: zero those too.
        self._zeroes_blocks = kv_cache_config.needs_kv_cache_zeroing
        for manager in self.managers if self._zeroes_blocks else ():
            manager.new_block_ids = []

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return self.block_pool.get_usage()

    # Sizes

    def get_peak_blocks(self, num_tokens: int) -> int:
        """Blocks that one request needs at one time, at most, to get to ``num_tokens``."""
        return sum(m.get_peak_blocks(num_tokens, self.max_tokens_per_step) for m in self.managers)

    def get_max_request_tokens(self) -> int:
        """The longest request, up to ``max_model_len``, that the pool can serve alone."""
        usable = self.block_pool.num_usable_blocks
        fits, too_long = 0, self.max_model_len + 1
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.get_peak_blocks(middle) <= usable:
                fits = middle
            else:
                too_long = middle
        return fits

    # Hits

    def get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int]:
        """The blocks of the longest cached prefix of ``request``, and its tokens.

        Nothing is held yet. At least one token is left to compute, for its logits.
        """
        if not self.enable_caching or request.skip_reading_prefix_cache:
            return self.empty_kv_cache_blocks, 0
        rows, num_tokens = self.coordinator.find_longest_cache_hit(
            request.block_hashes, request.num_tokens - 1
        )
        if num_tokens == 0:
            return self.empty_kv_cache_blocks, 0
        return KVCacheBlocks(rows), num_tokens

    # Allocation

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_lookahead_tokens: int = 0,
        num_external_computed_tokens: int = 0,
        delay_cache_blocks: bool = False,
        num_encoder_tokens: int | None = None,
        num_reserved_blocks: int = 0,
    ) -> KVCacheBlocks | None:
        """Make room for the next ``num_new_tokens`` tokens of ``request``.

        The row of a request is laid out as

            num_computed_tokens | new_computed | external | num_new_tokens | lookahead

        where ``new_computed_blocks`` hold the second part and a connector fills the third.

        Args:
            delay_cache_blocks: the blocks' content will arrive later; nobody may find them yet.
            num_encoder_tokens: the size of a cross-attention cache; None for the request's.
            num_reserved_blocks: blocks that must be left free.

        Returns:
            The blocks added to the end of each group's row, or None, with nothing taken, where
            too few are free.
        """
        request_id = request.request_id
        total_computed = (
            request.num_computed_tokens + num_new_computed_tokens + num_external_computed_tokens
        )
        num_computed_or_new = total_computed + num_new_tokens
        # A prompt that arrives whole leaves its last token to be computed, which looks back too.
        looks_from = total_computed
        if delay_cache_blocks:
            looks_from = min(total_computed, request.num_tokens - 1)
        num_tokens = min(num_computed_or_new + num_lookahead_tokens, self.max_model_len)
        hits = (new_computed_blocks or self.empty_kv_cache_blocks).blocks
        if num_encoder_tokens is None:
            num_encoder_tokens = request.num_encoder_tokens
        num_needed = 0
        for manager, row in zip(self.managers, hits, strict=True):
            manager.remove_skipped_blocks(request_id, looks_from)
            length = num_encoder_tokens if manager.counts_encoder_tokens else num_tokens
            num_needed += manager.get_num_blocks_to_allocate(request_id, length, row, looks_from)
        if num_needed > self.block_pool.get_num_free_blocks() - num_reserved_blocks:
            return None

        # Every group's hits are held before any group takes blocks that might be among them.
        for manager, row in zip(self.managers, hits, strict=True):
            if request_id not in manager.req_to_blocks:
                manager.start_row(request_id, row, looks_from)
        new_blocks = []
        capacity = 1 << 62
        for manager in self.managers:
            length = num_encoder_tokens if manager.counts_encoder_tokens else num_tokens
            new_blocks.append(manager.allocate_new_blocks(request_id, length))
            row_length = len(manager.req_to_blocks[request_id])
            capacity = min(capacity, manager.get_token_capacity(row_length))
        request.kv_capacity = capacity
        if self.enable_caching and not delay_cache_blocks:
            self.cache_blocks(request, min(num_computed_or_new, request.num_tokens))
        return KVCacheBlocks(tuple(new_blocks))

    def allocate_next_token(self, request: Request) -> tuple[list[int], ...]:
        """As ``allocate_slots`` for one token of a running request, where enough blocks are free.

        Returns:
            The ids of the blocks added to each group's row.
        """
        request_id, num_computed = request.request_id, request.num_computed_tokens
        num_tokens = min(num_computed + 1, self.max_model_len)
        ids = []
        capacity = 1 << 62
        for manager in self.managers:
            manager.remove_skipped_blocks(request_id, num_computed)
            length = request.num_encoder_tokens if manager.counts_encoder_tokens else num_tokens
            blocks = manager.allocate_new_blocks(request_id, length)
            ids.append([block.block_id for block in blocks])
            row_length = len(manager.req_to_blocks[request_id])
            capacity = min(capacity, manager.get_token_capacity(row_length))
        request.kv_capacity = capacity
        if self.enable_caching:
            self.cache_blocks(request, min(num_computed + 1, request.num_tokens))
        return tuple(ids)

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Let the full blocks of the first ``num_computed_tokens`` tokens be found."""
        if self.enable_caching:
            for manager in self.managers:
                manager.cache_blocks(request, num_computed_tokens)

    def publish_blocks(self) -> None:
        """A step has been handed to the workers: what had to wait for it can be found now."""
        for manager in self.managers:
            manager.publish()

    def uncache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Tokens behind the first ``num_computed_tokens`` were not computed after all."""
        for manager in self.managers:
            manager.uncache_blocks(request.request_id, num_computed_tokens)

    def remove_skipped_blocks(self, request_id: str, num_computed_tokens: int) -> None:
        for manager in self.managers:
            manager.remove_skipped_blocks(request_id, num_computed_tokens)

    def free(self, request: Request) -> None:
        """Let go of all blocks of ``request``; unknown requests are fine."""
        request.kv_capacity = 0
        for manager in self.managers:
            manager.free(request.request_id)

    def set_aside(self, request_id: str, name: str) -> None:
        """The blocks of ``request_id`` belong to ``name`` from now on, who only holds them."""
        for manager in self.managers:
            row = manager.req_to_blocks.get(request_id)
            if row is not None:
                assert name not in manager.req_to_blocks
                manager.req_to_blocks[name] = list(row)
                manager.req_to_blocks[request_id] = []
                manager.free(request_id)

    def free_row(self, name: str) -> None:
        """Let go of blocks that were set aside."""
        for manager in self.managers:
            manager.free(name)

    def evict_blocks(self, block_ids: Iterable[int]) -> None:
        """Make blocks with bad content unfindable."""
        self.block_pool.evict_blocks(block_ids)

    def take_new_block_ids_to_zero(self) -> tuple[list[int], ...] | None:
        """Per group, blocks taken since the last call that must be zeroed; None where none."""
        if not self._zeroes_blocks:
            return None
        ids = tuple(manager.take_new_block_ids() for manager in self.managers)
        return ids if any(ids) else None

    # Questions

    def get_blocks(self, request_id: str) -> KVCacheBlocks:
        return KVCacheBlocks(tuple(m.req_to_blocks.get(request_id, ()) for m in self.managers))

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        """The request's row in each group, as block ids; 0 is the null block."""
        return self.get_blocks(request_id).get_block_ids()

    def create_kv_cache_blocks(self, blocks: tuple[Sequence[KVCacheBlock], ...]) -> KVCacheBlocks:
        return KVCacheBlocks(blocks) if any(blocks) else self.empty_kv_cache_blocks

    def get_num_common_prefix_blocks(
        self, running_request_id: str, num_running: int | None = None
    ) -> list[int]:
        """Per group, leading blocks that all ``num_running`` requests with blocks share."""
        return [
            manager.get_num_common_prefix_blocks(
                running_request_id,
                len(manager.req_to_blocks) if num_running is None else num_running,
            )
            for manager in self.managers
        ]

    def make_prefix_cache_stats(self) -> PrefixCacheStats:
        """What was recorded since the last call."""
        stats, self.prefix_cache_stats = self.prefix_cache_stats, PrefixCacheStats()
        return stats

    def reset_prefix_cache(self) -> bool:
        """Forget all hashes; False, and nothing done, while any block is in use."""
        return self.block_pool.reset_prefix_cache()

    def take_events(self) -> list[KVCacheEvent]:
        return self.block_pool.take_events()

    def check_integrity(self) -> None:
        """Check the pool, and that block tables and reference counts agree. O(blocks).

        Raises:
            AssertionError: naming the block and what is wrong with it.
        """
        group_of: dict[int, int] = {}
        for manager in self.managers:
            for request_id, row in manager.req_to_blocks.items():
                cached = manager.num_cached_block.get(request_id, 0)
                assert cached <= len(row) or not manager.enable_caching, (
                    f"request {request_id} has {cached} cached blocks of {len(row)}"
                )
                for block in row:
                    owner = group_of.setdefault(block.block_id, manager.kv_cache_group_id)
                    assert block.is_null or owner == manager.kv_cache_group_id, (
                        f"{block} is used by groups {owner} and {manager.kv_cache_group_id}"
                    )
                    assert block.block_hash is None or block.group_id == owner, (
                        f"{block} is hashed for group {block.group_id} and used by {owner}"
                    )
        self.block_pool.check_integrity(
            count_by_id(row for m in self.managers for row in m.req_to_blocks.values())
        )
