"""Attention over the packed, paged cache in Triton: tiled prefill, and the two kinds together.

The cache is a view of logical shape ``(B, H, N, 2 * D)`` with any strides over B, H and N and a
dense last dimension: K in ``[..., :D]``, V in ``[..., D:]``; or the bytes of a quantised format
(``kv_formats``). Every address is a stride times an index; nothing is derived from a product of
shape entries, so padded pages, packed blocks and block-outermost pools cost nothing extra.

The query heads that share one KV head are in the rows of one tile, so that a page is read once
for all of them. Scores are kept in base 2 (the scale carries log2 e). Requests with one query
token are ``triton_decode``'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm.utils.dependent_launch import is_hopper
from vllm.v1.attention.ops.kv_formats import KVFormat, SideScales
from vllm.v1.attention.ops.triton_byte_decode import (
    byte_decode_attention,
    decode_waves,
    fits_byte_decode,
)
from vllm.v1.attention.ops.triton_decode import (
    DecodePlan,
    decode_attention,
    plan_decodes,
)
from vllm.v1.attention.ops.triton_formats import FormatArguments, layer_scales, scaled, widened
from vllm.v1.attention.ops.triton_slot_codes import slot_constants, slot_keys, slot_values
from vllm.v1.attention.ops.triton_softmax import open_softmax, score, softmax_step
from vllm.v1.attention.ops.turboquant import TurboQuantFormat


@triton.jit
def _attend(
    acc, total, top, q, kv_ptr, kv_scale_ptr, levels_ptr, kv_desc, base, scale_base, table,
    head, positions_q, dims, slopes, scale, soft_cap, start, end, lowest, highest,
    stride_kv_b, stride_kv_n, stride_s_b, stride_s_n,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, FORMAT: tl.constexpr, V_AT: tl.constexpr, V_SCALE_AT: tl.constexpr,
    UNIT: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_ASM: tl.constexpr,
    V_ASM: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of ``[start, end)``; only a MASKED call looks at bounds."""
    IS_SLOT: tl.constexpr = FORMAT >= 7
    HAS_SCALES: tl.constexpr = ((FORMAT >= 3) & (FORMAT <= 5)) | (FORMAT >= 8)
    BYTES_PAD: tl.constexpr = D_PAD // 2 if FORMAT >= 5 else D_PAD
    NUM_BYTES: tl.constexpr = D // 2 if FORMAT >= 5 else D
    GROUPS: tl.constexpr = D_PAD // 16
    group = tl.arange(0, GROUPS)
    byte = tl.arange(0, BYTES_PAD)
    k_scales = tl.zeros([TILE], tl.float32)
    for begin in tl.range(start, end, TILE, num_stages=STAGES):
        begin = tl.multiple_of(begin, TILE)
        tokens = begin + tl.arange(0, TILE)
        if USE_TMA:
            block = tl.load(table + begin // PAGE)
            k = kv_desc.load([block, head, begin % PAGE, 0]).reshape(TILE, D).T
        else:
            # Tokens past the end read block 0 and are masked below: no mask per element here.
            if MASKED:
                block = tl.load(table + tokens // PAGE, mask=tokens < highest, other=0)
            else:
                block = tl.load(table + tokens // PAGE)
            at = base + block.to(tl.int64) * stride_kv_b * UNIT
            at += (tokens % PAGE) * stride_kv_n * UNIT
            if IS_SLOT:
                k = slot_keys(kv_ptr + at, levels_ptr, D, K_BITS, K_ASM, q.dtype)
                at_scale = kv_scale_ptr + scale_base + block.to(tl.int64) * stride_s_b
                at_scale += (tokens % PAGE) * stride_s_n
                if HAS_SCALES:
                    k_scales = tl.load(at_scale).to(tl.float32)
            elif FORMAT > 0:
                at_byte = kv_ptr + at[:, None] + byte[None, :]
                raw = tl.load(at_byte, mask=(byte < NUM_BYTES)[None, :], other=0)
                k = widened(raw, q.dtype, FORMAT)
                if FORMAT >= 3:
                    at_scale = kv_scale_ptr + scale_base + block.to(tl.int64) * stride_s_b
                    at_scale += (tokens % PAGE) * stride_s_n
                if FORMAT == 6:
                    at_group = at_scale[:, None] + group[None, :]
                    there = (group < D // 16)[None, :]
                    k = scaled(k, tl.load(at_group, mask=there, other=0), GROUPS)
                k = tl.trans(k)
                if HAS_SCALES:
                    k_scales = tl.load(at_scale)
            elif D == D_PAD:
                k = tl.load(kv_ptr + at[None, :] + dims[:, None])
            else:
                k = tl.load(
                    kv_ptr + at[None, :] + dims[:, None], mask=(dims < D)[:, None], other=0.0
                )
        s = score(
            q, k, k_scales, positions_q, tokens, slopes, scale, soft_cap, HAS_SCALES, HAS_SOFT_CAP,
            HAS_ALIBI, PRECISION,
        )  # fmt: skip
        if MASKED:
            seen = tokens[None, :] < highest
            if CAUSAL:
                seen = tokens[None, :] <= positions_q[:, None]
            if WINDOW > 0:
                seen = seen & (tokens[None, :] > positions_q[:, None] - WINDOW)
            s = tl.where(seen, s, -1.0e30)
        p, shrink, total, top = softmax_step(s, top, total)
        if USE_TMA:
            v = kv_desc.load([block, head, begin % PAGE, D]).reshape(TILE, D)
        elif IS_SLOT:
            v = slot_values(kv_ptr + at + V_AT, D, V_BITS, V_ASM, q.dtype)
            v_scales = tl.load(at_scale + V_SCALE_AT).to(tl.float32)
            # Codes come less half their number.
            zeros = tl.load(at_scale + V_SCALE_AT + 1).to(tl.float32)
            zeros += v_scales * (1 << (V_BITS - 1))
            if MASKED:
                inside = (tokens >= lowest) & (tokens < highest)
                v_scales = tl.where(inside, v_scales, 0.0)
                zeros = tl.where(inside, zeros, 0.0)
            zero = tl.sum(p * zeros[None, :], 1)
            p = p * v_scales[None, :]
        elif FORMAT > 0:
            raw = tl.load(at_byte + V_AT, mask=(byte < NUM_BYTES)[None, :], other=0)
            v = widened(raw, q.dtype, FORMAT)
            if FORMAT == 6:
                v = scaled(v, tl.load(at_group + V_SCALE_AT, mask=there, other=0), GROUPS)
            if HAS_SCALES:
                v_scales = tl.load(at_scale + V_SCALE_AT)
                if MASKED:
                    v_scales = tl.where((tokens >= lowest) & (tokens < highest), v_scales, 0.0)
                p = p * v_scales[None, :]
        elif D == D_PAD:
            v = tl.load(kv_ptr + at[:, None] + (V_AT + dims)[None, :])
        else:
            v = tl.load(
                kv_ptr + at[:, None] + (V_AT + dims)[None, :], mask=(dims < D)[None, :], other=0.0
            )
        if MASKED:
            # Slots never written, or freed behind the window, may hold NaN; 0 * NaN is NaN.
            v = tl.where(((tokens >= lowest) & (tokens < highest))[:, None], v, 0.0)
        acc = acc * shrink[:, None]
        if IS_SLOT:
            acc += zero[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, top


@triton.jit
def query_tile(query_start_ptr, num_requests, tile, TOKENS: tl.constexpr):
    """Whose a tile of queries is: request, its first row, its rows, first token of the tile.

    Request ``i`` owns the tiles from ``query_start[i] // TOKENS + i`` on: an upper bound of what
    the requests before it need, so no prefix sum is wanted and some tiles have no work.
    """
    low = 0
    high = num_requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) // TOKENS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    request = low - 1
    first = tl.load(query_start_ptr + request)
    query_len = tl.load(query_start_ptr + request + 1) - first
    begin_q = (tile - (first // TOKENS + request)) * TOKENS
    return request, first, query_len, begin_q


@triton.jit(do_not_specialize=["num_requests"])
def _prefill_kernel(
    q_ptr, kv_ptr, kv_scale_ptr, levels_ptr, kv_desc, out_ptr, block_table_ptr, seq_lens_ptr,
    query_start_ptr, slopes_ptr, sinks_ptr, num_requests, scale, v_scale, soft_cap,
    stride_q_t, stride_q_h, stride_o_t, stride_o_h,
    stride_kv_b, stride_kv_h, stride_kv_n, stride_s_b, stride_s_h, stride_s_n, stride_bt,
    WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, FORMAT: tl.constexpr,
    V_AT: tl.constexpr, V_SCALE_AT: tl.constexpr, UNIT: tl.constexpr, K_BITS: tl.constexpr,
    V_BITS: tl.constexpr, K_ASM: tl.constexpr, V_ASM: tl.constexpr,
):  # fmt: skip
    """One tile of ``TOKENS`` query tokens x ``GROUP`` heads against all its visible KV.

    Row ``r`` of the tile is token ``r // GROUP`` and head ``r % GROUP``. The last tiles of a prompt
    see most KV, so tile numbers run backwards.
    """
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    request, first, query_len, begin_q = query_tile(query_start_ptr, num_requests, tile, TOKENS)
    # Requests with one query token are the decode kernel's.
    if (begin_q >= query_len) | (query_len == 1):
        return
    length = tl.load(seq_lens_ptr + request)
    context = length - query_len

    rows = tl.arange(0, ROWS)
    token = begin_q + rows // GROUP
    heads = head * GROUP + rows % GROUP
    row_valid = (rows < TOKENS * GROUP) & (token < query_len)
    positions_q = context + token
    dims = tl.arange(0, D_PAD)
    dim_valid = dims < D
    at_q = (first + token).to(tl.int64)
    q = tl.load(
        q_ptr + at_q[:, None] * stride_q_t + heads[:, None] * stride_q_h + dims[None, :],
        mask=row_valid[:, None] & dim_valid[None, :], other=0.0,
    )  # fmt: skip
    slopes, top, total = open_softmax(
        slopes_ptr, sinks_ptr, heads, row_valid, True, ROWS, HAS_ALIBI, HAS_SINKS
    )
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    base = head.to(tl.int64) * stride_kv_h * UNIT
    scale_base = head.to(tl.int64) * stride_s_h
    table = block_table_ptr + request.to(tl.int64) * stride_bt
    # Tokens [lowest, highest) are seen by some row; tiles in [full_start, full_end) by all.
    lowest = 0
    full_start = 0
    highest = length
    full_end = length // TILE * TILE
    if CAUSAL:
        highest = tl.minimum(context + begin_q + TOKENS, length)
        full_end = (context + begin_q + 1) // TILE * TILE
    if WINDOW > 0:
        lowest = tl.maximum(context + begin_q - WINDOW + 1, 0)
        full_start = tl.cdiv(tl.maximum(context + begin_q + TOKENS - WINDOW, 0), TILE) * TILE
        full_end = tl.maximum(full_end, full_start)
        acc, total, top = _attend(
            acc, total, top, q, kv_ptr, kv_scale_ptr, levels_ptr, kv_desc, base, scale_base,
            table, head, positions_q, dims, slopes, scale, soft_cap, lowest // TILE * TILE,
            tl.minimum(full_start, highest), lowest, highest,
            stride_kv_b, stride_kv_n, stride_s_b, stride_s_n, True, CAUSAL, WINDOW, HAS_SOFT_CAP,
            HAS_ALIBI, D, D_PAD, PAGE, TILE, USE_TMA, PRECISION, STAGES, FORMAT, V_AT, V_SCALE_AT,
            UNIT, K_BITS, V_BITS, K_ASM, V_ASM,
        )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, kv_ptr, kv_scale_ptr, levels_ptr, kv_desc, base, scale_base, table,
        head, positions_q, dims, slopes, scale, soft_cap, full_start, full_end, lowest, highest,
        stride_kv_b, stride_kv_n, stride_s_b, stride_s_n, False, CAUSAL, WINDOW, HAS_SOFT_CAP,
        HAS_ALIBI, D, D_PAD, PAGE, TILE, USE_TMA, PRECISION, STAGES, FORMAT, V_AT, V_SCALE_AT,
        UNIT, K_BITS, V_BITS, K_ASM, V_ASM,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, kv_ptr, kv_scale_ptr, levels_ptr, kv_desc, base, scale_base, table,
        head, positions_q, dims, slopes, scale, soft_cap, full_end, highest, lowest, highest,
        stride_kv_b, stride_kv_n, stride_s_b, stride_s_n, True, CAUSAL, WINDOW, HAS_SOFT_CAP,
        HAS_ALIBI, D, D_PAD, PAGE, TILE, USE_TMA, PRECISION, STAGES, FORMAT, V_AT, V_SCALE_AT,
        UNIT, K_BITS, V_BITS, K_ASM, V_ASM,
    )  # fmt: skip
    acc *= (v_scale / total)[:, None]
    tl.store(
        out_ptr + at_q[:, None] * stride_o_t + heads[:, None] * stride_o_h + dims[None, :],
        acc, mask=row_valid[:, None] & dim_valid[None, :],
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelConfig:
    """Tile sizes and launch parameters of both kernels."""

    decode_tile: int
    decode_warps: int
    decode_stages: int
    prefill_rows: int
    prefill_tile: int
    prefill_warps: int
    prefill_stages: int
    tma: bool
    byte_decode: bool = True
    """Decodes over bytes go to the kernel made for them where it knows the shape."""
    byte_tile: int | None = None
    byte_registers: int = 255
    byte_prefetch: bool | None = None


def default_config(
    page: int, head_size: int, dtype: torch.dtype, copies: bool, fmt: KVFormat | None = None
) -> KernelConfig:
    """The fastest of the configurations tried on one H100 (head size 128, bf16).

    Where the device has a tensor-copy engine (``copies``), pages of 64 tokens and more go through
    it, a box of 64 tokens at a time (478 TFLOP/s on 4 x 4096 causal, 386 by pointers at page 16);
    wider heads and fp32 take smaller tiles, which is what fits in shared memory.
    """
    wide = head_size > 128 or dtype == torch.float32
    decode_tile = 32 if wide else 64
    tma = copies and page % 64 == 0 and head_size in (64, 128) and dtype != torch.float32
    # Bytes are widened in registers on their way.
    tma = tma and fmt is None
    if fmt is not None and dtype == torch.float32:
        # Exact products are unrolled, three times over: larger tiles take half a minute to compile.
        rows, tile, warps, stages = 16, 32, 4, 2
    elif isinstance(fmt, TurboQuantFormat) and head_size < 64:
        # Groups of four warps take operands in shared memory by descriptors, of which ptxas 12.8
        # made wrong ones here: all but the first 16 tokens of 64 were multiplied by other memory
        # (benchmarks/kernels/sass.py finds such). Two warps read the operands themselves.
        rows, tile, warps, stages = 64, 64, 2, 2
    elif wide:
        rows, tile, warps, stages = 64, 32, 4, 2
    elif tma:
        rows, tile, warps, stages = 128, 64, 4, 2
    else:
        rows, tile, warps, stages = 256, 64, 8, 3
    # benchmarks/gpu/attention_tiles.py, 64 x 8192 at page 64: int8 469 us against 518 with the
    # plain cache's four warps and two stages, fp8 with a scale per tensor 482 against 490.
    decode_warps, decode_stages = 4, 2
    if fmt is not None and not wide and not fmt.is_int4:
        decode_warps, decode_stages = (2 if fmt.per_token_head else 4), 3
    return KernelConfig(
        decode_tile=decode_tile, decode_warps=decode_warps, decode_stages=decode_stages,
        prefill_rows=rows, prefill_tile=tile, prefill_warps=warps, prefill_stages=stages, tma=tma,
    )  # fmt: skip


def paged_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
    *,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    has_decodes: bool = True,
    plan: DecodePlan | None = None,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    causal: bool = True,
    fmt: KVFormat | None = None,
    scales: SideScales | None = None,
    config: KernelConfig | None = None,
) -> None:
    """Attention of a batch of decodes, prompt chunks, or both, into ``out``.

    Args:
        q: ``(T, Q, D)``, any strides over T and Q, dense D.
        kv_cache: ``(B, H, N, 2 * D)`` view in the dtype of ``q``, dense last dimension; with
            ``fmt`` single bytes, ``(B, slots, N, content)``.
        out: ``(T, Q, D)``; every row of a scheduled token is written.
        query_start_loc: int32 ``(R + 1,)``; seq_lens: int32 ``(R,)``; block_table: int32
            ``(R, max_blocks)`` of blocks of ``N`` tokens.
        max_query_len, max_seq_len: upper bounds known on the host.
        window: tokens that a query sees, itself included; 0 for all.
        alibi_slopes, sinks: float32 ``(Q,)``.
        has_decodes: some request has exactly one query token.
        plan: of these requests; made here where None.
        scales: of the layer, for a format with one per tensor.
    """
    num_heads, head_size = q.shape[1], q.shape[2]
    num_kv_heads = kv_cache.shape[1] // (1 if fmt is None else fmt.head_slots(1))
    page = kv_cache.shape[2]
    group = num_heads // num_kv_heads
    requests = seq_lens.shape[0]
    config = config or default_config(page, head_size, q.dtype, is_hopper(q.device), fmt)
    assert q.stride(2) == 1 and out.stride(2) == 1
    if has_decodes:
        by_bytes = config.byte_decode and fits_byte_decode(fmt, head_size, page, group)
        if plan is None:
            plan = plan_decodes(
                seq_lens, query_start_loc, num_kv_heads, max_seq_len, window,
                waves=decode_waves(by_bytes, head_size),
            )  # fmt: skip
        common: dict[str, Any] = {
            "scale": scale, "window": window, "soft_cap": soft_cap, "alibi_slopes": alibi_slopes,
            "sinks": sinks, "scales": scales,
        }  # fmt: skip
        if by_bytes:
            assert fmt is not None
            byte_decode_attention(
                q, kv_cache, out, plan, block_table, fmt=fmt, tile=config.byte_tile,
                registers=config.byte_registers, prefetch=config.byte_prefetch, **common,
            )  # fmt: skip
        else:
            decode_attention(
                q, kv_cache, out, plan, block_table, tile=config.decode_tile,
                num_warps=config.decode_warps, num_stages=config.decode_stages, fmt=fmt, **common,
            )  # fmt: skip
    if max_query_len > 1:
        rows = max(config.prefill_rows, triton.next_power_of_2(group))
        tokens = rows // group
        tile = config.prefill_tile
        # The copy engine reads a box of TILE tokens of one page; smaller pages take pointers.
        kv_desc = None
        if config.tma:
            kv_desc = TensorDescriptor.from_tensor(kv_cache, [1, 1, tile, head_size])
        cache, shared = FormatArguments(kv_cache, fmt, head_size), layer_scales(fmt, scales)
        _prefill_kernel[(num_kv_heads, q.shape[0] // tokens + requests)](
            q, cache.data, cache.scales, cache.levels, kv_desc, out, block_table, seq_lens,
            query_start_loc, alibi_slopes, sinks, requests, scale * shared.k, shared.v, soft_cap,
            q.stride(0), q.stride(1), out.stride(0), out.stride(1), *cache.strides,
            *cache.scale_strides, block_table.stride(0), WINDOW=window, HAS_SOFT_CAP=soft_cap > 0,
            HAS_ALIBI=alibi_slopes is not None, HAS_SINKS=sinks is not None, CAUSAL=causal,
            GROUP=group, TOKENS=tokens, ROWS=rows, D=head_size,
            D_PAD=triton.next_power_of_2(head_size), PAGE=page, TILE=tile, USE_TMA=config.tma,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=config.prefill_warps, STAGES=config.prefill_stages, **cache.constants,
            **slot_constants(fmt, q.dtype),
        )  # fmt: skip
