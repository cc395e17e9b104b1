"""One manager per cache group: which blocks a request holds, under the rules of one kind of cache.

A request's blocks of a group form its *row*: position ``i`` is the block of tokens
``[i * block_size, (i + 1) * block_size)``, or the null block where that kind of cache needs
nothing there (any more). Rows only grow at their end while a request runs, so that workers can
be told just what was appended.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import islice, repeat
from typing import TYPE_CHECKING, ClassVar

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, cdiv
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

if TYPE_CHECKING:
    from vllm.v1.request import Request

__all__ = [
    "ChunkedLocalAttentionManager",
    "CrossAttentionManager",
    "EncoderOnlyAttentionManager",
    "FullAttentionManager",
    "MambaManager",
    "SingleTypeKVCacheManager",
    "SlidingWindowManager",
    "get_manager_for_kv_cache_spec",
    "register_manager",
]


class SingleTypeKVCacheManager(ABC):
    """The rows of one cache group.

    Subclasses say what a request needs: which leading tokens it no longer reads
    (``get_num_skipped_tokens``), which cached blocks make a hit (``find_longest_cache_hit``).
    """

    hits_are_prefix_closed: ClassVar[bool] = False
    """Every aligned prefix of a hit is a hit too."""
    counts_encoder_tokens: ClassVar[bool] = False
    """Rows are sized by the encoder's tokens, not by the request's."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, block_pool: BlockPool, kv_cache_group_id: int
    ) -> None:
        self.kv_cache_spec = kv_cache_spec
        self.block_pool = block_pool
        self.kv_cache_group_id = kv_cache_group_id
        self.block_size = kv_cache_spec.block_size
        self.enable_caching = block_pool.enable_caching and kv_cache_spec.prefix_cacheable
        self.req_to_blocks: dict[str, list[KVCacheBlock]] = {}
        self.num_cached_block: dict[str, int] = {}
        """Leading positions of each row whose hashing is settled."""
        self._num_removed: dict[str, int] = {}
        """Leading positions of each row whose blocks have been freed."""
        self.new_block_ids: list[int] | None = [] if kv_cache_spec.needs_zeroing else None
        """Blocks taken since the last ``take_new_block_ids``, where they must be zeroed."""
        self.max_blocks_per_token = 1

    # What a kind of cache needs

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Leading tokens that the next token, and all after it, do not read."""
        return 0

    @classmethod
    @abstractmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Sequence[BlockHash],
        max_length: int,
        kv_cache_group_ids: Sequence[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        alignment_tokens: int,
    ) -> tuple[list[KVCacheBlock], ...]:
        """The row of each group for the longest prefix that need not be computed.

        ``block_hashes`` are at the groups' block size; the prefix has at most ``max_length``
        tokens and is a multiple of ``alignment_tokens``. The rows have equal lengths, with the
        null block at positions that will not be read.
        """

    def get_row_length(self, num_tokens: int) -> int:
        """Positions of the row of a request of ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def get_token_capacity(self, row_length: int) -> int:
        """Tokens that a row of ``row_length`` positions takes."""
        return row_length * self.block_size

    def get_peak_blocks(self, num_tokens: int, max_tokens_per_step: int) -> int:
        """Blocks that one request holds at one time, at most, until it has ``num_tokens``."""
        return self.get_row_length(num_tokens)

    # Rows

    def _first_needed(self, num_computed_tokens: int) -> int:
        return self.get_num_skipped_tokens(num_computed_tokens) // self.block_size

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock] = (),
        total_computed_tokens: int = 0,
    ) -> int:
        """Free blocks that ``allocate`` will take, hits that nobody holds included."""
        row = self.req_to_blocks.get(request_id)
        if row is not None:
            return max(0, self.get_row_length(num_tokens) - len(row))
        first = self._first_needed(total_computed_tokens)
        start = max(len(new_computed_blocks), first)
        evictable = sum(
            block.ref_cnt == 0 and not block.is_null
            for block in islice(new_computed_blocks, first, None)
        )
        return evictable + max(0, self.get_row_length(num_tokens) - start)

    def start_row(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
    ) -> None:
        """Begin the row of a new request with its hits, nulls where nothing will be read."""
        assert request_id not in self.req_to_blocks
        null = self.block_pool.null_block
        first = self._first_needed(total_computed_tokens)
        if first == 0:
            row = list(new_computed_blocks)
        else:
            row = [null] * first
            row.extend(islice(new_computed_blocks, first, None))
        self.block_pool.touch(block for block in row if not block.is_null)
        self.req_to_blocks[request_id] = row
        self.num_cached_block[request_id] = min(len(new_computed_blocks), len(row))

    def allocate_new_blocks(self, request_id: str, num_tokens: int) -> list[KVCacheBlock]:
        """Lengthen the row for ``num_tokens`` tokens; returns what was appended."""
        row = self.req_to_blocks[request_id]
        missing = self.get_row_length(num_tokens) - len(row)
        if missing <= 0:
            return []
        return self._append(row, missing)

    def _append(self, row: list[KVCacheBlock], count: int) -> list[KVCacheBlock]:
        blocks = self.block_pool.get_new_blocks(count)
        row += blocks
        if self.new_block_ids is not None:
            self.new_block_ids += [block.block_id for block in blocks]
        return blocks

    def remove_skipped_blocks(self, request_id: str, num_computed_tokens: int) -> None:
        """Free blocks that will not be read again; the row keeps its length."""
        row = self.req_to_blocks.get(request_id)
        if row is None:
            return
        end = min(self._first_needed(num_computed_tokens), len(row))
        start = self._num_removed.get(request_id, 0)
        if end <= start:
            return
        self._num_removed[request_id] = end
        null = self.block_pool.null_block
        removed = [block for block in reversed(row[start:end]) if not block.is_null]
        row[start:end] = [null] * (end - start)
        self.block_pool.free_blocks(removed)

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """Let the blocks that the first ``num_tokens`` tokens fill be found by hash."""
        num_full = num_tokens // self.block_size
        num_cached = self.num_cached_block.get(request.request_id, 0)
        if num_full <= num_cached:
            return
        self.block_pool.cache_full_blocks(
            request,
            self.req_to_blocks[request.request_id],
            num_cached,
            num_full,
            self.block_size,
            self.kv_cache_group_id,
        )
        self.num_cached_block[request.request_id] = num_full

    def publish(self) -> None:
        """Make findable what had to wait for the step that computes it."""

    def uncache_blocks(self, request_id: str, num_tokens: int) -> None:
        """Blocks behind the first ``num_tokens`` tokens were not computed after all."""
        row = self.req_to_blocks.get(request_id)
        if row is None:
            return
        limit = num_tokens // self.block_size
        self.block_pool.evict_blocks(block.block_id for block in islice(row, limit, None))
        self.num_cached_block[request_id] = min(self.num_cached_block[request_id], limit)

    def free(self, request_id: str) -> None:
        """Let go of the row; its end will be evicted first."""
        row = self.req_to_blocks.pop(request_id, None)
        self.num_cached_block.pop(request_id, None)
        self._num_removed.pop(request_id, None)
        if row:
            row.reverse()
            self.block_pool.free_blocks(row)

    def take_new_block_ids(self) -> list[int]:
        if not self.new_block_ids:
            return []
        taken, self.new_block_ids = self.new_block_ids, []
        return taken

    def get_num_common_prefix_blocks(self, running_request_id: str, num_running: int) -> int:
        """Leading blocks that every running request holds."""
        return 0


class FullAttentionManager(SingleTypeKVCacheManager):
    """Every token reads all tokens before it."""

    hits_are_prefix_closed = True

    def remove_skipped_blocks(self, request_id: str, num_computed_tokens: int) -> None:
        """Every block is read to the end."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Sequence[BlockHash],
        max_length: int,
        kv_cache_group_ids: Sequence[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        alignment_tokens: int,
    ) -> tuple[list[KVCacheBlock], ...]:
        block_size = kv_cache_spec.block_size
        rows: list[list[KVCacheBlock]] = []
        limit = max_length // block_size
        for group_id in kv_cache_group_ids:
            find = block_pool.get_group_cache(group_id).get
            row: list[KVCacheBlock] = []
            add = row.append
            for block_hash in islice(block_hashes, limit):
                block = find(block_hash)
                if block is None:
                    break
                add(block)
            rows.append(row)
            limit = len(row)
        aligned = limit * block_size // alignment_tokens * alignment_tokens // block_size
        for row in rows:
            del row[aligned:]
        return tuple(rows)

    def get_num_common_prefix_blocks(self, running_request_id: str, num_running: int) -> int:
        count = 0
        for block in self.req_to_blocks.get(running_request_id, ()):
            if block.ref_cnt != num_running:
                break
            count += 1
        return count


def _find_window_hit(
    block_hashes: Sequence[BlockHash],
    max_length: int,
    kv_cache_group_ids: Sequence[int],
    block_pool: BlockPool,
    block_size: int,
    alignment_tokens: int,
    num_needed: int,
) -> tuple[list[KVCacheBlock], ...]:
    """The longest prefix whose last ``num_needed`` blocks (or all of them) are cached.

    Scans right to left, so that a long prompt whose end is cached costs little.
    """
    null = block_pool.null_block
    limit = min(max_length // block_size, len(block_hashes))
    end = 0
    run: list[list[KVCacheBlock]] = []
    for index in range(limit - 1, -1, -1):
        blocks = block_pool.get_cached_block(block_hashes[index], kv_cache_group_ids)
        if blocks is None:
            run = []
            continue
        if not run:
            if (index + 1) * block_size % alignment_tokens:
                continue
            end = index + 1
        run.append(blocks)
        if len(run) == num_needed:
            break
    if not run:
        return tuple([] for _ in kv_cache_group_ids)
    run.reverse()
    num_null = end - len(run)
    return tuple(
        [null] * num_null + [blocks[i] for blocks in run] for i in range(len(kv_cache_group_ids))
    )


class SlidingWindowManager(SingleTypeKVCacheManager):
    """A token reads itself and the ``sliding_window - 1`` tokens before it."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, block_pool: BlockPool, kv_cache_group_id: int
    ) -> None:
        super().__init__(kv_cache_spec, block_pool, kv_cache_group_id)
        assert isinstance(kv_cache_spec, SlidingWindowSpec)
        self.sliding_window = kv_cache_spec.sliding_window

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return max(0, num_computed_tokens - self.sliding_window + 1)

    def get_peak_blocks(self, num_tokens: int, max_tokens_per_step: int) -> int:
        kept = min(self.sliding_window - 1 + max_tokens_per_step, num_tokens)
        return min(cdiv(kept, self.block_size) + 1, cdiv(num_tokens, self.block_size))

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Sequence[BlockHash],
        max_length: int,
        kv_cache_group_ids: Sequence[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        alignment_tokens: int,
    ) -> tuple[list[KVCacheBlock], ...]:
        assert isinstance(kv_cache_spec, SlidingWindowSpec)
        block_size = kv_cache_spec.block_size
        return _find_window_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            block_size,
            alignment_tokens,
            max(1, cdiv(kv_cache_spec.sliding_window - 1, block_size)),
        )


class ChunkedLocalAttentionManager(SingleTypeKVCacheManager):
    """A token reads the tokens before it that lie in its own chunk."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, block_pool: BlockPool, kv_cache_group_id: int
    ) -> None:
        super().__init__(kv_cache_spec, block_pool, kv_cache_group_id)
        assert isinstance(kv_cache_spec, ChunkedLocalAttentionSpec)
        self.attention_chunk_size = kv_cache_spec.attention_chunk_size

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return num_computed_tokens // self.attention_chunk_size * self.attention_chunk_size

    def get_peak_blocks(self, num_tokens: int, max_tokens_per_step: int) -> int:
        kept = min(self.attention_chunk_size + max_tokens_per_step, num_tokens)
        inside = bool(self.attention_chunk_size % self.block_size)
        return min(cdiv(kept, self.block_size) + inside, cdiv(num_tokens, self.block_size))

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Sequence[BlockHash],
        max_length: int,
        kv_cache_group_ids: Sequence[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        alignment_tokens: int,
    ) -> tuple[list[KVCacheBlock], ...]:
        """Nothing of earlier chunks is read, so a prefix that ends with a chunk always hits."""
        assert isinstance(kv_cache_spec, ChunkedLocalAttentionSpec)
        block_size, null = kv_cache_spec.block_size, block_pool.null_block
        length = min(max_length, len(block_hashes) * block_size)
        while length := length // alignment_tokens * alignment_tokens:
            # A shorter prefix may end in an earlier chunk, which is then read from its start.
            start = kv_cache_spec.num_skipped_tokens(length) // block_size
            rows: tuple[list[KVCacheBlock], ...] = tuple([null] * start for _ in kv_cache_group_ids)
            for index in range(start, length // block_size):
                blocks = block_pool.get_cached_block(block_hashes[index], kv_cache_group_ids)
                if blocks is None:
                    length = index * block_size
                    break
                for row, block in zip(rows, blocks, strict=True):
                    row.append(block)
            else:
                return rows
        return tuple([] for _ in kv_cache_group_ids)


class MambaManager(SingleTypeKVCacheManager):
    """One recurrent state, rewritten by every token.

    Mode "none": ``1 + num_speculative_blocks`` blocks for the whole life of a request, found by
    nobody. Mode "align": the state after the tokens computed so far lies at the position of the
    last of them; a step writes it at the position of *its* last token, and a state left at the
    end of a block can be found again. Mode "all": no block of the row is given back.
    """

    def __init__(
        self, kv_cache_spec: KVCacheSpec, block_pool: BlockPool, kv_cache_group_id: int
    ) -> None:
        super().__init__(kv_cache_spec, block_pool, kv_cache_group_id)
        assert isinstance(kv_cache_spec, MambaSpec)
        self.mode = kv_cache_spec.mamba_cache_mode
        self.num_speculative_blocks = kv_cache_spec.num_speculative_blocks
        self.max_blocks_per_token = 1 + self.num_speculative_blocks
        self._unpublished: list[tuple[Request, int]] = []

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return max(0, num_computed_tokens - 1) if self.mode == "align" else 0

    def get_row_length(self, num_tokens: int) -> int:
        if self.mode == "none":
            return 1 + self.num_speculative_blocks
        return cdiv(num_tokens, self.block_size) + self.num_speculative_blocks

    def get_token_capacity(self, row_length: int) -> int:
        if self.mode == "none":
            return 1 << 62 if row_length else 0
        return max(0, row_length - self.num_speculative_blocks) * self.block_size

    def get_peak_blocks(self, num_tokens: int, max_tokens_per_step: int) -> int:
        if self.mode == "align":
            # The speculative blocks of the chunk before last until the next chunk.
            return min(2, cdiv(num_tokens, self.block_size)) + 2 * self.num_speculative_blocks
        return self.get_row_length(num_tokens)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Sequence[BlockHash],
        max_length: int,
        kv_cache_group_ids: Sequence[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        alignment_tokens: int,
    ) -> tuple[list[KVCacheBlock], ...]:
        if not kv_cache_spec.prefix_cacheable:
            return tuple([] for _ in kv_cache_group_ids)
        return _find_window_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec.block_size,
            alignment_tokens,
            num_needed=1,
        )

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock] = (),
        total_computed_tokens: int = 0,
    ) -> int:
        if self.mode != "align":
            return super().get_num_blocks_to_allocate(
                request_id, num_tokens, new_computed_blocks, total_computed_tokens
            )
        row = self.req_to_blocks.get(request_id)
        if row is not None:
            return self._num_new_states(len(row), num_tokens)
        first = self._first_needed(total_computed_tokens)
        hits = islice(new_computed_blocks, first, None)
        evictable = sum(block.ref_cnt == 0 and not block.is_null for block in hits)
        start = max(len(new_computed_blocks), first)
        return evictable + self._num_new_states(start, num_tokens)

    def _num_new_states(self, row_length: int, num_tokens: int) -> int:
        """Of the positions that the row lacks, only the last ones get a block."""
        missing = self.get_row_length(num_tokens) - row_length
        return max(0, min(missing, 1 + self.num_speculative_blocks))

    def allocate_new_blocks(self, request_id: str, num_tokens: int) -> list[KVCacheBlock]:
        if self.mode != "align":
            return super().allocate_new_blocks(request_id, num_tokens)
        row = self.req_to_blocks[request_id]
        missing = self.get_row_length(num_tokens) - len(row)
        if missing <= 0:
            return []
        num_states = self._num_new_states(len(row), num_tokens)
        nulls = list(repeat(self.block_pool.null_block, missing - num_states))
        row += nulls
        return nulls + self._append(row, num_states)

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """A state is found only after the step that writes it, and only at a block's end.

        Attention may read what another request stores in the same step; a state is read before
        any state of the step is written.
        """
        num_cached = self.num_cached_block.get(request.request_id, 0)
        num_full = num_tokens // self.block_size
        if num_full <= num_cached:
            return
        self.num_cached_block[request.request_id] = num_full
        if self.mode == "all":
            self._unpublished += [(request, index) for index in range(num_cached, num_full)]
        elif num_tokens % self.block_size == 0:
            self._unpublished.append((request, num_full - 1))

    def publish(self) -> None:
        for request, index in self._unpublished:
            self.block_pool.cache_full_blocks(
                request,
                self.req_to_blocks[request.request_id],
                index,
                index + 1,
                self.block_size,
                self.kv_cache_group_id,
            )
        self._unpublished.clear()

    def free(self, request_id: str) -> None:
        self._unpublished = [
            (request, index)
            for request, index in self._unpublished
            if request.request_id != request_id
        ]
        super().free(request_id)


class CrossAttentionManager(SingleTypeKVCacheManager):
    """Reads an encoder's output: sized once, by the encoder's length."""

    counts_encoder_tokens = True

    def get_token_capacity(self, row_length: int) -> int:
        return 1 << 62

    def get_peak_blocks(self, num_tokens: int, max_tokens_per_step: int) -> int:
        return 0

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Sequence[BlockHash],
        max_length: int,
        kv_cache_group_ids: Sequence[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        alignment_tokens: int,
    ) -> tuple[list[KVCacheBlock], ...]:
        return tuple([] for _ in kv_cache_group_ids)

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """An encoder's output has no token hashes."""


class EncoderOnlyAttentionManager(CrossAttentionManager):
    """Keeps nothing."""

    def get_row_length(self, num_tokens: int) -> int:
        return 0


_managers: dict[type[KVCacheSpec], type[SingleTypeKVCacheManager]] = {
    FullAttentionSpec: FullAttentionManager,
    SlidingWindowSpec: SlidingWindowManager,
    ChunkedLocalAttentionSpec: ChunkedLocalAttentionManager,
    MambaSpec: MambaManager,
    CrossAttentionSpec: CrossAttentionManager,
    EncoderOnlyAttentionSpec: EncoderOnlyAttentionManager,
    AttentionSpec: FullAttentionManager,
}


def register_manager(
    spec_cls: type[KVCacheSpec], manager_cls: type[SingleTypeKVCacheManager]
) -> None:
    """Let ``manager_cls`` serve groups of ``spec_cls`` and of its subclasses."""
    _managers[spec_cls] = manager_cls


def get_manager_for_kv_cache_spec(kv_cache_spec: KVCacheSpec) -> type[SingleTypeKVCacheManager]:
    """The manager of the nearest registered class of the spec.

    Raises:
        TypeError: no class of it is registered.
    """
    for spec_cls in type(kv_cache_spec).__mro__:
        if spec_cls in _managers:
            return _managers[spec_cls]
    raise TypeError(
        f"no KV cache manager for {type(kv_cache_spec).__name__}: see register_manager()"
    )
