"""Decode attention over the packed, paged cache in Triton, in work items planned on the device.

The cache is a view of logical shape ``(B, H, N, 2 * D)`` with any strides over B, H and N and a
dense last dimension: K in ``[..., :D]``, V in ``[..., D:]``; or the bytes of a quantised format
(``kv_formats``). Every address is a stride times an index.

A work item is a stretch of one request's tokens. The plan, made once a step for all layers, cuts
long requests so that items are about equal and enough of them keep the device busy. It depends on
the lengths, which only the device has to know: the launch depends on the number of requests
alone, so a CUDA graph can hold it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vllm.utils.dependent_launch import await_previous, options, release
from vllm.v1.attention.ops.kv_formats import KVFormat, SideScales
from vllm.v1.attention.ops.triton_formats import FormatArguments, layer_scales, scaled, widened
from vllm.v1.attention.ops.triton_slot_codes import slot_constants, slot_keys, slot_values
from vllm.v1.attention.ops.triton_softmax import open_softmax, score, softmax_step

__all__ = [
    "MAX_SPLITS",
    "WAVES",
    "DecodePlan",
    "decode_attention",
    "finish_item",
    "make_plan_buffers",
    "max_items",
    "num_multiprocessors",
    "open_item",
    "plan_decodes",
]

# int32 fields of an item: request, first token, end, split, number of splits, query row.
_FIELDS = 8
_ITEM_FIELDS = tl.constexpr(_FIELDS)
# Shortest stretch worth a program of its own, in tokens.
_MIN_CHUNK = 256
# One program merges the splits of a request and head: no more than this many.
MAX_SPLITS = 64
# Programs per multiprocessor that the plan aims at; two to four are resident at a time.
WAVES = 8
# Items begin at multiples of this: a multiple of every tile.
_ALIGN = 64


@triton.jit(do_not_specialize=["requests", "target", "min_chunk"])
def _plan_kernel(
    seq_lens_ptr, query_start_ptr, items_ptr, count_ptr, requests, target, min_chunk, window,
    REQUESTS: tl.constexpr, MAX_SPLITS: tl.constexpr, ALIGN: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Cut every request with one query token into stretches; one program."""
    request = tl.arange(0, REQUESTS)
    valid = request < requests
    row = tl.load(query_start_ptr + request, mask=valid, other=0)
    query_len = tl.load(query_start_ptr + request + 1, mask=valid, other=0) - row
    length = tl.load(seq_lens_ptr + request, mask=valid & (query_len == 1), other=0)
    lowest = tl.where(window > 0, tl.maximum(length - window, 0), 0) // ALIGN * ALIGN
    span = length - lowest
    total = tl.sum(span, 0)
    longest = tl.max(span, 0)
    chunk = tl.maximum(tl.cdiv(total, target), tl.cdiv(longest, MAX_SPLITS))
    chunk = tl.maximum(chunk, min_chunk)
    # Even stretches: a request just longer than a chunk is cut in halves.
    size = tl.cdiv(tl.cdiv(span, tl.maximum(tl.cdiv(span, chunk), 1)), ALIGN) * ALIGN
    splits = tl.cdiv(span, tl.maximum(size, 1))
    end = tl.cumsum(splits, 0)
    tl.store(count_ptr, tl.sum(splits, 0))
    for split in tl.range(0, tl.max(splits, 0)):
        at = items_ptr + (end - splits + split) * FIELDS
        mine = split < splits
        start = lowest + split * size
        tl.store(at, request, mask=mine)
        tl.store(at + 1, start, mask=mine)
        tl.store(at + 2, tl.minimum(start + size, length), mask=mine)
        tl.store(at + 3, split + tl.zeros_like(splits), mask=mine)
        tl.store(at + 4, splits, mask=mine)
        tl.store(at + 5, row, mask=mine)
        tl.store(at + 6, length, mask=mine)


@triton.jit
def open_item(items_ptr, index):
    """Request, first token, end, split, number of splits, query row (int64), length."""
    item = items_ptr + index * _ITEM_FIELDS
    row = tl.load(item + 5).to(tl.int64)
    return (
        tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4),
        row, tl.load(item + 6),
    )  # fmt: skip


@triton.jit
def finish_item(
    acc, total, top, out_ptr, part_ptr, lse_ptr, arrived_ptr, index, request, split, num_splits,
    row, head, heads, row_valid, dims, stride_o_t, stride_o_h, stride_part_i, stride_part_h,
    stride_lse_i, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MAX_SPLITS: tl.constexpr, AT_ONCE: tl.constexpr, GROUP: tl.constexpr = 0,
    GROUP_PAD: tl.constexpr = 0, sums_ptr=None, stride_sums_t=0,
):  # fmt: skip
    """Write an item's output ``(ROWS, COLUMNS)``, column c being dimension ``dims[c]``.

    An item that is all of its request writes the output; the others leave it (fp32) and its
    log2-sum-exp, and the last to arrive merges them, in the order of the tokens.

    AT_ONCE: parts of all ``ROWS`` that a merging program has in its registers. GROUP: only so many
    rows are heads, ``head * GROUP`` and the next; the merge then reads more parts of these
    (``GROUP_PAD``, a power of two) instead. sums_ptr: where log2-sum-exps of all tokens go, too.
    """
    columns = tl.arange(0, COLUMNS)
    in_content = columns < D
    at_out = out_ptr + row * stride_o_t
    if num_splits == 1:
        tl.store(
            at_out + heads[:, None] * stride_o_h + dims[None, :], acc,
            mask=row_valid[:, None] & in_content[None, :],
        )  # fmt: skip
        if sums_ptr is not None:
            at_sums = sums_ptr + row * stride_sums_t + heads
            tl.store(at_sums, top + tl.log2(total), mask=row_valid)
        return
    mine = index.to(tl.int64)
    tl.store(
        part_ptr + mine * stride_part_i + heads[:, None] * stride_part_h + columns[None, :], acc,
        mask=row_valid[:, None] & in_content[None, :],
    )  # fmt: skip
    tl.store(lse_ptr + mine * stride_lse_i + heads, top + tl.log2(total), mask=row_valid)
    # All threads have written before the one that counts says so.
    tl.debug_barrier()
    arrived = arrived_ptr + request * tl.num_programs(0) + head
    if tl.atomic_add(arrived, 1, sem="acq_rel") != num_splits - 1:
        return
    # For the next launch.
    tl.store(arrived, 0)
    if GROUP > 0:
        heads = head * GROUP + tl.arange(0, GROUP_PAD)
        row_valid = tl.arange(0, GROUP_PAD) < GROUP
    MERGED: tl.constexpr = heads.shape[0]
    PARTS: tl.constexpr = AT_ONCE * ROWS // MERGED
    at_lse = lse_ptr + (mine - split) * stride_lse_i + heads
    at_part = part_ptr + (mine - split) * stride_part_i
    at_part = at_part + heads[:, None] * stride_part_h + columns[None, :]
    # Past the first-level cache, which knows nothing of other multiprocessors' writes.
    splits = tl.arange(0, MAX_SPLITS)
    all_lse = tl.load(
        at_lse[None, :] + splits[:, None] * stride_lse_i,
        mask=(splits < num_splits)[:, None] & row_valid[None, :], other=-1.0e30,
        cache_modifier=".cg",
    )  # fmt: skip
    top = tl.max(all_lse, 0)
    total = tl.sum(tl.exp2(all_lse - top[None, :]), 0)
    acc = tl.zeros([MERGED, COLUMNS], tl.float32)
    # Reads that don't wait for each other: a turn costs as long as one of them.
    for begin in tl.range(0, num_splits, PARTS):
        other = begin + tl.arange(0, PARTS)
        there = (other < num_splits)[:, None] & row_valid[None, :]
        lse = tl.load(
            at_lse[None, :] + other[:, None] * stride_lse_i, mask=there, other=-1.0e30,
            cache_modifier=".cg",
        )  # fmt: skip
        parts = tl.load(
            at_part[None, :, :] + other[:, None, None] * stride_part_i,
            mask=there[:, :, None] & in_content[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        acc += tl.sum(parts * tl.exp2(lse - top[None, :])[:, :, None], 0)
    tl.store(
        at_out + heads[:, None] * stride_o_h + dims[None, :], acc / total[:, None],
        mask=row_valid[:, None] & in_content[None, :],
    )  # fmt: skip
    if sums_ptr is not None:
        tl.store(sums_ptr + row * stride_sums_t + heads, top + tl.log2(total), mask=row_valid)


@triton.jit
def _decode_kernel(
    q_ptr, kv_ptr, kv_scale_ptr, levels_ptr, out_ptr, part_ptr, lse_ptr, block_table_ptr, items_ptr,
    count_ptr, arrived_ptr, slopes_ptr, sinks_ptr, scale, v_scale, soft_cap,
    stride_q_t, stride_q_h, stride_o_t, stride_o_h,
    stride_kv_b, stride_kv_h, stride_kv_n, stride_s_b, stride_s_h, stride_s_n, stride_bt,
    stride_part_i, stride_part_h, stride_lse_i,
    WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr, MAX_SPLITS: tl.constexpr, FORMAT: tl.constexpr, V_AT: tl.constexpr,
    V_SCALE_AT: tl.constexpr, UNIT: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    K_ASM: tl.constexpr, V_ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One item, for all query heads of one KV head.

    The query heads that share a KV head are the rows of one tile, so that a page is read once for
    all of them.
    """
    release(PDL)
    await_previous(PDL)
    head = tl.program_id(0)
    index = tl.program_id(1)
    if index >= tl.load(count_ptr):
        return
    request, start, end, split, num_splits, row, length = open_item(items_ptr, index)

    rows = tl.arange(0, ROWS)
    row_valid = rows < GROUP
    heads = head * GROUP + rows
    dims = tl.arange(0, D_PAD)
    dim_valid = dims < D
    q = tl.load(
        q_ptr + row * stride_q_t + heads[:, None] * stride_q_h + dims[None, :],
        mask=row_valid[:, None] & dim_valid[None, :], other=0.0,
    )  # fmt: skip
    positions_q = tl.zeros([ROWS], tl.int32) + (length - 1)
    slopes, top, total = open_softmax(
        slopes_ptr, sinks_ptr, heads, row_valid, split == 0, ROWS, HAS_ALIBI, HAS_SINKS
    )
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    # Of a token's key and value; with a zero, too, in TurboQuant's slots.
    IS_SLOT: tl.constexpr = FORMAT >= 7
    HAS_SCALES: tl.constexpr = ((FORMAT >= 3) & (FORMAT <= 5)) | (FORMAT >= 8)
    BYTES_PAD: tl.constexpr = D_PAD // 2 if FORMAT >= 5 else D_PAD
    NUM_BYTES: tl.constexpr = D // 2 if FORMAT >= 5 else D
    GROUPS: tl.constexpr = D_PAD // 16
    group = tl.arange(0, GROUPS)
    byte = tl.arange(0, BYTES_PAD)
    byte_valid = byte < NUM_BYTES
    k_scales = tl.zeros([TILE], tl.float32)
    base = head.to(tl.int64) * stride_kv_h * UNIT
    scale_base = head.to(tl.int64) * stride_s_h
    table = block_table_ptr + request.to(tl.int64) * stride_bt
    for begin in tl.range(start, end, TILE):
        begin = tl.multiple_of(begin, TILE)
        tokens = begin + tl.arange(0, TILE)
        valid = tokens < end
        if WINDOW > 0:
            valid = valid & (tokens >= length - WINDOW)
        if PAGE % TILE == 0:
            # A tile lies in one page.
            block = tl.load(table + begin // PAGE).to(tl.int64)
        else:
            block = tl.load(table + tokens // PAGE, mask=valid, other=0).to(tl.int64)
        at = base + block * stride_kv_b * UNIT + (tokens % PAGE) * stride_kv_n * UNIT
        if FORMAT >= 3:
            at_scale = kv_scale_ptr + scale_base + block * stride_s_b + tokens % PAGE * stride_s_n
        if FORMAT == 0:
            k = tl.load(
                kv_ptr + at[None, :] + dims[:, None], mask=valid[None, :] & dim_valid[:, None],
                other=0.0,
            )  # fmt: skip
            v = tl.load(
                kv_ptr + at[:, None] + (V_AT + dims)[None, :],
                mask=valid[:, None] & dim_valid[None, :], other=0.0,
            )  # fmt: skip
        elif IS_SLOT:
            # Whatever lies behind the last token are numbers, of weight 0.
            k = slot_keys(kv_ptr + at, levels_ptr, D, K_BITS, K_ASM, q.dtype)
            v = slot_values(kv_ptr + at + V_AT, D, V_BITS, V_ASM, q.dtype)
        else:
            there = valid[:, None] & byte_valid[None, :]
            at_byte = kv_ptr + at[:, None] + byte[None, :]
            raw_k = tl.load(at_byte, mask=there, other=0)
            raw_v = tl.load(at_byte + V_AT, mask=there, other=0)
            k = widened(raw_k, q.dtype, FORMAT)
            v = widened(raw_v, q.dtype, FORMAT)
            if FORMAT == 6:
                there = valid[:, None] & (group < D // 16)[None, :]
                at_group = at_scale[:, None] + group[None, :]
                k = scaled(k, tl.load(at_group, mask=there, other=0), GROUPS)
                v = scaled(v, tl.load(at_group + V_SCALE_AT, mask=there, other=0), GROUPS)
            k = tl.trans(k)
        if HAS_SCALES:
            k_scales = tl.load(at_scale, mask=valid, other=0.0).to(tl.float32)
        s = score(
            q, k, k_scales, positions_q, tokens, slopes, scale, soft_cap, HAS_SCALES, HAS_SOFT_CAP,
            HAS_ALIBI, PRECISION,
        )  # fmt: skip
        s = tl.where(valid[None, :], s, float("-inf"))
        p, shrink, total, top = softmax_step(s, top, total)
        acc = acc * shrink[:, None]
        if IS_SLOT:
            zeros = tl.load(at_scale + V_SCALE_AT + 1, mask=valid, other=0.0).to(tl.float32)
        if HAS_SCALES | IS_SLOT:
            v_scales = tl.load(at_scale + V_SCALE_AT, mask=valid, other=0.0).to(tl.float32)
        if IS_SLOT:
            # Codes come less half their number.
            zeros += v_scales * (1 << (V_BITS - 1))
            acc += tl.sum(p * zeros[None, :], 1)[:, None]
        if HAS_SCALES | IS_SLOT:
            p = p * v_scales[None, :]
        acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    acc *= (v_scale / total)[:, None]
    # More would take registers from the loop: 255 instead of 80 with 16 heads.
    AT_ONCE: tl.constexpr = 4 if GROUP_PAD <= 4 else (2 if GROUP_PAD <= 8 else 1)
    finish_item(
        acc, total, top, out_ptr, part_ptr, lse_ptr, arrived_ptr, index, request, split, num_splits,
        row, head, heads, row_valid, dims, stride_o_t, stride_o_h, stride_part_i, stride_part_h,
        stride_lse_i, D, ROWS, D_PAD, MAX_SPLITS, AT_ONCE, GROUP, GROUP_PAD,
    )  # fmt: skip


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 stand in for them under the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """The work items of one step.

    Attributes:
        items: int32 ``(max_items, 8)``, of which ``count`` (int32 ``(1,)``) are filled.
        arrived: int32 ``(R, KV heads)``, zero between launches.
        num_items: rows of ``items`` that a launch has to cover; the same for the same number
            of requests.
        waves: programs per multiprocessor that the plan aims at.
    """

    items: torch.Tensor
    count: torch.Tensor
    arrived: torch.Tensor
    num_items: int
    waves: int = WAVES


def max_items(
    requests: int, kv_heads: int, max_seq_len: int, programs: int, waves: int = WAVES
) -> int:
    """Items of a plan at most.

    Each request has its last stretch, and all others are at least a chunk long.
    """
    return min(
        requests + _target(kv_heads, programs, waves),
        requests * -(-(max_seq_len + _ALIGN) // _MIN_CHUNK),
    )


def _target(kv_heads: int, programs: int, waves: int) -> int:
    return -(-waves * programs // kv_heads)


def make_plan_buffers(
    requests: int, kv_heads: int, max_seq_len: int, device: torch.device, waves: int = WAVES
) -> DecodePlan:
    """Buffers for plans of up to ``requests`` requests of up to ``max_seq_len`` tokens.

    ``waves`` are programs per multiprocessor that a plan aims at.
    """
    items = max_items(requests, kv_heads, max_seq_len, num_multiprocessors(device), waves)
    options: dict[str, Any] = {"dtype": torch.int32, "device": device}
    return DecodePlan(
        items=torch.zeros((items, _FIELDS), **options),
        count=torch.zeros(1, **options),
        arrived=torch.zeros((requests, kv_heads), **options),
        num_items=items,
        waves=waves,
    )


def plan_decodes(
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    kv_heads: int,
    max_seq_len: int,
    window: int = 0,
    buffers: DecodePlan | None = None,
    waves: int = WAVES,
) -> DecodePlan:
    """The items of the requests that have exactly one query token; the others get none.

    Args:
        seq_lens: int32 ``(R,)``, 0 for a request that is not there. query_start_loc: int32
            ``(R + 1,)``.
        max_seq_len: no request is ever longer; with ``buffers``, what they were made for.
        window: tokens that a query sees; 0 for all.
        buffers: written to; new ones, for ``waves`` programs per multiprocessor, where None.
    """
    requests = seq_lens.shape[0]
    programs = num_multiprocessors(seq_lens.device)
    if buffers is None:
        buffers = make_plan_buffers(requests, kv_heads, max_seq_len, seq_lens.device, waves)
    waves = buffers.waves
    _plan_kernel[(1,)](
        seq_lens, query_start_loc, buffers.items, buffers.count, requests,
        _target(kv_heads, programs, waves), _MIN_CHUNK, window,
        REQUESTS=triton.next_power_of_2(buffers.arrived.shape[0]), MAX_SPLITS=MAX_SPLITS,
        ALIGN=_ALIGN, FIELDS=_FIELDS, num_warps=4,
    )  # fmt: skip
    return DecodePlan(
        items=buffers.items,
        count=buffers.count,
        arrived=buffers.arrived,
        num_items=max_items(requests, kv_heads, max_seq_len, programs, waves),
        waves=waves,
    )


def decode_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
    plan: DecodePlan,
    block_table: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    tile: int,
    num_warps: int,
    num_stages: int,
    fmt: KVFormat | None = None,
    scales: SideScales | None = None,
) -> None:
    """Attention of the planned requests' tokens into their rows of ``out``.

    Args:
        q, out: ``(T, Q, D)``, any strides over T and Q, dense D.
        kv_cache: ``(B, H, N, 2 * D)`` view in the dtype of ``q``, dense last dimension; with
            ``fmt`` single bytes, ``(B, H, N, 2 * side_bytes)``.
        block_table: int32 ``(R, max_blocks)`` of blocks of ``N`` tokens.
        tile: tokens of one iteration; divides 64.
        scales: of the layer, for a format with one per tensor.
    """
    shared = layer_scales(fmt, scales)
    num_heads, head_size = q.shape[1], q.shape[2]
    cache, page = FormatArguments(kv_cache, fmt, head_size), kv_cache.shape[2]
    group = num_heads // cache.kv_heads
    part = q.new_empty((plan.num_items, num_heads, head_size), dtype=torch.float32)
    lse = q.new_empty((plan.num_items, num_heads), dtype=torch.float32)
    _decode_kernel[(cache.kv_heads, plan.num_items)](
        q, cache.data, cache.scales, cache.levels, out, part, lse, block_table, plan.items,
        plan.count, plan.arrived, alibi_slopes, sinks, scale * shared.k, shared.v, soft_cap,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), *cache.strides,
        *cache.scale_strides, block_table.stride(0), part.stride(0), part.stride(1), lse.stride(0),
        WINDOW=window, HAS_SOFT_CAP=soft_cap > 0, HAS_ALIBI=alibi_slopes is not None,
        HAS_SINKS=sinks is not None, GROUP=group, GROUP_PAD=triton.next_power_of_2(group),
        ROWS=max(16, triton.next_power_of_2(group)), D=head_size,
        D_PAD=triton.next_power_of_2(head_size), PAGE=page, TILE=tile,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        MAX_SPLITS=MAX_SPLITS, num_warps=num_warps, num_stages=num_stages, **cache.constants,
        **slot_constants(fmt, q.dtype), **options(q.device),
    )  # fmt: skip
