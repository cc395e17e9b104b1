"""Decode attention over quantised caches in Triton: bytes to tensor cores without a detour.

A program is one warp. Bytes are read from memory into the registers in which the products want
their numbers, so nothing passes through shared memory and no warp waits for another. For that,
the axes of both products are permuted alike on both sides. With ``t`` = lane % 4 and ``g`` =
lane / 4, a lane of a product has

    keys    (D, tokens): of token column 8r + g, dimensions (row) 16m + 4t + w
    values  (tokens, D): of token row 16s + 4t + w, dimensions (column) 8i + g
    scores  (queries, tokens): of token column 16s + 8h + 2t + e, all queries' g

so a lane reads keys of tokens ``g`` at bytes ``(c * 4 + t) * K_VEC ...`` and values of tokens
``t`` at bytes ``(c * 8 + g) * V_VEC ...``, and what that makes of rows and columns is undone where
queries are read and the output is written. Numbers become float16, in which every number of every
format is exact, and queries are scaled into its range; scales meet scores and weights, not K and V.

Owns this kernel; plans, splitting and merging are those of ``triton_decode``.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm.utils.dependent_launch import await_previous, options, release
from vllm.v1.attention.ops.kv_formats import KVFormat, SideScales
from vllm.v1.attention.ops.triton_decode import (
    MAX_SPLITS,
    WAVES,
    DecodePlan,
    finish_item,
    open_item,
)
from vllm.v1.attention.ops.triton_formats import FormatArguments, layer_scales, numbers
from vllm.v1.attention.ops.triton_slot_codes import (
    interprets,
    key_dimensions,
    key_tile,
    slot_constants,
    value_dimensions,
    value_tile,
)
from vllm.v1.attention.ops.triton_softmax import open_softmax, shaped, softmax_step
from vllm.v1.attention.ops.turboquant import TurboQuantFormat

__all__ = ["byte_decode_attention", "decode_waves", "fits_byte_decode"]

# benchmarks/gpu/byte_decode_tiles.py on an H100: eight warps with all the registers there are beat
# twelve with 168, and programs that are all resident at once beat more of them in turns (int8
# 64 x 8192: 405 us with 4 per multiprocessor aimed at, 458 with 8: two splits a request).
_REGISTERS = 255
_BYTE_WAVES = 4
_HEAD_SIZES = (64, 128, 256)


@triton.jit
def _key_tile(raw, scales, COMPUTE: tl.constexpr, FORMAT: tl.constexpr, ASM: tl.constexpr):
    """Bytes (4, 8, R, C, VEC) as one or two right sides (dimensions, tokens) of a product."""
    low, high = numbers(raw, scales, COMPUTE, FORMAT, ASM)
    low = _key_side(low)
    if (FORMAT == 5) | (FORMAT == 6):
        high = _key_side(high)
    else:
        high = low
    return low, high


@triton.jit
def _key_side(x):
    R: tl.constexpr = x.shape[2]
    C: tl.constexpr = x.shape[3]
    FOURS: tl.constexpr = x.shape[4] // 4
    x = tl.permute(tl.reshape(x, (4, 8, R, C, FOURS, 4)), (2, 1, 3, 4, 0, 5))
    return tl.trans(tl.reshape(x, (R * 8, C * FOURS * 16)))


@triton.jit
def _value_tile(raw, scales, COMPUTE: tl.constexpr, FORMAT: tl.constexpr, ASM: tl.constexpr):
    """Bytes (4, 8, R, C, VEC) as one or two right sides (tokens, dimensions) of a product."""
    low, high = numbers(raw, scales, COMPUTE, FORMAT, ASM)
    low = _value_side(low)
    if FORMAT >= 5:
        high = _value_side(high)
    else:
        high = low
    return low, high


@triton.jit
def _value_side(x):
    R: tl.constexpr = x.shape[2]
    C: tl.constexpr = x.shape[3]
    VEC: tl.constexpr = x.shape[4]
    x = tl.permute(tl.reshape(x, (4, 8, R // 4, 4, C, VEC)), (2, 0, 3, 4, 5, 1))
    return tl.reshape(x, (R * 4, C * VEC * 8))


@triton.jit
def _weights(p):
    """Columns 16s + 8h + 2t + e of scores, which a lane has, as columns 16s + 4t + 2h + e."""
    ROWS: tl.constexpr = p.shape[0]
    TILE: tl.constexpr = p.shape[1]
    p = tl.permute(tl.reshape(p, (ROWS, TILE // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(p, (ROWS, TILE))


@triton.jit
def _prefetch(addresses):
    """Have lines of memory brought into the second-level cache; nobody waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [addresses.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _byte_decode_kernel(
    q_ptr, kv_ptr, kv_scale_ptr, levels_ptr, out_ptr, part_ptr, lse_ptr, block_table_ptr, items_ptr,
    count_ptr, arrived_ptr, slopes_ptr, sinks_ptr, scale, v_scale, soft_cap,
    stride_q_t, stride_q_h, stride_o_t, stride_o_h,
    stride_kv_b, stride_kv_h, stride_kv_n, stride_s_b, stride_s_h, stride_s_n, stride_bt,
    stride_part_i, stride_part_h, stride_lse_i,
    WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, K_VEC: tl.constexpr,
    V_VEC: tl.constexpr, COMPUTE: tl.constexpr, ASM: tl.constexpr, PREFETCH: tl.constexpr,
    CONTENT: tl.constexpr, MAX_SPLITS: tl.constexpr,
    FORMAT: tl.constexpr, V_AT: tl.constexpr, V_SCALE_AT: tl.constexpr, UNIT: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_ASM: tl.constexpr, V_ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One item, for all query heads of one KV head; a tile lies in one page."""
    release(PDL)
    await_previous(PDL)
    head = tl.program_id(0)
    index = tl.program_id(1)
    if index >= tl.load(count_ptr):
        return
    request, start, end, split, num_splits, row, length = open_item(items_ptr, index)

    IS_SLOT: tl.constexpr = FORMAT >= 7
    HAS_CODED_KEYS: tl.constexpr = FORMAT >= 8
    HALVES: tl.constexpr = 2 if (FORMAT == 5) | (FORMAT == 6) else 1
    COLUMNS: tl.constexpr = D // HALVES
    PER_HEAD: tl.constexpr = (FORMAT >= 3) & (FORMAT != 6)
    HAS_KEY_SCALES: tl.constexpr = PER_HEAD & (FORMAT != 7)
    GROUPED: tl.constexpr = FORMAT == 6
    rows = tl.arange(0, ROWS)
    row_valid = rows < GROUP
    heads = head * GROUP + rows
    column = tl.arange(0, COLUMNS)
    # Row m * 16 + 4t + w of the keys' side.
    at = column // 16 * 4 + column % 4
    k_byte = (at // K_VEC * 4 + column % 16 // 4) * K_VEC + at % K_VEC
    # Column i * 8 + g of the values' side.
    at = column // 8
    v_byte = (at // V_VEC * 8 + column % 8) * V_VEC + at % V_VEC
    if HAS_CODED_KEYS:
        k_byte = key_dimensions(D)
    if IS_SLOT:
        v_byte = value_dimensions(D)
    at_q = q_ptr + row * stride_q_t + heads[:, None] * stride_q_h
    q_low = tl.load(
        at_q + (k_byte * HALVES)[None, :], mask=row_valid[:, None], other=0.0
    ).to(tl.float32)  # fmt: skip
    most = tl.max(tl.abs(q_low), 1)
    q_high = q_low
    if HALVES == 2:
        q_high = tl.load(
            at_q + (k_byte * 2 + 1)[None, :], mask=row_valid[:, None], other=0.0
        ).to(tl.float32)  # fmt: skip
        most = tl.maximum(most, tl.max(tl.abs(q_high), 1))
    # By powers of two, which cost no precision.
    power = tl.exp2(tl.floor(tl.log2(tl.maximum(most, 1.0e-30))))
    q_low = (q_low / power[:, None]).to(COMPUTE)
    q_high = (q_high / power[:, None]).to(COMPUTE)
    row_scale = (power * scale)[:, None]
    positions_q = tl.zeros([ROWS], tl.int32) + (length - 1)
    slopes, top, total = open_softmax(
        slopes_ptr, sinks_ptr, heads, row_valid, split == 0, ROWS, HAS_ALIBI, HAS_SINKS
    )
    low_acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    high_acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    # Largest of the values' scales so far: weights are relative to it, within float16's range.
    unit = 1.0e-30
    # What the zeros of slots add to every dimension.
    zero_acc = tl.zeros([ROWS], tl.float32)

    K_RUNS: tl.constexpr = COLUMNS // (4 * K_VEC)
    V_RUNS: tl.constexpr = COLUMNS // (8 * V_VEC)
    # Block scales of a run.
    K_GROUPS: tl.constexpr = (K_VEC + 7) // 8
    V_GROUPS: tl.constexpr = (V_VEC + 7) // 8
    # Offsets in the tile of the tokens that a lane reads, and of the scores' columns.
    # Triton gives lanes to the first axes first: to t, then to g.
    t4 = tl.arange(0, 4)[:, None, None, None, None]
    g8 = tl.arange(0, 8)[None, :, None, None, None]
    r8 = tl.arange(0, TILE // 8)[None, None, :, None, None]
    r4 = tl.arange(0, TILE // 4)[None, None, :, None, None]
    k_token = r8 * 8 + g8 % 2 * 4 + g8 // 2
    v_token = r4 * 4 + t4
    c_k = tl.arange(0, K_RUNS)[None, None, None, :, None]
    c_v = tl.arange(0, V_RUNS)[None, None, None, :, None]
    k_run = c_k * 4 + t4
    v_run = c_v * 8 + g8
    k_in_row = k_run * K_VEC + tl.arange(0, K_VEC)[None, None, None, None, :]
    v_in_row = v_run * V_VEC + tl.arange(0, V_VEC)[None, None, None, None, :]
    n = tl.arange(0, TILE)
    n_token = n // 8 * 8 + n % 2 * 4 + n % 8 // 2

    lowest = start
    if WINDOW > 0:
        lowest = tl.maximum(start, length - WINDOW)
    table = block_table_ptr + request.to(tl.int64) * stride_bt
    base = head.to(tl.int64) * stride_kv_h * UNIT
    scale_base = head.to(tl.int64) * stride_s_h
    first_tile = lowest // TILE * TILE
    # Lines of a token's content.
    LINES: tl.constexpr = 1 if GROUPED else (4 if CONTENT > 256 else 2)
    line = tl.minimum(tl.arange(0, LINES) * 128, CONTENT - 1)
    block = tl.load(table + first_tile // PAGE).to(tl.int64)
    next_block = tl.load(table + tl.minimum(first_tile + TILE, end - 1) // PAGE).to(tl.int64)
    for begin in tl.range(first_tile, end, TILE):
        begin = tl.multiple_of(begin, TILE)
        page = kv_ptr + base + block * stride_kv_b * UNIT + begin % PAGE * stride_kv_n * UNIT
        if PER_HEAD | GROUPED:
            page_scales = kv_scale_ptr + scale_base + block * stride_s_b
            page_scales += begin % PAGE * stride_s_n
        coming = tl.load(table + tl.minimum(begin + 2 * TILE, end - 1) // PAGE).to(tl.int64)
        # Tokens outside read one that is inside, so nothing that is read is poison.
        first = tl.maximum(lowest - begin, 0)
        last = tl.minimum(end - begin, TILE) - 1
        k_rows = tl.minimum(tl.maximum(k_token, first), last)
        v_rows = tl.minimum(tl.maximum(v_token, first), last)
        n_rows = tl.minimum(tl.maximum(n_token, first), last)
        if HAS_CODED_KEYS:
            k_low = key_tile(
                page, stride_kv_n * UNIT, first, last, levels_ptr, TILE, D, K_BITS, K_ASM, COMPUTE
            )
        else:
            raw_k = tl.load(page + k_rows * stride_kv_n * UNIT + k_in_row)
            k_groups = raw_k
        if IS_SLOT:
            v_low = value_tile(
                page + V_AT, stride_kv_n * UNIT, first, last, TILE, D, V_BITS, V_ASM, COMPUTE
            )
        else:
            raw_v = tl.load(page + V_AT + v_rows * stride_kv_n * UNIT + v_in_row)
            v_groups = raw_v
        if GROUPED:
            k_group = k_run * K_VEC // 8 + tl.arange(0, K_GROUPS)[None, None, None, None, :]
            v_group = v_run * V_VEC // 8 + tl.arange(0, V_GROUPS)[None, None, None, None, :]
            k_groups = tl.load(page_scales + k_rows * stride_s_n + k_group)
            v_groups = tl.load(page_scales + V_SCALE_AT + v_rows * stride_s_n + v_group)
        if PREFETCH:
            rows_ahead = (tl.minimum(begin + TILE, end - 1) % PAGE // TILE * TILE + n)[:, None]
            lines = kv_ptr + base + next_block * stride_kv_b * UNIT
            lines += rows_ahead * stride_kv_n * UNIT + line[None, :]
            _prefetch(lines)
            if GROUPED:
                _prefetch(lines + V_AT)
                lines = kv_scale_ptr + scale_base + next_block * stride_s_b
                lines += rows_ahead * stride_s_n
                _prefetch(lines)
                _prefetch(lines + V_SCALE_AT)
        block = next_block
        next_block = coming
        if not HAS_CODED_KEYS:
            k_low, k_high = _key_tile(raw_k, k_groups, COMPUTE, FORMAT, ASM)
        s = tl.dot(q_low, k_low, input_precision="ieee")
        if HALVES == 2:
            s = tl.dot(q_high, k_high, s, input_precision="ieee")
        if PER_HEAD:
            at_scale = page_scales + n_rows * stride_s_n
        if HAS_KEY_SCALES:
            s = s * tl.load(at_scale).to(tl.float32)[None, :]
        tokens = begin + n_token
        s = shaped(s, positions_q, tokens, slopes, row_scale, soft_cap, HAS_SOFT_CAP, HAS_ALIBI)
        seen = (n_token >= first) & (n_token <= last)
        s = tl.where(seen[None, :], s, float("-inf"))
        p, shrink, total, top = softmax_step(s, top, total)
        if PER_HEAD:
            v_scales = tl.load(at_scale + V_SCALE_AT).to(tl.float32)
            if IS_SLOT:
                # Codes come less half their number.
                zeros = tl.load(at_scale + V_SCALE_AT + 1).to(tl.float32)
                zeros += v_scales * (1 << (V_BITS - 1))
                zero_acc = zero_acc * shrink + tl.sum(p * zeros[None, :], 1)
            new_unit = tl.maximum(unit, tl.max(v_scales, 0))
            p = p * (v_scales / new_unit)[None, :]
            shrink *= unit / new_unit
            unit = new_unit
        if not IS_SLOT:
            v_low, v_high = _value_tile(raw_v, v_groups, COMPUTE, FORMAT, ASM)
        p = _weights(p.to(COMPUTE))
        low_acc = tl.dot(p, v_low, low_acc * shrink[:, None], input_precision="ieee")
        if HALVES == 2:
            high_acc = tl.dot(p, v_high, high_acc * shrink[:, None], input_precision="ieee")
    factor = v_scale / total
    if PER_HEAD:
        factor *= unit
    if HALVES == 2:
        acc = tl.reshape(tl.join(low_acc, high_acc), (ROWS, D))
        dims = tl.reshape(tl.join(v_byte * 2, v_byte * 2 + 1), (D,))
    else:
        acc = low_acc
        dims = v_byte
    acc *= factor[:, None]
    if IS_SLOT:
        acc += (zero_acc / total)[:, None]
    finish_item(
        acc, total, top, out_ptr, part_ptr, lse_ptr, arrived_ptr, index, request,
        split, num_splits, row, head, heads, row_valid, dims, stride_o_t, stride_o_h,
        stride_part_i, stride_part_h, stride_lse_i, D, ROWS, D, MAX_SPLITS, 1, GROUP, GROUP_PAD,
    )  # fmt: skip


def _widest(alignment: int, run: int) -> int:
    """Bytes that a lane reads at once: at most 16, a divisor of its run and of every address."""
    width = 16
    while alignment % width or run % width:
        width //= 2
    return width


def fits_byte_decode(fmt: KVFormat | None, head_size: int, page: int, group: int) -> bool:
    """The kernel knows such a cache."""
    if fmt is None or head_size not in _HEAD_SIZES:
        return False
    return page % 16 == 0 and group <= 32


def decode_waves(is_quantised: bool, head_size: int) -> int:
    """Programs per multiprocessor that a plan of decodes over such a cache aims at."""
    return _BYTE_WAVES if is_quantised and head_size in _HEAD_SIZES else WAVES


def byte_decode_attention(
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
    fmt: KVFormat,
    scales: SideScales | None = None,
    tile: int | None = None,
    registers: int = _REGISTERS,
    prefetch: bool | None = None,
) -> None:
    """As ``decode_attention``, over a cache that ``fits_byte_decode``.

    Args:
        tile: tokens of one iteration: 16, or 32 where that divides a page.
        registers: of a thread, at most.
        prefetch: have the next tile brought into the second-level cache; None: where it paid.
    """
    shared = layer_scales(fmt, scales)
    num_heads, head_size = q.shape[1], q.shape[2]
    cache = FormatArguments(kv_cache, fmt, head_size)
    group, page = num_heads // cache.kv_heads, kv_cache.shape[2]
    part = q.new_empty((plan.num_items, num_heads, head_size), dtype=torch.float32)
    lse = q.new_empty((plan.num_items, num_heads), dtype=torch.float32)
    slots = fmt if isinstance(fmt, TurboQuantFormat) else None
    bytes_of_side = head_size if slots else fmt.data_bytes(head_size)
    k_vec = v_vec = 4
    if slots is None or not slots.rotates:
        k_vec = _widest(cache.alignment, bytes_of_side // 4)
    if slots is None:
        v_vec = _widest(math.gcd(cache.alignment, cache.constants["V_AT"]), bytes_of_side // 8)
    is_half = q.dtype != torch.float32
    # Rows of 256 bytes alone come as fast without (383 against 404 us), all others faster with.
    prefetch = fmt.per_token_head or fmt.code == 6 if prefetch is None else prefetch
    _byte_decode_kernel[(cache.kv_heads, plan.num_items)](
        q, cache.data, cache.scales, cache.levels, out, part, lse, block_table, plan.items,
        plan.count, plan.arrived, alibi_slopes, sinks, scale * shared.k * cache.factor,
        shared.v * cache.factor, soft_cap,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), *cache.strides,
        *cache.scale_strides, block_table.stride(0), part.stride(0), part.stride(1),
        lse.stride(0),
        WINDOW=window, HAS_SOFT_CAP=soft_cap > 0, HAS_ALIBI=alibi_slopes is not None,
        HAS_SINKS=sinks is not None, GROUP=group, GROUP_PAD=triton.next_power_of_2(group),
        ROWS=max(16, triton.next_power_of_2(group)), D=head_size, PAGE=page,
        TILE=tile or (32 if page % 32 == 0 else 16),
        K_VEC=k_vec, V_VEC=v_vec, COMPUTE=tl.float16 if is_half else tl.float32,
        ASM=is_half and not interprets(),
        PREFETCH=prefetch and not interprets(), CONTENT=kv_cache.shape[3], MAX_SPLITS=MAX_SPLITS,
        num_warps=1, num_stages=1, maxnreg=registers, **cache.constants,
        **slot_constants(fmt, q.dtype), **options(q.device),
    )  # fmt: skip
