"""Sums and joins of few rows over the GPUs of one host: one kernel, which sends and waits.

Every rank writes its part straight into the others' memory, in words of 32 bits. A reader looks at
its own memory until no word there is the one that means "not yet", and puts that word back for the
next exchange: data are their own signal, with no fence, no flag, and one trip over the link. Data
that happen to be that word are sent as a neighbour of the same value. Plain loads and stores only;
NVLink multicast is not used.

Two halves of each area take turns. A rank writes exchange n + 2 after its kernel of n + 1 has
ended, which had words of n + 1 from every rank; those were written after the writer's kernel of n
had ended, which had read and put back all of n: nobody writes over what is still read. The number
lies on the device, where captured graphs can count it; all ranks run the same exchanges in the
same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm.utils.dependent_launch import await_previous, options, release

__all__ = ["AREA_BYTES", "PeerWords"]

AREA_BYTES = 32 << 20
"""Of each rank's area; shared by the parts of all ranks, in two halves."""

# Two negative zeros of 16 bits, or a float32 of -4.6e-41.
_NOT_YET = tl.constexpr(0x80008000 - (1 << 32))
# Sent in its place: zero and negative zero, or a float32 next to it.
_INSTEAD_OF_HALVES = tl.constexpr(0x80000000 - (1 << 32))
_INSTEAD_OF_WHOLE = tl.constexpr(0x80008001 - (1 << 32))
_MAX_SENT_BYTES = 16 << 20
# All programs of a kernel wait at once, so that all must be able to run at once: one of the largest
# on each multiprocessor, which its registers allow.
_WARPS_OF_MULTIPROCESSOR = 16
_MAX_ROW_WORDS = 16384
_COLUMN_WORDS = 4096
_COLUMN_WARPS = 8
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _first_number(word, DTYPE: tl.constexpr):
    """The number in the low bits of 32, in float32."""
    if DTYPE.primitive_bitwidth == 32:
        number = word.to(tl.float32, bitcast=True)
    else:
        number = word.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return number


@triton.jit
def _second_number(word, DTYPE: tl.constexpr):
    """The number in the high bits; a word of 32-bit numbers has none."""
    if DTYPE.primitive_bitwidth == 32:
        number = tl.zeros_like(word).to(tl.float32)
    else:
        number = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return number


@triton.jit
def _rounded(number, DTYPE: tl.constexpr):
    return number.to(DTYPE).to(tl.float32)


@triton.jit
def _word(first, second, DTYPE: tl.constexpr):
    """The word of two numbers, or of one of 32 bits."""
    if DTYPE.primitive_bitwidth == 32:
        word = first.to(tl.int32, bitcast=True)
    else:
        low = first.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high = second.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
        word = low | (high << 16)
    return word


@triton.jit
def _send(
    areas_ptr, data, number, place, valid, capacity, RANK: tl.constexpr, WORLD: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Write ``data`` (int32) to ``place`` of this rank's part in every other rank's area."""
    INSTEAD: tl.constexpr = _INSTEAD_OF_WHOLE if WIDE else _INSTEAD_OF_HALVES
    words = tl.where(data == _NOT_YET, INSTEAD, data)
    part = (number & 1) * WORLD + RANK
    for other in tl.static_range(WORLD):
        if other != RANK:
            area = tl.load(areas_ptr + other).to(tl.pointer_type(tl.int32))
            area = tl.multiple_of(area, 16)
            tl.store(area + part.to(tl.int64) * capacity + place, words, mask=valid)


@triton.jit
def _receive(
    areas_ptr, source, number, place, valid, capacity, RANK: tl.constexpr, WORLD: tl.constexpr
):  # fmt: skip
    """What rank ``source`` has sent to ``place``, once all of it is there."""
    area = tl.multiple_of(tl.load(areas_ptr + RANK).to(tl.pointer_type(tl.int32)), 16)
    part = (number & 1) * WORLD + source
    at = area + part.to(tl.int64) * capacity + place
    words = tl.load(at, mask=valid, other=0, volatile=True)
    while tl.max((words == _NOT_YET).to(tl.int32), 0) > 0:
        words = tl.load(at, mask=valid, other=0, volatile=True)
    tl.store(at, tl.full(words.shape, _NOT_YET, tl.int32), mask=valid)
    return words


@triton.jit
def _count(control_ptr, number, programs):
    """The last program to come here ends the exchange."""
    if tl.atomic_add(control_ptr + 1, 1, sem="acq_rel") == programs - 1:
        tl.store(control_ptr + 1, 0)
        tl.store(control_ptr, number)


@triton.jit
def _sum_kernel(
    x_ptr, residual_ptr, weight_ptr, areas_ptr, control_ptr, eps, stride_x, stride_r, words,
    capacity, RANK: tl.constexpr, WORLD: tl.constexpr, NORM: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row, in words of 32 bits: the sum over the ranks; with NORM it is added to the residual,
    and the norm of that comes out. Ranks are added in order: all see the same bits.
    """
    release(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    valid = at < words
    weight = at
    if NORM:
        weight = tl.load(weight_ptr + at, mask=valid, other=0)
    await_previous(PDL)
    number = tl.load(control_ptr, volatile=True) + 1
    mine = tl.load(x_ptr + row * stride_x + at, mask=valid, other=0)
    place = row * words + at
    _send(
        areas_ptr, mine, number, place, valid, capacity, RANK, WORLD,
        DTYPE.primitive_bitwidth == 32,
    )  # fmt: skip
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    for source in tl.static_range(WORLD):
        if source == RANK:
            word = mine
        else:
            word = _receive(areas_ptr, source, number, place, valid, capacity, RANK, WORLD)
        first += _first_number(word, DTYPE)
        second += _second_number(word, DTYPE)
    first = _rounded(first, DTYPE)
    second = _rounded(second, DTYPE)
    if NORM:
        at_residual = residual_ptr + row * stride_r + at
        residual = tl.load(at_residual, mask=valid, other=0)
        first = _rounded(first + _first_number(residual, DTYPE), DTYPE)
        second = _rounded(second + _second_number(residual, DTYPE), DTYPE)
        tl.store(at_residual, _word(first, second, DTYPE), mask=valid)
        squares = tl.sum(first * first + second * second, 0)
        numbers = words if DTYPE.primitive_bitwidth == 32 else 2 * words
        scale = tl.rsqrt(squares / numbers + eps)
        first = first * scale * _first_number(weight, DTYPE)
        second = second * scale * _second_number(weight, DTYPE)
    tl.store(x_ptr + row * stride_x + at, _word(first, second, DTYPE), mask=valid)
    _count(control_ptr, number, tl.num_programs(0))


@triton.jit
def _join_kernel(
    x_ptr, out_ptr, areas_ptr, control_ptr, stride_x, stride_o, words, capacity,
    RANK: tl.constexpr, WORLD: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Some columns of one row of every rank, side by side in rank order."""
    release(PDL)
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = at < words
    number = tl.load(control_ptr, volatile=True) + 1
    mine = tl.load(x_ptr + row * stride_x + at, mask=valid, other=0)
    place = row * words + at
    _send(areas_ptr, mine, number, place, valid, capacity, RANK, WORLD, WIDE)
    for source in tl.static_range(WORLD):
        if source == RANK:
            word = mine
        else:
            word = _receive(areas_ptr, source, number, place, valid, capacity, RANK, WORLD)
        tl.store(out_ptr + row * stride_o + source * words + at, word, mask=valid)
    _count(control_ptr, number, tl.num_programs(0) * tl.num_programs(1))


def _row_words(tensor: torch.Tensor) -> int:
    """Words of 32 bits in a row, the last of them perhaps not full."""
    return triton.cdiv(tensor.shape[-1] * tensor.element_size(), 4) if tensor.dim() else 0


def _sum_warps(words: int) -> int:
    return min(max(triton.next_power_of_2(words) // 256, 1), 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerWords:
    """The exchanges of one rank.

    Args:
        areas: of every rank, as this process sees them: int32 and equally long, cleared by
            ``clear`` before any rank begins.
        addresses: where they begin, int64 ``(world,)`` on the device.
        control: int32 ``(2,)`` on the device, zero at first: the number of the last exchange, and
            how many programs of the running one have ended.
        max_warps: that the device runs at once.
    """

    rank: int
    areas: tuple[torch.Tensor, ...]
    addresses: torch.Tensor
    control: torch.Tensor
    max_warps: int

    @staticmethod
    def clear(area: torch.Tensor) -> None:
        """Say of every word of ``area`` (int32) that nothing has come yet."""
        area.fill_(_NOT_YET.value)

    @classmethod
    def of(cls, rank: int, areas: list[torch.Tensor]) -> PeerWords:
        device = areas[rank].device
        # Elsewhere programs run one after the other, in the same order on all ranks.
        multiprocessors = 4
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        return cls(
            rank=rank,
            areas=tuple(areas),
            addresses=torch.tensor([area.data_ptr() for area in areas], device=device),
            control=torch.zeros(2, dtype=torch.int32, device=device),
            max_warps=_WARPS_OF_MULTIPROCESSOR * multiprocessors,
        )

    @property
    def world_size(self) -> int:
        return len(self.areas)

    @property
    def _capacity(self) -> int:
        """Words of one rank's part in one half of an area."""
        return self.areas[0].numel() // (2 * self.world_size)

    def _fits(self, tensor: torch.Tensor, warps_per_row: int) -> bool:
        """``tensor`` is rows of whole words, as many as there can be."""
        if tensor.dim() != 2 or tensor.dtype not in _DTYPES or not tensor.numel():
            return False
        rows, row_bytes = tensor.shape[0], tensor.shape[1] * tensor.element_size()
        words = rows * row_bytes // 4
        return (
            tensor.stride(1) == 1
            and row_bytes % 4 == 0
            and tensor.stride(0) * tensor.element_size() % 4 == 0
            and tensor.data_ptr() % 4 == 0
            and rows * warps_per_row <= self.max_warps
            and words <= self._capacity
            and 4 * words * (self.world_size - 1) <= _MAX_SENT_BYTES
        )

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether ``all_reduce`` can sum ``tensor``; the same on all ranks for equal tensors."""
        words = _row_words(tensor)
        return words <= _MAX_ROW_WORDS and self._fits(tensor, _sum_warps(words))

    def takes_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether ``add_rms_norm`` can take these; the same on all ranks."""
        return (
            self.takes(x)
            and residual.dtype is x.dtype
            and weight.dtype is x.dtype
            and weight.is_contiguous()
            and residual.stride(-1) == 1
            and residual.stride(0) * residual.element_size() % 4 == 0
        )

    def takes_join(self, tensor: torch.Tensor) -> bool:
        """Whether ``all_gather`` can join ``tensor``; the same on all ranks."""
        programs = triton.cdiv(_row_words(tensor), _COLUMN_WORDS)
        return self._fits(tensor, programs * _COLUMN_WARPS)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum ``x`` (T, h), which ``takes`` accepts, over the ranks, in place."""
        self._sum(x, None, None, 0.0)
        return x

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None:
        """In place: ``residual += sum of x over the ranks``, then ``x = rms_norm(residual)``.

        Args:
            x: (T, h); residual: (T, h); weight: (h,), all of one dtype.
        """
        self._sum(x, residual, weight, eps)

    def _sum(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
    ) -> None:
        words = x.view(torch.int32)
        wide = None if residual is None else residual.view(torch.int32)
        block = triton.next_power_of_2(words.shape[1])
        _sum_kernel[(x.shape[0],)](
            words, wide, None if weight is None else weight.view(torch.int32), self.addresses,
            self.control, eps, words.stride(0), 0 if wide is None else wide.stride(0),
            words.shape[1], self._capacity, RANK=self.rank, WORLD=self.world_size,
            NORM=residual is not None, DTYPE=_DTYPES[x.dtype], BLOCK=block,
            num_warps=_sum_warps(words.shape[1]), **options(x.device),
        )  # fmt: skip

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' ``x`` (T, n), which ``takes_join`` accepts, side by side: (T, world * n)."""
        rows, columns = x.shape
        out = torch.empty((rows, self.world_size * columns), dtype=x.dtype, device=x.device)
        words, joined = x.view(torch.int32), out.view(torch.int32)
        _join_kernel[(rows, triton.cdiv(words.shape[1], _COLUMN_WORDS))](
            words, joined, self.addresses, self.control, words.stride(0), joined.stride(0),
            words.shape[1], self._capacity, RANK=self.rank, WORLD=self.world_size,
            WIDE=x.element_size() == 4, BLOCK=_COLUMN_WORDS, num_warps=_COLUMN_WARPS,
            **options(x.device),
        )  # fmt: skip
        return out
