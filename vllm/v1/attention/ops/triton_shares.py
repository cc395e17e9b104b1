"""Equal shares of a batch's tokens for programs that stay: the plan of a step, and the merge.

Where a program's partial result is as wide as that of attention to latents (heads x 512 numbers),
items of a few hundred tokens would spend their time on partial results, and one program that
merges a long request's would take longer than all of them read. So as many programs as the device
holds at a time take equal, contiguous shares of all requests' tiles, one after the other, and a
second launch merges what was cut, over all multiprocessors. The plan is made on the device, once
a step for all layers; both launches depend on the number of requests alone.

A program leaves at most two partial results: of the request that a program before it began (slot
``2 * program``), and of the one that a later program ends (``2 * program + 1``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm.utils.dependent_launch import await_previous, options, release

__all__ = [
    "PROGRAM_FIELDS",
    "REQUEST_FIELDS",
    "SHARE_TILE",
    "SharePlan",
    "make_share_buffers",
    "merge_shares",
    "plan_shares",
]

SHARE_TILE = 64
"""Tokens of a tile; programs' own tiles divide it."""
PROGRAM_FIELDS = 4
"""int32 fields of a program: first tile, end tile, first request, last request."""
REQUEST_FIELDS = 8
"""int32 fields of a request: first tile, end tile, length, query row, first and last program."""
# A share is as many tiles at least: shorter ones cost more in merging than they save.
_MIN_TILES = 2
# (requests up to, partial results read at once, columns, programs aimed at)
_MERGES = ((8, 32, 128, 1 << 20), (1 << 30, 8, 256, 2048))


@triton.jit
def _search(ptr, STRIDE: tl.constexpr, count, wanted, STEPS: tl.constexpr):
    """How many of ``count`` ascending numbers are at most ``wanted``, for each of these."""
    low = tl.zeros_like(wanted)
    high = low + count
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        below = middle < high
        value = tl.load(ptr + middle * STRIDE, mask=below, other=0)
        low = tl.where(below & (value <= wanted), middle + 1, low)
        high = tl.where(below & (value > wanted), middle, high)
    return low


@triton.jit(do_not_specialize=["requests", "programs", "min_tiles"])
def _plan_kernel(
    seq_lens_ptr, query_start_ptr, programs_ptr, requests_ptr, requests, programs, min_tiles,
    REQUESTS: tl.constexpr, PROGRAMS: tl.constexpr, REQUEST_STEPS: tl.constexpr,
    PROGRAM_STEPS: tl.constexpr, TILE: tl.constexpr, P_FIELDS: tl.constexpr,
    R_FIELDS: tl.constexpr,
):  # fmt: skip
    """Cut the row of all requests' tiles into shares; one program.

    Equal shares cut most requests. Where cuts of each request into even pieces, or else cuts
    between requests, make no share longer than 17/16 of an equal one, those are taken: fewer
    results are partial.
    """
    request = tl.arange(0, REQUESTS)
    there = request < requests
    row = tl.load(query_start_ptr + request, mask=there, other=0)
    count = tl.load(query_start_ptr + request + 1, mask=there, other=0) - row
    length = tl.load(seq_lens_ptr + request, mask=there & (count == 1), other=0)
    tiles = tl.cdiv(length, TILE)
    end = tl.cumsum(tiles, 0)
    begin = end - tiles
    total = tl.sum(tiles, 0)
    at = requests_ptr + request * R_FIELDS
    tl.store(at, begin, mask=there)
    tl.store(at + 1, end, mask=there)
    tl.store(at + 2, length, mask=there)
    tl.store(at + 3, row, mask=there)

    busy = tl.minimum(programs, tl.maximum(total // min_tiles, 1))
    longest = tl.maximum(
        tl.cdiv(total, busy), (total.to(tl.int64) * 17 // (16 * busy)).to(tl.int32)
    )
    size = tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, tl.maximum(longest, 1)), 1))
    pieces = tl.cdiv(tiles, tl.maximum(size, 1))
    piece_end = tl.cumsum(pieces, 0)
    num_pieces = tl.sum(pieces, 0)
    program = tl.arange(0, PROGRAMS)
    at_program = programs_ptr + program * P_FIELDS
    exists = program < programs
    if num_pieces <= busy:
        tl.store(at_program, total + tl.zeros_like(program), mask=exists)
        tl.debug_barrier()
        for piece in tl.range(0, tl.max(pieces, 0)):
            tl.store(
                programs_ptr + (piece_end - pieces + piece) * P_FIELDS, begin + piece * size,
                mask=piece < pieces,
            )  # fmt: skip
    else:
        equal = tl.minimum(program.to(tl.int64) * total // busy, total).to(tl.int32)
        tl.debug_barrier()
        inside = _search(requests_ptr + 1, R_FIELDS, requests, equal, REQUEST_STEPS)
        at_inside = requests_ptr + inside * R_FIELDS
        before = tl.load(at_inside, mask=inside < requests, other=total)
        after = tl.load(at_inside + 1, mask=inside < requests, other=total)
        between = tl.where(equal - before <= after - equal, before, after)
        tl.store(at_program, between, mask=exists)
        tl.debug_barrier()
        following = tl.load(at_program + P_FIELDS, mask=program + 1 < programs, other=0)
        following = tl.where(program + 1 < programs, following, total)
        widest = tl.max(tl.where(exists, following - between, 0), 0)
        tl.debug_barrier()
        tl.store(at_program, tl.where(widest <= longest, between, equal), mask=exists)
    tl.debug_barrier()
    cut = tl.load(at_program, mask=exists, other=0)
    next_cut = tl.load(at_program + P_FIELDS, mask=program + 1 < programs, other=0)
    next_cut = tl.where(program + 1 < programs, next_cut, total)
    tl.store(at_program + 1, next_cut, mask=exists)
    ends = requests_ptr + 1
    tl.store(at_program + 2, _search(ends, R_FIELDS, requests, cut, REQUEST_STEPS), mask=exists)
    last = _search(ends, R_FIELDS, requests, next_cut - 1, REQUEST_STEPS)
    tl.store(at_program + 3, last, mask=exists)
    first = _search(programs_ptr, P_FIELDS, programs, begin, PROGRAM_STEPS) - 1
    last = _search(programs_ptr, P_FIELDS, programs, end - 1, PROGRAM_STEPS) - 1
    tl.store(at + 4, first, mask=there)
    tl.store(at + 5, tl.where(tiles > 0, last, first), mask=there)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharePlan:
    """The shares of one step.

    Attributes:
        programs: int32 ``(programs, 4)``, requests: int32 ``(R, 8)``; see the fields above.
        head_tiles: programs that take each share, for as many parts of the heads.
    """

    programs: torch.Tensor
    requests: torch.Tensor
    head_tiles: int

    @property
    def num_programs(self) -> int:
        return self.programs.shape[0]


def make_share_buffers(
    requests: int, head_tiles: int, slots: int, device: torch.device
) -> SharePlan:
    """Buffers for plans of up to ``requests`` requests.

    ``slots`` are the programs that the device holds at a time; ``head_tiles`` of them take the
    same share.
    """
    programs = max(1, slots // head_tiles)
    return SharePlan(
        programs=torch.zeros((programs, PROGRAM_FIELDS), dtype=torch.int32, device=device),
        requests=torch.zeros((requests, REQUEST_FIELDS), dtype=torch.int32, device=device),
        head_tiles=head_tiles,
    )


def plan_shares(
    seq_lens: torch.Tensor, query_start_loc: torch.Tensor, buffers: SharePlan
) -> SharePlan:
    """The shares of the requests that have exactly one query token; the others have none.

    Args:
        seq_lens: int32 ``(R,)``, 0 for a request that is not there. query_start_loc: int32
            ``(R + 1,)``.
        buffers: written to.
    """
    requests, programs = seq_lens.shape[0], buffers.num_programs
    assert requests <= buffers.requests.shape[0]
    padded = triton.next_power_of_2(buffers.requests.shape[0])
    _plan_kernel[(1,)](
        seq_lens, query_start_loc, buffers.programs, buffers.requests, requests, programs,
        _MIN_TILES, REQUESTS=padded, PROGRAMS=triton.next_power_of_2(programs),
        REQUEST_STEPS=padded.bit_length(),
        PROGRAM_STEPS=triton.next_power_of_2(programs).bit_length(), TILE=SHARE_TILE,
        P_FIELDS=PROGRAM_FIELDS, R_FIELDS=REQUEST_FIELDS, num_warps=8,
    )  # fmt: skip
    return SharePlan(
        programs=buffers.programs,
        requests=buffers.requests[:requests],
        head_tiles=buffers.head_tiles,
    )


@triton.jit
def _merge_kernel(
    part_ptr, lse_ptr, out_ptr, programs_ptr, requests_ptr, heads, group,
    stride_part_i, stride_part_h, stride_lse_i, stride_o_t, stride_o_h,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr, P_FIELDS: tl.constexpr,
    R_FIELDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some columns of some heads of one request, if it was cut."""
    release(PDL)
    await_previous(PDL)
    request = requests_ptr + tl.program_id(0) * R_FIELDS
    begin = tl.load(request)
    row = tl.load(request + 3).to(tl.int64)
    first = tl.load(request + 4)
    last = tl.load(request + 5)
    if first >= last:
        return
    first_slot = 2 * first + (tl.load(programs_ptr + first * P_FIELDS) < begin)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    valid = columns < WIDTH
    ahead = tl.arange(0, AT_ONCE)
    first_head = tl.program_id(1) * group
    for head in tl.range(first_head, tl.minimum(first_head + group, heads)):
        top = tl.full([AT_ONCE], -1.0e30, tl.float32)
        total = tl.zeros([AT_ONCE], tl.float32)
        acc = tl.zeros([AT_ONCE, COLUMNS], tl.float32)
        for start in tl.range(first, last + 1, AT_ONCE):
            program = start + ahead
            there = program <= last
            slot = tl.where(program == first, first_slot, 2 * program).to(tl.int64)
            lse = tl.load(lse_ptr + slot * stride_lse_i + head, mask=there, other=-1.0e30)
            at_part = part_ptr + (slot * stride_part_i)[:, None] + head * stride_part_h
            part = tl.load(
                at_part + columns[None, :],
                mask=there[:, None] & valid[None, :], other=0.0,
            )  # fmt: skip
            new_top = tl.maximum(top, lse)
            shrink = tl.exp2(top - new_top)
            weight = tl.where(there, tl.exp2(lse - new_top), 0.0)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + part * weight[:, None]
            top = new_top
        weight = tl.exp2(top - tl.max(top, 0))
        out = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)
        tl.store(out_ptr + row * stride_o_t + head * stride_o_h + columns, out, mask=valid)


def merge_shares(part: torch.Tensor, lse: torch.Tensor, out: torch.Tensor, plan: SharePlan) -> None:
    """The outputs of the requests that the plan has cut, from the partial ones.

    Args:
        part: fp32 ``(2 * programs, Q, width)``, normalised; lse: fp32 ``(2 * programs, Q)``, their
            log2-sum-exp, dense in Q.
        out: ``(T, Q, width)``, any strides over T and Q.
    """
    heads, width = part.shape[1:]
    requests = plan.requests.shape[0]
    at_once, columns, aim = next(values for most, *values in _MERGES if requests <= most)
    columns = min(columns, triton.next_power_of_2(width))
    parts = triton.cdiv(width, columns)
    group = max(1, requests * heads * parts // aim)
    _merge_kernel[(requests, triton.cdiv(heads, group), parts)](
        part, lse, out, plan.programs, plan.requests, heads, group, *part.stride()[:2],
        lse.stride(0), *out.stride()[:2], WIDTH=width, COLUMNS=columns, AT_ONCE=at_once,
        P_FIELDS=PROGRAM_FIELDS, R_FIELDS=REQUEST_FIELDS, num_warps=4,
        **options(out.device),
    )  # fmt: skip
