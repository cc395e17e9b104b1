"""What happened to the prefix cache, as messages for routers and outside indexes.

The block pool collects them where KV events are enabled; ``kv_event_publisher`` sends them. On the
wire they are msgpack arrays tagged by class name, fields in the order below.
"""

from typing import Any

import msgspec

__all__ = [
    "MEDIUM_GPU",
    "AllBlocksCleared",
    "BlockRemoved",
    "BlockStored",
    "EventBatch",
    "ExternalBlockHash",
    "KVCacheEvent",
    "KVEventBatch",
]

MEDIUM_GPU = "GPU"

ExternalBlockHash = bytes | int


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """``ts`` is ``time.time()``."""

    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class KVCacheEvent(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag=True):
    """Base of the events."""


class BlockStored(KVCacheEvent):
    """Full blocks that can now be found by their hashes; consecutive in one sequence.

    ``token_ids`` are those of all the blocks, ``block_size`` of them a block.
    ``parent_block_hash`` is None where the first block starts a sequence. ``extra_keys`` has
    one entry a block (None, or the keys hashed besides the tokens).
    """

    block_hashes: list[ExternalBlockHash]
    parent_block_hash: ExternalBlockHash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None


class BlockRemoved(KVCacheEvent):
    """Blocks that can no longer be found."""

    block_hashes: list[ExternalBlockHash]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class AllBlocksCleared(KVCacheEvent):
    """The prefix cache was reset."""


class KVEventBatch(EventBatch):
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
