"""Moving and clearing strided bytes on a GPU in one launch: what blocks and boxes come down to.

A *place* is where a unit starts on each side; a box says which bytes of a unit move: runs of one
length at up to three axes of strides. Gathering, scattering, re-layout, head shards and other
block sizes are boxes with different strides on the two sides. Knows no layer and no format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

__all__ = ["LOCAL", "PEER", "MoveShape", "PieceTable", "move_box", "zero_box"]

# Words of 8 bytes that one program moves: 16 KiB, 128 bytes a thread.
_WORDS = 2048
_MAX_AXES = 3
_WORD_DTYPES = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.int8))


@triton.jit(
    do_not_specialize=[
        "source_offset", "target_offset", "total", "parts", "words", "n1", "n2",
        "s0", "s1", "s2", "t0", "t1", "t2",
    ]
)  # fmt: skip
def _move_kernel(
    source_ptr, target_ptr, places_ptr, source_offset, target_offset, total, parts, words, n1, n2,
    s0, s1, s2, t0, t1, t2, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
    ZERO: tl.constexpr,
):  # fmt: skip
    """Some runs, or a part of one, of one unit. Offsets and ``words`` count ``ALIGN`` words.

    A run is cut in ``parts`` of ``BLOCK`` words; ``ROWS`` of the ``total`` parts are a program's.
    """
    places = places_ptr + tl.program_id(0).to(tl.int64) * 2
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    run = row // parts
    at = (row % parts)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    # A mask that changes at whole steps of ALIGN lets stores be as wide.
    valid = (row < total)[:, None] & (at // ALIGN < words)
    i2 = (run % n2).to(tl.int64)
    i1 = (run // n2 % n1).to(tl.int64)
    i0 = (run // n2 // n1).to(tl.int64)
    to = tl.load(places + 1) + target_offset + i0 * t0 + i1 * t1 + i2 * t2
    at_target = target_ptr + to[:, None] * ALIGN + at
    if ZERO:
        tl.store(at_target, tl.zeros([ROWS, BLOCK], target_ptr.dtype.element_ty), mask=valid)
    else:
        start = tl.load(places) + source_offset + i0 * s0 + i1 * s1 + i2 * s2
        value = tl.load(source_ptr + start[:, None] * ALIGN + at, mask=valid)
        tl.store(at_target, value, mask=valid)


def _launch(
    source: torch.Tensor | None,
    target: torch.Tensor,
    places: Sequence[tuple[int, int]],
    offsets: tuple[int, int],
    counts: Sequence[int],
    source_strides: Sequence[int],
    target_strides: Sequence[int],
    length: int,
) -> None:
    if not places or not length:
        return
    assert len(counts) <= _MAX_AXES, f"a box of {len(counts)} axes"
    backings = [target] if source is None else [source, target]
    numbers = [*offsets, length, *source_strides, *target_strides]
    numbers += [number for place in places for number in place]
    numbers += [int(b.storage_offset()) for b in backings]
    numbers += [b.untyped_storage().data_ptr() for b in backings]
    alignment = math.gcd(*numbers)
    size, dtype = next(pair for pair in _WORD_DTYPES if alignment % pair[0] == 0)
    # Two words of 8 bytes at a time, where nothing begins between them.
    align = 2 if alignment % 16 == 0 else 1
    unit = size * align
    words = [b.new_empty(0, dtype=dtype).set_(b.untyped_storage()) for b in backings]
    base = [int(b.storage_offset()) // unit for b in backings]
    table = torch.tensor(places, dtype=torch.int64) // unit
    missing = _MAX_AXES - len(counts)
    sizes = [1] * missing + list(counts)
    strides = [
        [0] * missing + [stride // unit for stride in side]
        for side in (source_strides, target_strides)
    ]
    run = length // size
    block = min(triton.next_power_of_2(run), _WORDS)
    rows = _WORDS // block
    parts = triton.cdiv(run, block)
    total = math.prod(counts) * parts
    _move_kernel[(len(places), triton.cdiv(total, rows))](
        words[0], words[-1], table.to(target.device, non_blocking=True),
        base[0] + offsets[0] // unit, base[-1] + offsets[1] // unit, total, parts, length // unit,
        sizes[1], sizes[2], *strides[0], *strides[1],
        ROWS=rows, BLOCK=block, ALIGN=align, ZERO=source is None, num_warps=4,
    )  # fmt: skip


def move_box(
    source: torch.Tensor,
    target: torch.Tensor,
    places: Sequence[tuple[int, int]],
    *,
    counts: Sequence[int] = (),
    source_offset: int = 0,
    target_offset: int = 0,
    source_strides: Sequence[int] = (),
    target_strides: Sequence[int] = (),
    length: int,
) -> None:
    """Copy ``offset + i0 * stride0 + ... + [0, length)`` of every unit; all numbers are bytes.

    Args:
        source, target: 1-D int8 backings on one device; bytes read are none of those written.
        places: start of each unit in source and in target.
        counts: sizes of at most three axes; strides: their distances on each side.
    """
    _launch(
        source, target, places, (source_offset, target_offset), counts, source_strides,
        target_strides, length,
    )  # fmt: skip


def zero_box(
    target: torch.Tensor,
    starts: Sequence[int],
    *,
    counts: Sequence[int] = (),
    strides: Sequence[int] = (),
    length: int,
) -> None:
    """Clear ``start + i0 * stride0 + ... + [0, length)`` for every start; numbers are bytes."""
    _launch(
        None, target, [(0, start) for start in starts], (0, 0), counts, [0] * len(counts),
        strides, length,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveShape:
    """How a move is cut for a GPU."""

    words: int = _WORDS
    """Of 8 bytes, that a program moves at a time."""
    warps: int = 4
    programs: int = 0
    """At most so many, which then take several parts each; 0: one a part."""


LOCAL = MoveShape()
"""Within one GPU's memory."""
PEER = MoveShape(words=4096, warps=8, programs=1056)
"""Out of the memory of another GPU of this host: 0.93 of a plain copy between two H200."""


@triton.jit(do_not_specialize=["source", "target", "total", "units", "room"])
def _piece_kernel(
    anchor_ptr, starts_ptr, pieces_ptr, source, target, total, units, room, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, ALIGN: tl.constexpr, UNIT: tl.constexpr, PIECES_FIRST: tl.constexpr,
):  # fmt: skip
    """``ROWS`` pieces of one unit at a time. ``source`` and ``target`` count ``UNIT`` bytes from
    the anchor; starts here come ``room`` numbers behind those there.

    Memory of another device of this host may be meant: addresses are the anchor's plus offsets.
    """
    groups = tl.cdiv(total, ROWS)
    at = tl.arange(0, BLOCK)
    for task in range(tl.program_id(0), units * groups, tl.num_programs(0)):
        if PIECES_FIRST:
            unit = task // groups
            group = task % groups
        else:
            unit = task % units
            group = task // units
        row = group * ROWS + tl.arange(0, ROWS)
        inside = row < total
        piece = pieces_ptr + row.to(tl.int64) * 3
        there = tl.load(piece, mask=inside, other=0) // UNIT
        here = tl.load(piece + 1, mask=inside, other=0) // UNIT
        words = tl.load(piece + 2, mask=inside, other=0) // UNIT
        there += source + tl.load(starts_ptr + unit) // UNIT
        here += target + tl.load(starts_ptr + room + unit) // UNIT
        # A mask that changes at whole steps of ALIGN lets loads and stores be as wide.
        valid = inside[:, None] & (at[None, :] // ALIGN < words[:, None])
        value = tl.load(anchor_ptr + there[:, None] * ALIGN + at[None, :], mask=valid)
        tl.store(anchor_ptr + here[:, None] * ALIGN + at[None, :], value, mask=valid)


def _power_of_2(number: int) -> int:
    """The first that is no smaller; Triton's own takes longer than the rest of a move."""
    return 1 << (number - 1).bit_length()


class _Upload:
    """Pinned memory for two rows of ``room`` numbers on their way to a GPU."""

    def __init__(self, room: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._device = device
        self._memory = torch.empty((2, room), dtype=torch.int64, pin_memory=on_gpu)
        self._rows = self._memory.numpy()
        self._copied = torch.cuda.Event() if on_gpu else None

    @property
    def is_free(self) -> bool:
        """What it held last has been copied."""
        return self._copied is None or self._copied.query()

    def send(self, first: np.ndarray, second: np.ndarray) -> torch.Tensor:
        """Both rows on the device, by the current stream; what lies behind them is anything."""
        self._rows[0, : len(first)] = first
        self._rows[1, : len(second)] = second
        return self._memory.to(self._device, non_blocking=True)

    def is_sent(self) -> None:
        """Called after ``send``, once the work that waits for it has been queued."""
        if self._copied is not None:
            self._copied.record()


class PieceTable:
    """Pieces of units on a device: see ``pieces.PieceMover``, whose GPU side this is.

    Args:
        pieces: int64 ``(pieces, 3)``: offset there, offset here, bytes.
        grain: bytes that every start is a multiple of, on both sides.
        apart: bytes from one unit to the next there, where they are neighbours.
    """

    def __init__(
        self,
        pieces: np.ndarray,
        device: torch.device,
        shape: MoveShape | None = None,
        *,
        grain: int,
        apart: int,
    ) -> None:
        self._shape = LOCAL if shape is None else shape
        self._device = device
        longest = self._shape.words * 8
        cut = [
            (there + done, here + done, min(longest, length - done))
            for there, here, length in pieces.tolist()
            for done in range(0, length, longest)
        ]
        table = np.array(cut, dtype=np.int64).reshape(-1, 3)
        self._longest = int(table[:, 2].max(initial=0))
        self._count = len(table)
        # What runs at the same time lies close together: few address translations.
        self._pieces_first = bool(self._count) and int(np.ptp(table[:, 0])) < apart
        self._table = torch.from_numpy(table).to(device)
        anchor = torch.empty(2, dtype=torch.int64, device=device)
        self._anchor = anchor.data_ptr()
        self._words = [(size, anchor.view(dtype)) for size, dtype in _WORD_DTYPES]
        self._bits = int(np.bitwise_or.reduce(table.ravel())) | grain | self._anchor
        self._uploads: dict[int, list[_Upload]] = {}

    def move(
        self, source: int, target: int, source_starts: np.ndarray, target_starts: np.ndarray
    ) -> None:
        """Queue the copies of all units on the current stream."""
        units = len(source_starts)
        if not units or not self._count:
            return
        bits = self._bits | source | target
        size, words = next(pair for pair in self._words if bits % pair[0] == 0)
        align = 2 if bits % 16 == 0 else 1
        unit = size * align
        block = _power_of_2(self._longest // size)
        rows = max(1, self._shape.words // block)
        tasks = units * -(-self._count // rows)
        room = _power_of_2(units)
        upload = self._upload(room)
        _piece_kernel[(min(tasks, self._shape.programs or tasks),)](
            words, upload.send(source_starts, target_starts), self._table,
            (source - self._anchor) // unit, (target - self._anchor) // unit, self._count, units,
            room, ROWS=rows, BLOCK=block, ALIGN=align, UNIT=unit, PIECES_FIRST=self._pieces_first,
            num_warps=self._shape.warps,
        )  # fmt: skip
        upload.is_sent()

    def _upload(self, room: int) -> _Upload:
        """One that nothing is copied out of any more."""
        made = self._uploads.setdefault(room, [])
        for upload in made:
            if upload.is_free:
                return upload
        made.append(_Upload(room, self._device))
        return made[-1]
