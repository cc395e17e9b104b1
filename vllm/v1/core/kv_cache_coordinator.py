"""Brings the managers of all cache groups to agree on a prefix hit.

A hit is a number of tokens that every group can start after. Full attention alone needs one
lookup; with several kinds of cache each proposes, and the shortest proposal goes round until
nobody shortens it any more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, group_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import (
    SingleTypeKVCacheManager,
    get_manager_for_kv_cache_spec,
)
from vllm.v1.kv_cache_interface import EncoderOnlyAttentionSpec, KVCacheConfig, KVCacheSpec

__all__ = [
    "HybridKVCacheCoordinator",
    "KVCacheCoordinator",
    "NoPrefixCacheCoordinator",
    "UnitaryKVCacheCoordinator",
    "get_kv_cache_coordinator",
]

_Rows = tuple[Sequence[KVCacheBlock], ...]


class KVCacheCoordinator:
    """The managers by group, and no prefix cache: the base and the null case."""

    def __init__(self, kv_cache_config: KVCacheConfig, block_pool: BlockPool) -> None:
        self.block_pool = block_pool
        self.managers: tuple[SingleTypeKVCacheManager, ...] = tuple(
            get_manager_for_kv_cache_spec(group.kv_cache_spec.manager_spec)(
                group.kv_cache_spec.manager_spec, block_pool, group_id
            )
            for group_id, group in enumerate(kv_cache_config.kv_cache_groups)
        )
        self.no_hit: _Rows = tuple(() for _ in self.managers)

    def find_longest_cache_hit(
        self, block_hashes: list[BlockHash], max_length: int
    ) -> tuple[_Rows, int]:
        """The rows of the longest hit of at most ``max_length`` tokens, and its tokens."""
        return self.no_hit, 0


class NoPrefixCacheCoordinator(KVCacheCoordinator):
    """Prefix caching is off, or a group keeps what can't be found by hash."""


class UnitaryKVCacheCoordinator(KVCacheCoordinator):
    """One cache group."""

    def __init__(self, kv_cache_config: KVCacheConfig, block_pool: BlockPool) -> None:
        super().__init__(kv_cache_config, block_pool)
        self._manager = self.managers[0]
        self._ratio = self._manager.block_size // block_pool.hash_block_size

    def find_longest_cache_hit(
        self, block_hashes: list[BlockHash], max_length: int
    ) -> tuple[_Rows, int]:
        manager = self._manager
        rows = manager.find_longest_cache_hit(
            group_block_hashes(block_hashes, self._ratio),
            max_length,
            (manager.kv_cache_group_id,),
            self.block_pool,
            manager.kv_cache_spec,
            manager.block_size,
        )
        return rows, len(rows[0]) * manager.block_size


class _Kind:
    """The groups whose specs need the same blocks, looked up together."""

    def __init__(self, managers: list[SingleTypeKVCacheManager]) -> None:
        self.manager_cls = type(managers[0])
        self.spec: KVCacheSpec = managers[0].kv_cache_spec
        self.group_ids = tuple(manager.kv_cache_group_id for manager in managers)


class HybridKVCacheCoordinator(KVCacheCoordinator):
    """Several cache groups, of one kind or more."""

    def __init__(self, kv_cache_config: KVCacheConfig, block_pool: BlockPool) -> None:
        super().__init__(kv_cache_config, block_pool)
        by_key: dict[tuple, list[SingleTypeKVCacheManager]] = {}
        for manager in self.managers:
            if not isinstance(manager.kv_cache_spec, EncoderOnlyAttentionSpec):
                by_key.setdefault(manager.kv_cache_spec.group_key, []).append(manager)
        # Those whose hits need no second look go first: they bound the others for good.
        self._kinds = sorted(
            (_Kind(managers) for managers in by_key.values()),
            key=lambda kind: not kind.manager_cls.hits_are_prefix_closed,
        )
        self.alignment_tokens = math.lcm(*(kind.spec.block_size for kind in self._kinds))

    def find_longest_cache_hit(
        self, block_hashes: list[BlockHash], max_length: int
    ) -> tuple[_Rows, int]:
        length = max_length // self.alignment_tokens * self.alignment_tokens
        rows: list[Sequence[KVCacheBlock]] = list(self.no_hit)
        settled: dict[int, int] = {}
        while length:
            for kind in self._kinds:
                length = self._look_up(kind, block_hashes, length, rows, settled)
            if all(settled[id(kind)] == length for kind in self._kinds):
                break
        if length == 0:
            return self.no_hit, 0
        return tuple(rows), length

    def _look_up(
        self,
        kind: _Kind,
        block_hashes: list[BlockHash],
        length: int,
        rows: list[Sequence[KVCacheBlock]],
        settled: dict[int, int],
    ) -> int:
        """Put the hit of one kind within ``length`` tokens into ``rows``; returns its length."""
        block_size = kind.spec.block_size
        last = settled.get(id(kind))
        if last == length:
            return length
        if last is not None and kind.manager_cls.hits_are_prefix_closed:
            for group_id in kind.group_ids:
                rows[group_id] = rows[group_id][: length // block_size]
        else:
            ratio = block_size // self.block_pool.hash_block_size
            found = kind.manager_cls.find_longest_cache_hit(
                group_block_hashes(block_hashes, ratio),
                length,
                kind.group_ids,
                self.block_pool,
                kind.spec,
                self.alignment_tokens,
            )
            for group_id, row in zip(kind.group_ids, found, strict=True):
                rows[group_id] = row
            length = len(found[0]) * block_size
        settled[id(kind)] = length
        return length


def get_kv_cache_coordinator(
    kv_cache_config: KVCacheConfig, block_pool: BlockPool
) -> KVCacheCoordinator:
    """The coordinator that this combination of groups needs."""
    specs = [group.kv_cache_spec.manager_spec for group in kv_cache_config.kv_cache_groups]
    kept = [spec for spec in specs if not isinstance(spec, EncoderOnlyAttentionSpec)]
    findable = kept and all(spec.prefix_cacheable for spec in kept)
    if not block_pool.enable_caching or not findable:
        return NoPrefixCacheCoordinator(kv_cache_config, block_pool)
    if len(specs) == 1:
        return UnitaryKVCacheCoordinator(kv_cache_config, block_pool)
    return HybridKVCacheCoordinator(kv_cache_config, block_pool)
