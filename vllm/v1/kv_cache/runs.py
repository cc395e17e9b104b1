"""Which bytes a block owns, as strided runs: what copiers, zeroers and connectors work on.

A run is the same interval for every block, ``block_stride`` bytes apart, and may repeat ``count``
times at ``step`` bytes (over layers or heads). Nobody who moves runs asks what the bytes mean.
Pure: no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from vllm.errors import ConfigError
from vllm.v1.kv_cache.config import KVCacheConfig
from vllm.v1.kv_cache.spec import KVCacheSpec
from vllm.v1.kv_cache.strides import compute_layer_kv_cache_shape_bytes, tensor_strides

__all__ = [
    "ByteRun",
    "Region",
    "block_extents",
    "block_runs",
    "fold_axes",
    "heads_of_part",
    "layer_runs",
    "merge_runs",
    "regions",
    "runs_by_layer",
    "subtract_runs",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRun:
    """Block b owns ``[offset + i * step + b * block_stride, ... + length)`` for i < count."""

    offset: int
    """Bytes from the start of the backing."""
    block_stride: int
    length: int
    count: int = 1
    step: int = 0

    def offsets(self) -> Iterator[int]:
        """Start of each repetition for block 0."""
        return (self.offset + i * self.step for i in range(self.count))

    def intervals(self, block_id: int) -> Iterator[tuple[int, int]]:
        """(start, end) of each repetition."""
        for offset in self.offsets():
            start = offset + block_id * self.block_stride
            yield start, start + self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """One stretch of memory to register: all blocks of one layer, or of everything."""

    offset: int
    size_bytes: int
    members: tuple[tuple[int, str], ...]
    """(group id, layer name) of every layer whose pages lie in it; overlaid ones all count."""


def heads_of_part(num_heads: int, index: int, count: int) -> tuple[int, int]:
    """(first, number) of the heads of part ``index`` of ``count``; parts share where heads are few.

    Raises:
        ConfigError: neither number divides the other.
    """
    if num_heads % count == 0:
        size = num_heads // count
        return index * size, size
    if count % num_heads == 0:
        return index * num_heads // count, 1
    raise ConfigError(f"{num_heads} heads cannot be shared out to {count} ranks")


def layer_runs(
    spec: KVCacheSpec,
    strides: Sequence[int],
    offset: int,
    kernel_blocks: int = 1,
    kernel_block_size: int | None = None,
    part: tuple[int, int] | None = None,
) -> tuple[ByteRun, ...]:
    """Runs of one layer's page.

    Args:
        strides: byte strides (L, B, H, N, C), B of a kernel block.
        offset: of the layer's block 0.
        kernel_blocks: kernel blocks of a manager block.
        part: (i, n) for the heads that rank i of n times as many ranks would hold; None for all.
            A page that is not cut by head is taken whole.
    """
    shape = compute_layer_kv_cache_shape_bytes(spec, 1, kernel_block_size)
    _, kernel_stride, head_stride, state_stride, _ = strides
    num_slots = shape[1]
    if part is not None and spec.head_axis_is_sliceable:
        first, num_slots = heads_of_part(spec.num_heads_of_side, *part)
        side = shape[1] // spec.head_sides * head_stride
        offsets = [offset + first * head_stride + i * side for i in range(spec.head_sides)]
    else:
        offsets = [offset]
    length = min(spec.state_content_size_bytes, spec.unpadded_page_size_bytes)
    axes = ((shape[2], state_stride), (num_slots, head_stride), (kernel_blocks, kernel_stride))
    return fold_axes(offsets, axes, length, kernel_stride * kernel_blocks)


def fold_axes(
    starts: Sequence[int], axes: Iterable[tuple[int, int]], length: int, block_stride: int
) -> tuple[ByteRun, ...]:
    """Runs of ``length`` bytes at every combination of axes, given as (size, stride in bytes)."""
    apart: list[tuple[int, int]] = []
    for size, stride in sorted(axes, key=lambda axis: axis[1]):
        if size == 1:
            continue
        if stride == length and not apart:
            length *= size
        else:
            apart.append((size, stride))
    for size, stride in apart:
        starts = [start + i * stride for start in starts for i in range(size)]
    return merge_runs(
        ByteRun(offset=start, block_stride=block_stride, length=length) for start in starts
    )


def merge_runs(runs: Iterable[ByteRun], bridge_gaps: bool = False) -> tuple[ByteRun, ...]:
    """The same bytes in the fewest runs: adjacent and overlapping ones joined, like ones counted.

    Args:
        bridge_gaps: also take the bytes between runs; right where the whole block has one owner,
            which is so in a block-outermost layout only.
    """
    merged: list[ByteRun] = []
    by_stride: dict[int, list[tuple[int, int]]] = {}
    for run in runs:
        spans = by_stride.setdefault(run.block_stride, [])
        spans.extend((offset, offset + run.length) for offset in run.offsets())
    for block_stride, spans in by_stride.items():
        joined: list[list[int]] = []
        for start, end in sorted(spans):
            if joined and (start <= joined[-1][1] or bridge_gaps):
                joined[-1][1] = max(joined[-1][1], end)
            else:
                joined.append([start, end])
        merged.extend(_count_alike(block_stride, joined))
    return tuple(merged)


def subtract_runs(whole: Iterable[ByteRun], parts: Iterable[ByteRun]) -> tuple[ByteRun, ...]:
    """The bytes of ``whole`` that ``parts`` leave out; both have the same block strides."""
    taken: dict[int, list[tuple[int, int]]] = {}
    for run in parts:
        spans = taken.setdefault(run.block_stride, [])
        spans.extend((offset, offset + run.length) for offset in run.offsets())
    left: list[ByteRun] = []
    for run in merge_runs(whole):
        spans = sorted(taken.get(run.block_stride, ()))
        for start in run.offsets():
            end = start + run.length
            for first, last in spans:
                if first < end and last > start:
                    if first > start:
                        left.append(replace(run, offset=start, length=first - start, count=1))
                    start = last
            if start < end:
                left.append(replace(run, offset=start, length=end - start, count=1))
    return merge_runs(left)


def _count_alike(block_stride: int, spans: Sequence[Sequence[int]]) -> Iterator[ByteRun]:
    """Spans of one length at equal distances as one run."""
    i = 0
    while i < len(spans):
        start, end = spans[i]
        length, count, step = end - start, 1, 0
        while i + count < len(spans):
            following, its_end = spans[i + count]
            distance = following - spans[i + count - 1][0]
            if its_end - following != length or (count > 1 and distance != step):
                break
            step = distance
            count += 1
        yield ByteRun(
            offset=start, block_stride=block_stride, length=length, count=count, step=step
        )
        i += count


def runs_by_layer(
    config: KVCacheConfig, part: tuple[int, int] | None = None
) -> dict[str, tuple[ByteRun, ...]]:
    """Layer name -> runs of its pages, or of a part of their heads (see ``layer_runs``)."""
    found = {}
    for tensor in config.kv_cache_tensors:
        group_id = config.group_of(tensor.layers[0])
        spec = config.kv_cache_groups[group_id].spec_of(tensor.layers[0])
        kernel = config.kernel_block_size(group_id) if spec.uses_slot_mapping else None
        ratio = config.kernel_blocks_per_block(group_id) if spec.uses_slot_mapping else 1
        strides = tensor_strides(tensor, spec, config.num_blocks, config.kv_cache_layout, kernel)
        for index, name in enumerate(tensor.layers):
            offset = tensor.offset + index * strides[0]
            found[name] = layer_runs(spec, strides, offset, ratio, kernel, part)
    return found


def block_runs(
    config: KVCacheConfig,
    group_id: int | None = None,
    bridge_gaps: bool = False,
    part: tuple[int, int] | None = None,
) -> tuple[ByteRun, ...]:
    """Runs of a block that group ``group_id`` owns; of any block, whoever owns it, if None.

    Args:
        bridge_gaps: take alignment gaps along where that makes fewer runs, as for a transfer. With
            ``part`` gaps hold other heads, and are left out.
        part: as ``layer_runs``'s.
    """
    by_layer = runs_by_layer(config, part)
    groups = config.kv_cache_groups if group_id is None else [config.kv_cache_groups[group_id]]
    return merge_runs(
        (run for group in groups for name in group.layer_names for run in by_layer.get(name, ())),
        bridge_gaps and part is None and config.kv_cache_layout.is_block_outermost,
    )


def block_extents(config: KVCacheConfig) -> tuple[ByteRun, ...]:
    """All bytes from one block to the next, paddings too: what nobody but its owner may change."""
    if config.kv_cache_layout.is_block_outermost:
        size = config.bytes_per_block
        return (ByteRun(offset=0, block_stride=size, length=size),)
    extents = []
    for tensor in config.kv_cache_tensors:
        spec = config.layer_spec(tensor.layers[0])
        # A page, or one head's part of it, is one stride long.
        apart = not config.kv_cache_layout.is_block_compact
        strides = tensor_strides(tensor, spec, config.num_blocks, config.kv_cache_layout)
        extents += [
            ByteRun(
                offset=tensor.offset + layer * strides[0] + head * strides[2],
                block_stride=strides[1],
                length=strides[1],
            )
            for layer in range(len(tensor.layers))
            for head in range(spec.num_heads if apart else 1)
        ]
    return merge_runs(extents)


def regions(config: KVCacheConfig) -> tuple[Region, ...]:
    """Memory to register with a transport: one region per layer where layers are compact (groups
    that overlay each other share theirs), one for everything where blocks are outermost.
    """
    if config.kv_cache_layout.is_block_outermost:
        members = tuple(
            (group_id, name)
            for group_id, group in enumerate(config.kv_cache_groups)
            for name in group.layer_names
        )
        return (Region(offset=0, size_bytes=config.backing_size_bytes, members=members),)
    last = config.num_blocks - 1
    stretches: list[tuple[int, int, tuple[int, str]]] = []
    for name, runs in runs_by_layer(config).items():
        start = min(run.offset for run in runs)
        end = max(end for run in runs for _, end in run.intervals(last))
        stretches.append((start, end, (config.group_of(name), name)))
    # Stretches of different groups that overlay each other may end differently: one was padded.
    found: list[tuple[int, int, list[tuple[int, str]]]] = []
    for start, end, member in sorted(stretches):
        if found and start < found[-1][1]:
            first, until, others = found[-1]
            found[-1] = (first, max(until, end), [*others, member])
        else:
            found.append((start, end, [member]))
    return tuple(
        Region(
            offset=start,
            size_bytes=end - start,
            members=tuple(sorted(members, key=lambda member: member[0])),
        )
        for start, end, members in found
    )
