"""The transfer plan: from two cache descriptors to tables of byte runs that requests index.

Pure arithmetic, done once per peer rank at the handshake. A request adds block ids only. Asks
descriptors, never kinds of layers.

Terms: a *unit* is the largest stretch of tokens inside one kernel block on both sides (see
``rearrange``); a *lane* is one run of bytes that every unit has, over one or more layers. Lane r of
unit (block b, part p) starts at ``lane.source + source.start(b, p)`` there and at ``lane.target +
target.start(b, p)`` here. Descriptor number of that in a prepared list, on either side:
``(first_row + r * parts + p) * num_blocks + b``: one strided row of descriptors a (lane, part).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vllm.distributed.kv_transfer.conversion import Conversion, find_conversion, stretch
from vllm.errors import KVTransferError
from vllm.v1.kv_cache.descriptors import CacheDescriptor, LayerDescriptor, content_differences
from vllm.v1.kv_cache.rearrange import LayerCopy, Shard, UnitGrid, plan_layer_copy

__all__ = [
    "Lane",
    "TransferPlan",
    "TransferTable",
    "UnitBlocks",
    "check_descriptor",
    "plan_transfer",
]

_LARGEST_COUNT = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A run of bytes of every unit."""

    source: int
    target: int
    length: int
    """Bytes there."""
    target_length: int
    """Bytes here; another number only where a conversion lies between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitBlocks:
    """The units of one request in one table: block and part on either side, in order."""

    source_blocks: np.ndarray
    source_parts: np.ndarray
    target_blocks: np.ndarray
    target_parts: np.ndarray
    starts: np.ndarray
    """int64 ``(2, units)``: where they start there and here, in bytes of each side's cache."""

    def __len__(self) -> int:
        return len(self.source_blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferTable:
    """What one peer rank has for one cache group, as far as it is cut alike."""

    group: int
    source_group: int
    tokens_per_unit: int
    """0 for a state page."""
    source: UnitGrid
    target: UnitGrid
    lanes: tuple[Lane, ...]
    copies: tuple[LayerCopy, ...]
    """The same by layer, for whoever rearranges instead of copying runs."""
    conversion: Conversion | None = None
    """What the receiver computes of the numbers; such a table does not go by descriptors."""
    converted: tuple[tuple[str, int, int], ...] = ()
    """Of a conversion: (layer, elements of K, elements of K and V) of its runs, in their order."""
    bytes_per_unit: int = field(init=False, repr=False, compare=False)
    """Of the source, and ``target_bytes_per_unit``: every request needs them."""
    target_bytes_per_unit: int = field(init=False, repr=False, compare=False)
    _lane_lengths: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)
    """(bytes, how many lanes have so many)."""

    def __post_init__(self) -> None:
        lengths = Counter(lane.length for lane in self.lanes)
        object.__setattr__(self, "_lane_lengths", tuple(lengths.items()))
        object.__setattr__(self, "bytes_per_unit", sum(lane.length for lane in self.lanes))
        size = sum(lane.target_length for lane in self.lanes)
        object.__setattr__(self, "target_bytes_per_unit", size)

    def gather_pieces(self) -> np.ndarray:
        """``pieces.PieceMover``'s table from blocks there to packed units."""
        lengths = [lane.length for lane in self.lanes]
        places = np.cumsum([0, *lengths[:-1]])
        return np.array([[lane.source for lane in self.lanes], places, lengths]).T

    def scatter_pieces(self) -> np.ndarray:
        """The same from packed (and converted) units to blocks here."""
        lengths = [lane.target_length for lane in self.lanes]
        places = np.cumsum([0, *lengths[:-1]])
        return np.array([places, [lane.target for lane in self.lanes], lengths]).T

    def copy_pieces(self) -> np.ndarray:
        """The same from blocks there to blocks here."""
        return np.array([[lane.source, lane.target, lane.length] for lane in self.lanes])

    def num_rows(self, side: str) -> int:
        """Of strided rows, as many as ``rows`` names."""
        grid = self.source if side == "source" else self.target
        return len(self.lanes) * grid.parts_per_block

    def rows(self, side: str) -> list[tuple[int, int, int]]:
        """(offset of block 0, length, block stride) of each strided row, in order."""
        grid = self.source if side == "source" else self.target
        return [
            (
                getattr(lane, side) + grid.start(0, part),
                lane.length if side == "source" else lane.target_length,
                grid.block_stride,
            )
            for lane in self.lanes
            for part in range(grid.parts_per_block)
        ]

    def place(
        self,
        source_blocks: np.ndarray,
        source_parts: np.ndarray,
        target_blocks: np.ndarray,
        target_parts: np.ndarray,
    ) -> UnitBlocks:
        """Units of these blocks and parts, all of one length."""
        starts = np.empty((2, len(source_blocks)), dtype=np.int64)
        _find_starts(self.source, source_blocks, source_parts, starts[0])
        _find_starts(self.target, target_blocks, target_parts, starts[1])
        return UnitBlocks(
            source_blocks=source_blocks,
            source_parts=source_parts,
            target_blocks=target_blocks,
            target_parts=target_parts,
            starts=starts,
        )

    def units(
        self, source: np.ndarray, target: np.ndarray, num_tokens: int, first_token: int = 0
    ) -> UnitBlocks:
        """The units of tokens ``[first_token, num_tokens)`` of a request with these rows.

        Blocks of the target that are 0 (the null block) need nothing.

        Raises:
            KVTransferError: a row is too short, or the source has no block where one is needed.
        """
        if self.tokens_per_unit == 0:
            return self._last_state(source, target)
        first = first_token // self.tokens_per_unit
        end = -(-num_tokens // self.tokens_per_unit)
        from_blocks, from_parts = self._row(self.source, "source", source, first, end, num_tokens)
        to_blocks, to_parts = self._row(self.target, "target", target, first, end, num_tokens)
        if np.count_nonzero(to_blocks) < len(to_blocks):
            wanted = to_blocks != 0
            from_blocks, from_parts = from_blocks[wanted], from_parts[wanted]
            to_blocks, to_parts = to_blocks[wanted], to_parts[wanted]
        if np.count_nonzero(from_blocks) < len(from_blocks):
            raise KVTransferError(
                f"group {self.group}: the source has given back blocks that are needed"
            )
        return self.place(from_blocks, from_parts, to_blocks, to_parts)

    def _row(
        self, grid: UnitGrid, what: str, row: np.ndarray, first: int, end: int, num_tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Blocks and parts of units ``[first, end)`` in a row of one side."""
        each = grid.parts_per_block
        needed = -(-end // each)
        if first < end and needed > len(row):
            raise KVTransferError(
                f"group {self.group}: {num_tokens} tokens need {needed} blocks of the "
                f"{what}, which has {len(row)}"
            )
        if each == 1:
            return row[first:end], np.zeros(max(end - first, 0), dtype=np.int64)
        index, part = np.divmod(np.arange(first, end), each)
        return row[index], part

    def _last_state(self, source: np.ndarray, target: np.ndarray) -> UnitBlocks:
        zero = np.zeros(1, dtype=np.int64)
        from_live, to_live = source[source != 0], target[target != 0]
        if not len(from_live) or not len(to_live):
            raise KVTransferError(f"group {self.group}: a state is needed, and one side has none")
        return self.place(from_live[-1:], zero, to_live[-1:], zero)

    def indices(self, units: UnitBlocks, side: str, num_blocks: int, first_row: int) -> np.ndarray:
        """Descriptor numbers of every lane of every unit, lanes outermost so that runs merge."""
        grid = self.source if side == "source" else self.target
        own = getattr(units, f"{side}_blocks")
        if grid.parts_per_block > 1:
            own = own + getattr(units, f"{side}_parts") * num_blocks
        rows = first_row + np.arange(len(self.lanes)) * grid.parts_per_block
        return (rows[:, None] * num_blocks + own).ravel()

    def num_descriptors(self, units: UnitBlocks) -> int:
        """Runs on the wire: neighbours on both sides are one."""
        if not len(units):
            return 0
        steps = units.starts[:, 1:] - units.starts[:, :-1]
        num_runs = 0
        for length, count in self._lane_lengths:
            apart = steps != length
            num_runs += count * (1 + int(np.count_nonzero(apart[0] | apart[1])))
        return num_runs


def _block_rows(rows: Sequence[Sequence[int]], what: str, limit: int) -> list[np.ndarray]:
    """
    Raises:
        KVTransferError: ids that are not of this cache.
    """
    found = []
    for row in rows:
        try:
            numbers = np.fromiter(row, np.int64, len(row))
            # Without their signs, negative ones are larger than any cache.
            inside = np.maximum.reduce(numbers.view(np.uint64), initial=0) < limit
        except OverflowError:
            inside = False
        if not inside:
            raise KVTransferError(f"{what} block ids must be 0 to {limit - 1}")
        found.append(numbers)
    return found


def _find_starts(grid: UnitGrid, blocks: np.ndarray, parts: np.ndarray, starts: np.ndarray) -> None:
    """Writes into ``starts`` where units start."""
    np.multiply(blocks, grid.block_stride, out=starts)
    if grid.parts_per_block > 1:
        kernel, inside = np.divmod(parts, grid.parts_per_kernel)
        starts += kernel * grid.kernel_stride + inside * grid.part_stride
    if grid.offset:
        starts += grid.offset


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferPlan:
    """What a rank here takes from one rank there."""

    rank: int
    """Of the peer."""
    tables: tuple[TransferTable, ...]
    source_blocks: int
    target_blocks: int

    @property
    def converts(self) -> bool:
        """Some numbers are computed on the way, so bytes cannot go straight to their place."""
        return any(table.conversion for table in self.tables)

    def first_rows(self, side: str) -> list[int]:
        """Number of the first strided row of each table."""
        counts = [table.num_rows(side) for table in self.tables]
        return [sum(counts[:i]) for i in range(len(counts))]

    def rows(self, side: str) -> np.ndarray:
        """Strided rows of all tables ``(rows, 4)`` int64: offset, length, stride, count."""
        count = self.source_blocks if side == "source" else self.target_blocks
        rows = [(*row, count) for table in self.tables for row in table.rows(side)]
        return np.array(rows, dtype=np.int64).reshape(-1, 4)

    def units(
        self,
        source_blocks: Sequence[Sequence[int]],
        target_blocks: Sequence[Sequence[int]],
        num_tokens: int,
        first_token: int = 0,
    ) -> list[UnitBlocks]:
        """Of each table, the units of a request with these rows (one a group).

        Raises:
            KVTransferError: block ids that are not of this cache, or too few of them.
        """
        there = _block_rows(source_blocks, "source", self.source_blocks)
        here = _block_rows(target_blocks, "target", self.target_blocks)
        needed = max((table.source_group for table in self.tables), default=-1)
        if needed >= len(source_blocks):
            raise KVTransferError(
                f"the source names blocks of {len(source_blocks)} groups, not of {needed + 1}"
            )
        return [
            table.units(there[table.source_group], here[table.group], num_tokens, first_token)
            for table in self.tables
        ]

    def indices(self, units: Sequence[UnitBlocks], side: str) -> np.ndarray:
        """Descriptor numbers of a request in the prepared list of ``rows(side)``."""
        count = self.source_blocks if side == "source" else self.target_blocks
        parts = [
            table.indices(own, side, count, first)
            for table, own, first in zip(self.tables, units, self.first_rows(side), strict=True)
        ]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def num_descriptors(self, units: Sequence[UnitBlocks]) -> int:
        return sum(
            table.num_descriptors(own) for table, own in zip(self.tables, units, strict=True)
        )

    def num_bytes(self, units: Sequence[UnitBlocks]) -> int:
        return sum(
            table.bytes_per_unit * len(own) for table, own in zip(self.tables, units, strict=True)
        )


def plan_transfer(
    source: CacheDescriptor,
    target: CacheDescriptor,
    source_shard: Shard,
    target_shard: Shard,
    total_heads: dict[str, int | None],
    formats: tuple[str, str] | None = None,
) -> TransferPlan:
    """What rank ``target_shard`` takes from rank ``source_shard``.

    Args:
        total_heads: of each layer, KV heads of the whole model; None (or left out) where it is
            not cut by head.
        formats: number formats of the two caches (``conversion.format_name``), for receivers that
            can convert.

    Raises:
        KVTransferError: bytes mean different things, a layer is missing on one side, or a format
            cannot be cut that way; names what works.
    """
    check_descriptor(source)
    check_descriptor(target)
    there = {layer.name: layer for layer in source.layers}
    conversions = _conversions(there, target, formats)
    _check_same(there, source, target, conversions, formats)
    made: dict[tuple[int, int, int, tuple[int, ...], Conversion | None], list[LayerCopy]] = {}
    for layer in target.layers:
        conversion = conversions.get(layer.name)
        copy = _copy_of_layer(
            (there[layer.name], layer),
            (source, target),
            (source_shard, target_shard),
            total_heads.get(layer.name),
            conversion,
        )
        if copy is not None:
            key = (
                layer.group,
                there[layer.name].group,
                copy.tokens_per_unit,
                (*_shape(copy.source), *_shape(copy.target)),
                conversion,
            )
            made.setdefault(key, []).append(copy)
    tables = [
        _table(group, source_group, tokens, copies, conversion, {x.name: x for x in target.layers})
        for (group, source_group, tokens, _, conversion), copies in made.items()
    ]
    return TransferPlan(
        rank=source_shard.rank,
        tables=tuple(tables),
        source_blocks=source.num_blocks,
        target_blocks=target.num_blocks,
    )


def _conversions(
    there: dict[str, LayerDescriptor],
    target: CacheDescriptor,
    formats: tuple[str, str] | None,
) -> dict[str, Conversion]:
    if formats is None:
        return {}
    found = {
        layer.name: find_conversion(there[layer.name], layer, formats)
        for layer in target.layers
        if layer.name in there
    }
    return {name: conversion for name, conversion in found.items() if conversion is not None}


def _check_same(
    there: dict[str, LayerDescriptor],
    source: CacheDescriptor,
    target: CacheDescriptor,
    conversions: dict[str, Conversion],
    formats: tuple[str, str] | None,
) -> None:
    """
    Raises:
        KVTransferError: what is not converted means different things.
    """
    kept = replace(
        target, layers=tuple(x for x in target.layers if x.name not in conversions or not formats)
    )
    differences = content_differences(kept, source) if kept.layers else []
    missing = {layer.name for layer in target.layers} ^ there.keys()
    if missing:
        differences.append(f"layers on one side only: {', '.join(sorted(missing)[:4])}")
    stored = [layer.dtype for layer in kept.layers if layer.name in there]
    if not differences and formats and formats[0] != formats[1] and "uint8" in stored:
        differences.append(f"--kv-cache-dtype is {formats[1]} here and {formats[0]} there")
    if differences:
        raise KVTransferError(
            f"the caches of the two engines do not mean the same: {'; '.join(differences[:8])}"
        )


def _copy_of_layer(
    layers: tuple[LayerDescriptor, LayerDescriptor],
    caches: tuple[CacheDescriptor, CacheDescriptor],
    shards: tuple[Shard, Shard],
    total_heads: int | None,
    conversion: Conversion | None,
) -> LayerCopy | None:
    """(source, target) each. With a conversion, in bytes as if elements were equally wide."""
    if conversion is not None:
        wide = conversion.target_bytes, conversion.source_bytes
        layers = tuple(  # type: ignore[assignment]
            stretch(layer, factor, conversion.name)
            for layer, factor in zip(layers, wide, strict=True)
        )
        caches = tuple(  # type: ignore[assignment]
            replace(cache, size_bytes=cache.size_bytes * factor)
            for cache, factor in zip(caches, wide, strict=True)
        )
    copy = plan_layer_copy(*layers, *shards, total_heads)
    if copy is not None:
        check_inside(copy, layers[1], *caches)
    return copy


def _table(
    group: int,
    source_group: int,
    tokens: int,
    copies: Sequence[LayerCopy],
    conversion: Conversion | None,
    layers: dict[str, LayerDescriptor],
) -> TransferTable:
    there = here = 1
    converted: tuple[tuple[str, int, int], ...] = ()
    if conversion is not None:
        there, here = conversion.target_bytes, conversion.source_bytes
        # Runs as they are sorted in lanes, each whole contents of its layer.
        runs = sorted(
            (copy.source.offset + source, copy.target.offset + target, length, copy.name)
            for copy in copies
            for source, target, length in _box_runs(copy)
        )
        item = conversion.target_bytes
        converted = tuple(
            (name, layers[name].parts[0][1] // item, layers[name].content_bytes // item)
            for *_, length, name in runs
            for _ in range(length // (layers[name].content_bytes * here))
        )
    return TransferTable(
        group=group,
        source_group=source_group,
        tokens_per_unit=tokens,
        source=_narrow(copies[0].source, there),
        target=_narrow(copies[0].target, here),
        lanes=tuple(
            Lane(
                source=lane.source // there,
                target=lane.target // here,
                length=lane.length // there,
                target_length=lane.length // here,
            )
            for lane in _lanes(copies)
        ),
        copies=tuple(copies),
        conversion=conversion,
        converted=converted,
    )


def check_descriptor(cache: CacheDescriptor) -> None:
    """A descriptor makes sense in itself. A plan takes time and memory by its counts.

    Raises:
        KVTransferError: naming the layer and what is wrong.
    """
    if cache.num_blocks < 1 or cache.size_bytes < 1 or cache.base < 0:
        raise KVTransferError("the cache of the peer has no blocks")
    if cache.num_blocks > 1 << 40 or cache.base + cache.size_bytes >= 1 << 62:
        raise KVTransferError("the cache of the peer ends beyond all addresses")
    for layer in cache.layers:
        axis = layer.head_axis
        counts = (
            layer.tokens_per_block,
            layer.kernel_blocks_per_block,
            layer.num_head_slots,
            layer.num_states,
            layer.content_bytes,
        )
        parts = sum(size for _, size in layer.parts)
        if not 0 <= layer.group < len(cache.groups):
            problem = f"group {layer.group} does not exist"
        elif min(counts) < 1 or max(counts) > cache.size_bytes:
            problem = f"counts {counts}"
        elif max(counts[:-1]) > _LARGEST_COUNT:
            problem = f"counts {counts[:-1]} above {_LARGEST_COUNT}"
        elif not layer.states and parts != layer.content_bytes:
            problem = f"parts of {parts} bytes in a content of {layer.content_bytes}"
        elif axis is not None and (
            axis.count * axis.sides != layer.num_head_slots or axis.stride != layer.head_stride
        ):
            problem = f"heads {axis} in {layer.num_head_slots} slots of {layer.head_stride} bytes"
        else:
            continue
        raise KVTransferError(
            f"the descriptor of the peer contradicts itself: {layer.name}: {problem}"
        )


def check_inside(
    copy: LayerCopy,
    layer: LayerDescriptor,
    source: CacheDescriptor,
    target: CacheDescriptor,
) -> None:
    """Every byte of the copy lies in the two caches: a peer's numbers are not believed.

    Raises:
        KVTransferError: some would not.
    """
    for what, grid, cache in (("source", copy.source, source), ("target", copy.target, target)):
        strides = (grid.block_stride, grid.kernel_stride, grid.part_stride, grid.offset)
        if min(strides) < 0:
            raise KVTransferError(f"{layer.name}: negative strides of the {what}")
        last = grid.start(cache.num_blocks - 1, grid.parts_per_block - 1)
        for box in copy.boxes:
            offset = box.source_offset if what == "source" else box.target_offset
            steps = box.source_strides if what == "source" else box.target_strides
            if offset < 0 or box.length <= 0 or any(step < 0 for step in steps):
                raise KVTransferError(f"{layer.name}: negative sizes of the {what}")
            reach = sum((n - 1) * step for n, step in zip(box.counts, steps, strict=True))
            if last + offset + reach + box.length > cache.size_bytes:
                raise KVTransferError(
                    f"{layer.name}: blocks of the {what} end outside its {cache.size_bytes} bytes"
                )


def _shape(grid: UnitGrid) -> tuple[int, ...]:
    return (
        grid.block_stride,
        grid.kernel_stride,
        grid.part_stride,
        grid.parts_per_kernel,
        grid.parts_per_block,
    )


def _narrow(grid: UnitGrid, factor: int) -> UnitGrid:
    """From offset 0, and without the stretching of a conversion."""
    return UnitGrid(
        offset=0,
        block_stride=grid.block_stride // factor,
        kernel_stride=grid.kernel_stride // factor,
        part_stride=grid.part_stride // factor,
        parts_per_kernel=grid.parts_per_kernel,
        parts_per_block=grid.parts_per_block,
    )


def _lanes(copies: Sequence[LayerCopy]) -> tuple[Lane, ...]:
    """The runs of all layers, those that are neighbours on both sides joined."""
    runs = sorted(
        (
            copy.source.offset + source,
            copy.target.offset + target,
            length,
        )
        for copy in copies
        for source, target, length in _box_runs(copy)
    )
    joined: list[list[int]] = []
    for source, target, length in runs:
        last = joined[-1] if joined else None
        if last and last[0] + last[2] == source and last[1] + last[2] == target:
            last[2] += length
        else:
            joined.append([source, target, length])
    return tuple(Lane(source=s, target=t, length=n, target_length=n) for s, t, n in joined)


def _box_runs(copy: LayerCopy) -> Iterable[tuple[int, int, int]]:
    for box in copy.boxes:
        for index in range(math.prod(box.counts)):
            source, target, rest = box.source_offset, box.target_offset, index
            for count, from_step, to_step in zip(
                reversed(box.counts),
                reversed(box.source_strides),
                reversed(box.target_strides),
                strict=True,
            ):
                rest, position = divmod(rest, count)
                source += position * from_step
                target += position * to_step
            yield source, target, box.length
