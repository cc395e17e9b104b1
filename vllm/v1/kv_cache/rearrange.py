"""Copies blocks between caches whose layout, block size or head shard differ, by descriptors.

Owns the plan of such a copy (pure: boxes of bytes at strides) and its execution on tensors. Asks
descriptors only; what the bytes mean stays with the formats, whose differences are refused.

A copy goes by *units*: the largest stretch of tokens that lies inside one kernel block on both
sides. Unit ``u`` of a request is part ``u % parts`` of block ``row[u // parts]`` on each side. A
state page is one unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from vllm.errors import KVTransferError
from vllm.v1.kv_cache.content import ITEMSIZE, ContentFormat, StateSlice
from vllm.v1.kv_cache.descriptors import LayerDescriptor
from vllm.v1.kv_cache.shards import ShardSource, shard_sources

__all__ = [
    "CopyBox",
    "LayerCopy",
    "Shard",
    "copy_units",
    "copy_units_by_kernel",
    "copy_units_indexed",
    "plan_layer_copy",
    "units_of_rows",
]

_WORD_DTYPES = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.int8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Place among the tensor-parallel ranks of an engine."""

    tp_size: int = 1
    rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyBox:
    """Bytes ``offset + i0 * stride0 + i1 * stride1 + ... + [0, length)`` of every unit, both sides.

    Offsets are relative to the unit's start.
    """

    source_offset: int
    target_offset: int
    counts: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]
    length: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.counts) * self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitGrid:
    """Where the units of one side start: block, kernel block inside it, part inside that."""

    offset: int
    block_stride: int
    kernel_stride: int
    part_stride: int
    parts_per_kernel: int
    parts_per_block: int

    def start(self, block: int, part: int) -> int:
        """First byte of part ``part`` of block ``block``, from the start of the backing."""
        kernel, inside = divmod(part, self.parts_per_kernel)
        return (
            self.offset
            + block * self.block_stride
            + kernel * self.kernel_stride
            + inside * self.part_stride
        )

    @property
    def grain(self) -> int:
        """The most bytes that every start is a multiple of."""
        steps = [self.offset, self.block_stride]
        if self.parts_per_block > self.parts_per_kernel:
            steps.append(self.kernel_stride)
        if self.parts_per_kernel > 1:
            steps.append(self.part_stride)
        return math.gcd(*steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCopy:
    """Everything that copying one layer's units from one peer takes; ids come with a request."""

    name: str
    tokens_per_unit: int
    """0 for a state page, which stands for no fixed number."""
    source: UnitGrid
    target: UnitGrid
    boxes: tuple[CopyBox, ...]

    @property
    def bytes_per_unit(self) -> int:
        return sum(box.size_bytes for box in self.boxes)


def plan_layer_copy(
    source: LayerDescriptor,
    target: LayerDescriptor,
    source_shard: Shard | None = None,
    target_shard: Shard | None = None,
    total_heads: int | None = None,
) -> LayerCopy | None:
    """What to copy of ``source``, the cache of one rank, into ``target``; None for nothing.

    Args:
        total_heads: KV heads of the whole model; None where both ranks hold the same heads.

    Raises:
        KVTransferError: the bytes do not mean the same, or the format cannot be cut that way.
    """
    here, there = target_shard or Shard(), source_shard or Shard()
    _check_content(source, target)
    if target.states:
        boxes = _state_boxes(source, target, there, here)
        if not boxes:
            return None
        return LayerCopy(
            name=target.name,
            tokens_per_unit=0,
            source=_whole_grid(source),
            target=_whole_grid(target),
            boxes=boxes,
        )
    states = math.gcd(source.num_states, target.num_states)
    heads = _head_sources(source, target, there, here, total_heads)
    if _keeps_sides_whole(target) and (source.num_states != target.num_states or heads is not None):
        raise KVTransferError(
            f"{target.name}: a page of {target.content_format} keeps scales apart from data, so it "
            "moves whole: give both sides the same --block-size and --tensor-parallel-size"
        )
    boxes = tuple(_head_boxes(source, target, states, heads))
    if not boxes:
        return None
    return LayerCopy(
        name=target.name,
        tokens_per_unit=int(states * Fraction(target.tokens_per_state)),
        source=_grid(source, states),
        target=_grid(target, states),
        boxes=boxes,
    )


def _check_content(source: LayerDescriptor, target: LayerDescriptor) -> None:
    mine, theirs = target.content_key(), source.content_key()
    differences = [f"{key} is {mine[key]} here and {theirs[key]} there" for key in mine]
    differences = [
        text for key, text in zip(mine, differences, strict=True) if mine[key] != theirs[key]
    ]
    if differences:
        raise KVTransferError(f"{target.name}: {'; '.join(differences)}")


def _keeps_sides_whole(layer: LayerDescriptor) -> bool:
    return layer.content_format == ContentFormat.KV_HEAD_GROUPS_NVFP4


def _grid(layer: LayerDescriptor, states: int) -> UnitGrid:
    parts = layer.num_states // states
    return UnitGrid(
        offset=layer.offset,
        block_stride=layer.block_stride,
        kernel_stride=layer.kernel_block_stride,
        part_stride=states * layer.state_stride,
        parts_per_kernel=parts,
        parts_per_block=parts * layer.kernel_blocks_per_block,
    )


def _whole_grid(layer: LayerDescriptor) -> UnitGrid:
    return UnitGrid(
        offset=layer.offset,
        block_stride=layer.block_stride,
        kernel_stride=0,
        part_stride=0,
        parts_per_kernel=1,
        parts_per_block=1,
    )


def _head_sources(
    source: LayerDescriptor,
    target: LayerDescriptor,
    there: Shard,
    here: Shard,
    total_heads: int | None,
) -> tuple[ShardSource, ...] | None:
    """The heads that ``there`` has for ``here``; None where all go as they are."""
    if target.head_axis is None or source.head_axis is None or total_heads is None:
        if source.num_head_slots != target.num_head_slots:
            why = (
                "the number of the model's heads is needed to share them out"
                if target.head_axis is not None and total_heads is None
                else f"{target.content_format} is not cut by head"
            )
            raise KVTransferError(
                f"{target.name}: {target.num_head_slots} head slots here and "
                f"{source.num_head_slots} there, and {why}"
            )
        return None
    found = shard_sources(total_heads, here.tp_size, here.rank, there.tp_size)
    mine = tuple(item for item in found if item.rank == there.rank)
    whole = ShardSource(rank=there.rank, first=0, target=0, count=target.head_axis.count)
    if mine == (whole,) and source.head_axis.count == target.head_axis.count:
        return None
    return mine


def _head_boxes(
    source: LayerDescriptor,
    target: LayerDescriptor,
    states: int,
    heads: tuple[ShardSource, ...] | None,
) -> list[CopyBox]:
    if heads is None:
        cuts = [(0, 0, target.num_head_slots)]
    else:
        assert source.head_axis is not None
        assert target.head_axis is not None
        cuts = [
            (
                side * source.head_axis.count + item.first,
                side * target.head_axis.count + item.target,
                item.count,
            )
            for side in range(target.head_axis.sides)
            for item in heads
        ]
    return [
        _box(
            source_offset=first * source.head_stride,
            target_offset=to * target.head_stride,
            axes=[
                (count, source.head_stride, target.head_stride),
                (states, source.state_stride, target.state_stride),
            ],
            length=target.content_bytes,
        )
        for first, to, count in cuts
    ]


def _box(
    source_offset: int, target_offset: int, axes: list[tuple[int, int, int]], length: int
) -> CopyBox:
    """The box with axes that are dense on both sides folded into its length."""
    apart: list[tuple[int, int, int]] = []
    for count, from_stride, to_stride in sorted(axes, key=lambda axis: axis[1]):
        if count == 1:
            continue
        if not apart and from_stride == to_stride == length:
            length *= count
        else:
            apart.append((count, from_stride, to_stride))
    # What is outermost on the target's side comes first, so that writes go upwards.
    apart.sort(key=lambda axis: -axis[2])
    return CopyBox(
        source_offset=source_offset,
        target_offset=target_offset,
        counts=tuple(axis[0] for axis in apart),
        source_strides=tuple(axis[1] for axis in apart),
        target_strides=tuple(axis[2] for axis in apart),
        length=length,
    )


def _state_boxes(
    source: LayerDescriptor, target: LayerDescriptor, there: Shard, here: Shard
) -> tuple[CopyBox, ...]:
    boxes: list[CopyBox] = []
    same_size = there.tp_size == here.tp_size
    if same_size and there.rank != here.rank:
        return ()
    for theirs, mine in zip(source.states, target.states, strict=True):
        if same_size:
            if theirs.shape != mine.shape:
                raise KVTransferError(
                    f"{target.name}: state {mine.shape} here and {theirs.shape} there"
                )
            boxes.append(_box(theirs.offset, mine.offset, [], mine.size_bytes))
        else:
            boxes.extend(_resharded_state(target.name, theirs, mine, there, here))
    return tuple(boxes)


def _resharded_state(
    name: str, theirs: StateSlice, mine: StateSlice, there: Shard, here: Shard
) -> list[CopyBox]:
    """Each projection or head range for itself: never a fraction of the page."""
    if not mine.segments:
        raise KVTransferError(f"{name}: its states do not say how ranks share them out")
    if mine.sharded_axis != 0:
        raise KVTransferError(
            f"{name}: a convolution state in SD order mixes the channels of every step, so it "
            "cannot be cut for another --tensor-parallel-size: set VLLM_SSM_CONV_STATE_LAYOUT=DS "
            "on both sides"
        )
    item = ITEMSIZE[mine.dtype_name]
    row = math.prod(mine.shape[1:]) * item
    if theirs.shape[1:] != mine.shape[1:]:
        raise KVTransferError(f"{name}: rows of {mine.shape[1:]} here, {theirs.shape[1:]} there")
    boxes = []
    from_row = to_row = 0
    for their_part, my_part in zip(theirs.segments, mine.segments, strict=True):
        for piece in shard_sources(my_part.units, here.tp_size, here.rank, there.tp_size):
            if piece.rank != there.rank:
                continue
            boxes.append(
                _box(
                    theirs.offset + (from_row + piece.first * my_part.rows) * row,
                    mine.offset + (to_row + piece.target * my_part.rows) * row,
                    [],
                    piece.count * my_part.rows * row,
                )
            )
        from_row += their_part.rows_per_rank
        to_row += my_part.rows_per_rank
    return boxes


Units = Sequence[tuple[int, int, int, int]]
"""(source block, source part, target block, target part) of each unit."""


def units_of_rows(
    copy: LayerCopy,
    source_blocks: Sequence[int],
    target_blocks: Sequence[int],
    num_tokens: int,
    first_token: int = 0,
) -> list[tuple[int, int, int, int]]:
    """The units of tokens ``[first_token, num_tokens)`` of a request with these rows of blocks.

    A state page has one unit: the last block of each row. Units that the range touches in part are
    copied whole.
    """
    if copy.tokens_per_unit == 0:
        return [(source_blocks[-1], 0, target_blocks[-1], 0)]
    units = range(first_token // copy.tokens_per_unit, -(-num_tokens // copy.tokens_per_unit))
    from_parts, to_parts = copy.source.parts_per_block, copy.target.parts_per_block
    return [
        (source_blocks[u // from_parts], u % from_parts, target_blocks[u // to_parts], u % to_parts)
        for u in units
    ]


def copy_units(copy: LayerCopy, source: torch.Tensor, target: torch.Tensor, units: Units) -> None:
    """Copy units from backing ``source`` to backing ``target`` (1-D int8), whichever way is fast.

    On the CPU each box of each unit is a strided copy; on a GPU all units of a box are one launch.
    """
    if source.is_cuda and source.device == target.device:
        copy_units_by_kernel(copy, source, target, units)
        return
    if source.device.type != "cpu" or target.device.type != "cpu":
        copy_units_indexed(copy, source, target, units)
        return
    for box in copy.boxes:
        words = _words(copy, box, source, target)
        size, from_words, to_words = words
        shape = (*box.counts, box.length // size)
        from_strides = (*(stride // size for stride in box.source_strides), 1)
        to_strides = (*(stride // size for stride in box.target_strides), 1)
        from_base = int(source.storage_offset()) + box.source_offset
        to_base = int(target.storage_offset()) + box.target_offset
        for from_block, from_part, to_block, to_part in units:
            start = from_base + copy.source.start(from_block, from_part)
            to = to_base + copy.target.start(to_block, to_part)
            to_words.as_strided(shape, to_strides, to // size).copy_(
                from_words.as_strided(shape, from_strides, start // size)
            )


def copy_units_by_kernel(
    copy: LayerCopy, source: torch.Tensor, target: torch.Tensor, units: Units
) -> None:
    """The same on one GPU."""
    from vllm.v1.kv_cache.triton_movers import move_box

    places = [
        (copy.source.start(from_block, from_part), copy.target.start(to_block, to_part))
        for from_block, from_part, to_block, to_part in units
    ]
    for box in copy.boxes:
        move_box(
            source,
            target,
            places,
            counts=box.counts,
            source_offset=box.source_offset,
            target_offset=box.target_offset,
            source_strides=box.source_strides,
            target_strides=box.target_strides,
            length=box.length,
        )


def copy_units_indexed(
    copy: LayerCopy, source: torch.Tensor, target: torch.Tensor, units: Units
) -> None:
    """The same by indexing: the reference that faster movers are compared with, on any device."""
    for box in copy.boxes:
        size, from_words, to_words = _words(copy, box, source, target)
        from_starts = [copy.source.start(unit[0], unit[1]) for unit in units]
        to_starts = [copy.target.start(unit[2], unit[3]) for unit in units]
        from_base = int(source.storage_offset()) + box.source_offset
        to_base = int(target.storage_offset()) + box.target_offset
        taken = _indices(box.counts, box.source_strides, box.length, from_base, from_starts, size)
        given = _indices(box.counts, box.target_strides, box.length, to_base, to_starts, size)
        values = from_words[taken.to(source.device)].to(target.device)
        to_words[given.to(target.device)] = values


def _indices(
    counts: Sequence[int],
    strides: Sequence[int],
    length: int,
    base: int,
    starts: Sequence[int],
    size: int,
) -> torch.Tensor:
    """Word numbers of every word of the box, for every unit."""
    indices = torch.tensor([(base + start) // size for start in starts], dtype=torch.int64)
    for count, stride in zip(counts, strides, strict=True):
        indices = indices[..., None] + torch.arange(count) * (stride // size)
    return indices[..., None] + torch.arange(length // size)


def _words(
    copy: LayerCopy, box: CopyBox, source: torch.Tensor, target: torch.Tensor
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Size of the widest word that all addresses of the box divide into, and both storages so."""
    numbers = [box.source_offset, box.target_offset, box.length]
    numbers += [*box.source_strides, *box.target_strides]
    for grid, backing in ((copy.source, source), (copy.target, target)):
        numbers += [grid.offset, grid.block_stride, grid.kernel_stride, grid.part_stride]
        numbers += [int(backing.storage_offset()), backing.untyped_storage().data_ptr()]
    alignment = math.gcd(*numbers)
    size, dtype = next(pair for pair in _WORD_DTYPES if alignment % pair[0] == 0)
    return (
        size,
        source.new_empty(0, dtype=dtype).set_(source.untyped_storage()),
        target.new_empty(0, dtype=dtype).set_(target.untyped_storage()),
    )
