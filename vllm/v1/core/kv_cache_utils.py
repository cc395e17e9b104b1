"""Blocks, the queue of free ones, and the hashes that name their content.

Owns no pool and no policy; the bookkeeping of who holds a block is the block pool's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.utils.hashing import HashAlgorithm, get_hash_algorithm

if TYPE_CHECKING:
    from vllm.config import CacheConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

__all__ = [
    "BlockHash",
    "BlockHasher",
    "FreeKVCacheBlockQueue",
    "KVCacheBlock",
    "cdiv",
    "first_block_extra_keys",
    "get_request_block_hasher",
    "group_block_hashes",
    "make_block_hasher",
    "resolve_hash_block_size",
]

BlockHash = bytes
"""Digest of a block's tokens and of everything before them."""


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


class KVCacheBlock:
    """One block of the pool.

    ``ref_cnt`` counts the block tables that it is in; at 0 it lies in the free queue, where it
    keeps its content until it is taken. ``block_hash`` is set while the prefix cache can find
    the block, under ``group_id``. The null block (id 0) stands for positions without a block.
    """

    __slots__ = (
        "block_hash",
        "block_id",
        "group_id",
        "is_null",
        "next_free_block",
        "prev_free_block",
        "ref_cnt",
    )

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_cnt = 0
        self.block_hash: BlockHash | None = None
        self.group_id = -1
        self.is_null = False
        self.prev_free_block: KVCacheBlock | None = None
        self.next_free_block: KVCacheBlock | None = None

    def __repr__(self) -> str:
        hash_text = self.block_hash.hex()[:8] if self.block_hash is not None else None
        return f"KVCacheBlock({self.block_id}, ref_cnt={self.ref_cnt}, hash={hash_text})"


class FreeKVCacheBlockQueue:
    """Free blocks in the order they will be taken: a doubly linked list through the blocks.

    Every operation is O(1) a block, removal from the middle included, and allocates nothing.
    """

    __slots__ = ("_head", "_tail", "num_free_blocks")

    def __init__(self, blocks: Sequence[KVCacheBlock]) -> None:
        self._head = KVCacheBlock(-1)
        self._tail = KVCacheBlock(-1)
        self._head.next_free_block = self._tail
        self._tail.prev_free_block = self._head
        self.num_free_blocks = 0
        self.append_n(blocks)

    def popleft(self) -> KVCacheBlock:
        """Take the first block.

        Raises:
            ValueError: there is none.
        """
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        """Take the first ``n`` blocks.

        Raises:
            ValueError: there are fewer.
        """
        if n > self.num_free_blocks:
            raise ValueError(f"{n} blocks asked for, {self.num_free_blocks} are free")
        taken: list[KVCacheBlock] = []
        add = taken.append
        block: Any = self._head.next_free_block
        for _ in range(n):
            add(block)
            following = block.next_free_block
            block.prev_free_block = block.next_free_block = None
            block = following
        self._head.next_free_block = block
        block.prev_free_block = self._head
        self.num_free_blocks -= n
        return taken

    def remove(self, block: KVCacheBlock) -> None:
        """Take ``block`` out, wherever it lies."""
        before, after = block.prev_free_block, block.next_free_block
        assert before is not None and after is not None, f"{block} is not in the free queue"
        before.next_free_block = after
        after.prev_free_block = before
        block.prev_free_block = block.next_free_block = None
        self.num_free_blocks -= 1

    def append(self, block: KVCacheBlock) -> None:
        self.append_n((block,))

    def append_n(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Put ``blocks`` at the end; the first of them will be taken first."""
        last: Any = self._tail.prev_free_block
        for block in blocks:
            last.next_free_block = block
            block.prev_free_block = last
            last = block
        last.next_free_block = self._tail
        self._tail.prev_free_block = last
        self.num_free_blocks += len(blocks)

    def prepend_n(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Put ``blocks`` at the front; the first of them will be taken first."""
        last = self._head
        first_of_rest: Any = last.next_free_block
        for block in blocks:
            last.next_free_block = block
            block.prev_free_block = last
            last = block
        last.next_free_block = first_of_rest
        first_of_rest.prev_free_block = last
        self.num_free_blocks += len(blocks)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        """The blocks in order. O(n); for checks and tests.

        Raises:
            AssertionError: the list is broken.
        """
        blocks: list[KVCacheBlock] = []
        last, block = self._head, self._head.next_free_block
        while block is not self._tail:
            assert block is not None, f"the free queue ends behind {last}"
            assert block.prev_free_block is last, f"{block} does not point back at {last}"
            assert len(blocks) < self.num_free_blocks, (
                f"the free queue holds more than the {self.num_free_blocks} blocks it counts"
            )
            blocks.append(block)
            last, block = block, block.next_free_block
        assert self._tail.prev_free_block is last, "the free queue's tail is broken"
        assert len(blocks) == self.num_free_blocks, (
            f"the free queue holds {len(blocks)} blocks and counts {self.num_free_blocks}"
        )
        return blocks


def first_block_extra_keys(request: Request) -> tuple[Any, ...] | None:
    """What the first block of ``request`` is hashed with besides its tokens."""
    return (request.cache_salt,) if request.cache_salt else None


class BlockHasher:
    """Hashes the full blocks that a request has gained. One for all requests of an engine.

    The chain starts from ``none_hash``. With a collision-resistant algorithm that is a constant,
    so that engines agree on hashes without being configured to; with xxhash it is random,
    so that nobody can prepare collisions. PYTHONHASHSEED fixes (and changes) it in both cases.
    """

    __slots__ = ("algorithm", "block_size", "none_hash")

    def __init__(self, block_size: int, algorithm: HashAlgorithm) -> None:
        self.block_size = block_size
        self.algorithm = algorithm
        seed = envs.PYTHONHASHSEED
        if seed is not None and seed != "random":
            self.none_hash = algorithm.digest(seed.encode())
        elif algorithm.is_collision_resistant:
            self.none_hash = algorithm.digest(b"")
        else:
            self.none_hash = os.urandom(algorithm.digest_size)

    def __call__(self, request: Request) -> list[BlockHash]:
        """Hashes of the full blocks that ``request.block_hashes`` does not cover yet."""
        block_size, known = self.block_size, request.block_hashes
        start = len(known) * block_size
        end = request.num_tokens - request.num_tokens % block_size
        if start >= end:
            return []
        tokens = request.all_token_ids
        if known:
            return self.algorithm.hash_blocks(known[-1], tokens[start:end], block_size)
        extra_keys = first_block_extra_keys(request)
        if extra_keys is None:
            return self.algorithm.hash_blocks(self.none_hash, tokens[:end], block_size)
        first = self.algorithm.hash_block(self.none_hash, tokens[:block_size], extra_keys)
        return [first, *self.algorithm.hash_blocks(first, tokens[block_size:end], block_size)]


def get_request_block_hasher(block_size: int, algorithm: HashAlgorithm | str) -> BlockHasher:
    """The hasher for blocks of ``block_size`` tokens; ``algorithm`` may be its name."""
    if isinstance(algorithm, str):
        algorithm = get_hash_algorithm(algorithm)
    return BlockHasher(block_size, algorithm)


def resolve_hash_block_size(kv_cache_config: KVCacheConfig, default: int) -> int:
    """Tokens that one hash covers: the largest number that divides every group's block size."""
    planned = getattr(kv_cache_config, "hash_block_size", None)
    if planned:
        return planned
    sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
    return math.gcd(*sizes) if sizes else default


def make_block_hasher(
    cache_config: CacheConfig, kv_cache_config: KVCacheConfig, default_block_size: int
) -> BlockHasher | None:
    """The hasher that requests of this engine need; None where prefix caching is off."""
    if not cache_config.enable_prefix_caching:
        return None
    return get_request_block_hasher(
        resolve_hash_block_size(kv_cache_config, default_block_size),
        cache_config.prefix_caching_hash_algo,
    )


def group_block_hashes(block_hashes: list[BlockHash], ratio: int) -> list[BlockHash]:
    """Hashes of blocks ``ratio`` times as large as those hashed.

    As each hash covers everything before it, the last one inside a large block names it.
    """
    return block_hashes if ratio == 1 else block_hashes[ratio - 1 :: ratio]


def count_by_id(tables: Iterable[Iterable[KVCacheBlock]]) -> dict[int, int]:
    """How often each block is in ``tables``, by block id; the null block left out."""
    counts: dict[int, int] = {}
    for table in tables:
        for block in table:
            if not block.is_null:
                counts[block.block_id] = counts.get(block.block_id, 0) + 1
    return counts
