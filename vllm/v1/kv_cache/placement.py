"""Puts the layers of each group into the one backing allocation: offsets and strides in bytes.

Pure. What a placement must keep: the bytes of two different blocks never overlap, whichever
groups own them, and neither do two layers of one group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from vllm.v1.kv_cache.config import KVCacheTensor
from vllm.v1.kv_cache.content import round_up
from vllm.v1.kv_cache.grouping import PAGE_ALIGNMENT, page_room
from vllm.v1.kv_cache.spec import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

__all__ = ["bytes_per_block", "place_layers"]

Groups = Sequence[Sequence[str]]
Specs = Mapping[str, KVCacheSpec]


def bytes_per_block(groups: Groups, specs: Specs) -> int:
    """Bytes that one block takes of the backing: those of the largest group, aligned."""
    room = max((sum(page_room(specs[name]) for name in names) for names in groups), default=0)
    stride = math.lcm(PAGE_ALIGNMENT, *(spec.stride_alignment for spec in specs.values()))
    return round_up(room, stride)


def place_layers(
    groups: Groups, specs: Specs, layout: KVCacheLayout, num_blocks: int
) -> list[KVCacheTensor]:
    """One ``KVCacheTensor`` for each run of like layers of each group; all groups start at 0."""
    block_bytes = bytes_per_block(groups, specs)
    size = block_bytes * num_blocks
    tensors = []
    for names in groups:
        offset = 0
        for part in _alike(names, specs):
            spec = specs[part[0]]
            layer_stride, block_stride, room = _strides(
                spec, len(part), layout, num_blocks, block_bytes
            )
            tensors.append(
                KVCacheTensor(
                    size=size,
                    layers=tuple(part),
                    layer_stride=layer_stride,
                    block_stride=block_stride,
                    offset=offset,
                )
            )
            offset += room
    return tensors


def _alike(names: Sequence[str], specs: Specs) -> list[list[str]]:
    """Layers of one group whose pages are cut alike lie together, in one tensor."""

    def cut(name: str) -> tuple[Any, ...]:
        spec = specs[name]
        return (
            spec.kind,
            spec.content_format,
            spec.storage_dtype,
            spec.num_heads,
            spec.num_states,
            spec.state_content_size_bytes,
            spec.unpadded_page_size_bytes,
            spec.page_size_bytes,
            spec.state_table,
        )

    first_seen = {key: i for i, key in reversed(list(enumerate(map(cut, names))))}
    ordered = sorted(names, key=lambda name: first_seen[cut(name)])
    return [list(part) for _, part in groupby(ordered, key=cut)]


def _strides(
    spec: KVCacheSpec,
    num_layers: int,
    layout: KVCacheLayout,
    num_blocks: int,
    block_bytes: int,
) -> tuple[int, int, int]:
    """(layer stride, block stride, bytes until the next tensor of the group)."""
    slot = spec.num_states * spec.state_content_size_bytes
    if layout.is_block_outermost:
        room = page_room(spec)
        if layout.is_block_compact:
            return room, block_bytes, num_layers * room
        return slot, block_bytes, num_layers * spec.page_size_bytes
    page = spec.page_size_bytes
    layer_stride = round_up(page * num_blocks, math.lcm(PAGE_ALIGNMENT, spec.view_alignment))
    block_stride = page if layout.is_block_compact else slot
    return layer_stride, block_stride, num_layers * layer_stride
