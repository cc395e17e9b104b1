"""Attention over the packed, paged cache in Triton: split-KV decode and tiled prefill.

The cache is a view of logical shape ``(B, H, N, 2 * D)`` with any strides over B, H and N and a
dense last dimension: K in ``[..., :D]``, V in ``[..., D:]``. Every address is a stride times an
index; nothing is derived from a product of shape entries, so padded pages, packed blocks and
block-outermost pools cost nothing extra.

Both kernels put the query heads that share one KV head into the rows of one tile, so that a
page is read once for all of them. Scores are kept in base 2 (the scale carries log2 e).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _score(
    q, k, positions_q, tokens, slopes, scale, soft_cap,
    HAS_SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of a tile in base 2, soft cap and ALiBi applied, before masking."""
    s = tl.dot(q, k, input_precision=PRECISION)
    if HAS_SOFT_CAP:
        # tanh(x) = 2 / (1 + exp(-2x)) - 1
        x = s * (scale / soft_cap)
        s = soft_cap * (2.0 / (1.0 + tl.exp2(-2.8853900817779268 * x)) - 1.0)
        s = s * 1.4426950408889634
    else:
        s = s * (scale * 1.4426950408889634)
    if HAS_ALIBI:
        distance = (tokens[None, :] - positions_q[:, None]).to(tl.float32)
        s += slopes[:, None] * distance * 1.4426950408889634
    return s


@triton.jit
def _decode_kernel(
    q_ptr, kv_ptr, out_ptr, part_ptr, lse_ptr, block_table_ptr, seq_lens_ptr, query_start_ptr,
    slopes_ptr, sinks_ptr, scale, soft_cap, chunk,
    stride_q_t, stride_q_h, stride_o_t, stride_o_h,
    stride_kv_b, stride_kv_h, stride_kv_n, stride_bt,
    stride_part_r, stride_part_h, stride_part_s, stride_lse_r, stride_lse_h,
    WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of one request's KV, for all query heads of one KV head.

    Splits are ``chunk`` tokens long, so a long request simply has more of them. A request with
    a single split writes its output at once; otherwise the split leaves a normalised partial
    output (fp32) and its log2-sum-exp for ``_merge_kernel``.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    request = tl.program_id(2)
    first = tl.load(query_start_ptr + request)
    if tl.load(query_start_ptr + request + 1) - first != 1:
        return
    length = tl.load(seq_lens_ptr + request)
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(length - WINDOW, 0)
    first_split = lowest // chunk
    num_splits = tl.cdiv(length, chunk) - first_split
    if split >= num_splits:
        return
    start = tl.maximum((first_split + split) * chunk, lowest)
    end = tl.minimum((first_split + split + 1) * chunk, length)

    rows = tl.arange(0, ROWS)
    row_valid = rows < GROUP
    heads = head * GROUP + rows
    dims = tl.arange(0, D_PAD)
    dim_valid = dims < D
    q = tl.load(
        q_ptr + first.to(tl.int64) * stride_q_t + heads[:, None] * stride_q_h + dims[None, :],
        mask=row_valid[:, None] & dim_valid[None, :], other=0.0,
    )  # fmt: skip
    slopes = tl.zeros([ROWS], tl.float32)
    if HAS_ALIBI:
        slopes = tl.load(slopes_ptr + heads, mask=row_valid, other=0.0)
    positions_q = tl.zeros([ROWS], tl.int32) + (length - 1)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    # A sink is one more score without a value; it counts once, in the first split.
    if HAS_SINKS:  # noqa: SIM102 (a constexpr prunes the branch)
        if split == 0:
            top = tl.load(sinks_ptr + heads, mask=row_valid, other=0.0).to(tl.float32)
            top *= 1.4426950408889634
            total += 1.0
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    base = kv_ptr + head.to(tl.int64) * stride_kv_h
    table = block_table_ptr + request.to(tl.int64) * stride_bt
    for begin in tl.range(start // TILE * TILE, end, TILE):
        tokens = begin + tl.arange(0, TILE)
        valid = (tokens >= start) & (tokens < end)
        block = tl.load(table + tokens // PAGE, mask=valid, other=0).to(tl.int64)
        at = base + block * stride_kv_b + (tokens % PAGE) * stride_kv_n
        k = tl.load(
            at[None, :] + dims[:, None], mask=valid[None, :] & dim_valid[:, None], other=0.0
        )
        v = tl.load(
            at[:, None] + (D + dims)[None, :], mask=valid[:, None] & dim_valid[None, :], other=0.0
        )
        s = _score(
            q, k, positions_q, tokens, slopes, scale, soft_cap, HAS_SOFT_CAP, HAS_ALIBI, PRECISION
        )
        s = tl.where(valid[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    acc /= total[:, None]
    if num_splits == 1:
        tl.store(
            out_ptr + first.to(tl.int64) * stride_o_t + heads[:, None] * stride_o_h + dims[None, :],
            acc, mask=row_valid[:, None] & dim_valid[None, :],
        )  # fmt: skip
    else:
        at_part = part_ptr + request.to(tl.int64) * stride_part_r + split * stride_part_s
        tl.store(
            at_part + heads[:, None] * stride_part_h + dims[None, :],
            acc, mask=row_valid[:, None] & dim_valid[None, :],
        )  # fmt: skip
        tl.store(
            lse_ptr + request.to(tl.int64) * stride_lse_r + heads * stride_lse_h + split,
            top + tl.log2(total), mask=row_valid,
        )  # fmt: skip


@triton.jit
def _merge_kernel(
    out_ptr, part_ptr, lse_ptr, seq_lens_ptr, query_start_ptr, chunk,
    stride_o_t, stride_o_h, stride_part_r, stride_part_h, stride_part_s,
    stride_lse_r, stride_lse_h,
    WINDOW: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, MAX_SPLITS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one (request, query head), weighted by their sums of exponentials."""
    request = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(query_start_ptr + request)
    if tl.load(query_start_ptr + request + 1) - first != 1:
        return
    length = tl.load(seq_lens_ptr + request)
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(length - WINDOW, 0)
    num_splits = tl.cdiv(length, chunk) - lowest // chunk
    if num_splits == 1:
        return
    splits = tl.arange(0, MAX_SPLITS)
    at_lse = lse_ptr + request.to(tl.int64) * stride_lse_r + head * stride_lse_h
    lse = tl.load(at_lse + splits, mask=splits < num_splits, other=float("-inf"))
    top = tl.max(lse, 0)
    total = tl.sum(tl.exp2(lse - top), 0)
    dims = tl.arange(0, D_PAD)
    dim_valid = dims < D
    acc = tl.zeros([D_PAD], tl.float32)
    at_part = part_ptr + request.to(tl.int64) * stride_part_r + head * stride_part_h
    for begin in tl.range(0, num_splits, STEP):
        some = begin + tl.arange(0, STEP)
        weight = tl.load(at_lse + some, mask=some < num_splits, other=float("-inf"))
        weight = tl.exp2(weight - top) / total
        part = tl.load(
            at_part + some[:, None] * stride_part_s + dims[None, :],
            mask=(some < num_splits)[:, None] & dim_valid[None, :], other=0.0,
        )  # fmt: skip
        acc += tl.sum(part * weight[:, None], 0)
    tl.store(
        out_ptr + first.to(tl.int64) * stride_o_t + head * stride_o_h + dims, acc, mask=dim_valid
    )


@triton.jit
def _attend(
    acc, total, top, q, kv_desc, base, table, head, positions_q, dims, slopes, scale, soft_cap,
    start, end, lowest, highest, stride_kv_b, stride_kv_n,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, USE_TMA: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of ``[start, end)``; only a MASKED call looks at bounds."""
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
            at = base + block.to(tl.int64) * stride_kv_b + (tokens % PAGE) * stride_kv_n
            if D == D_PAD:
                k = tl.load(at[None, :] + dims[:, None])
            else:
                k = tl.load(at[None, :] + dims[:, None], mask=(dims < D)[:, None], other=0.0)
        s = _score(
            q, k, positions_q, tokens, slopes, scale, soft_cap, HAS_SOFT_CAP, HAS_ALIBI, PRECISION
        )
        if MASKED:
            seen = tokens[None, :] < highest
            if CAUSAL:
                seen = tokens[None, :] <= positions_q[:, None]
            if WINDOW > 0:
                seen = seen & (tokens[None, :] > positions_q[:, None] - WINDOW)
            s = tl.where(seen, s, -1.0e30)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        if USE_TMA:
            v = kv_desc.load([block, head, begin % PAGE, D]).reshape(TILE, D)
        elif D == D_PAD:
            v = tl.load(at[:, None] + (D + dims)[None, :])
        else:
            v = tl.load(at[:, None] + (D + dims)[None, :], mask=(dims < D)[None, :], other=0.0)
        if MASKED:
            # Slots never written, or freed behind the window, may hold NaN; 0 * NaN is NaN.
            v = tl.where(((tokens >= lowest) & (tokens < highest))[:, None], v, 0.0)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit
def _prefill_kernel(
    q_ptr, kv_ptr, kv_desc, out_ptr, block_table_ptr, seq_lens_ptr, query_start_ptr,
    slopes_ptr, sinks_ptr, num_requests, scale, soft_cap,
    stride_q_t, stride_q_h, stride_o_t, stride_o_h,
    stride_kv_b, stride_kv_h, stride_kv_n, stride_bt,
    WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr, SKIP_DECODES: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    USE_TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of ``TOKENS`` query tokens x ``GROUP`` heads against all its visible KV.

    Row ``r`` of the tile is token ``r // GROUP`` and head ``r % GROUP``. Request ``i`` owns the
    tiles from ``query_start[i] // TOKENS + i`` on: an upper bound of what the requests before
    it need, so no prefix sum is wanted and some tiles have no work. The last tiles of a prompt
    see most KV, so tile numbers run backwards.
    """
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
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
    if begin_q >= query_len:
        return
    if SKIP_DECODES:  # noqa: SIM102 (a constexpr prunes the branch)
        if query_len == 1:
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
    slopes = tl.zeros([ROWS], tl.float32)
    if HAS_ALIBI:
        slopes = tl.load(slopes_ptr + heads, mask=row_valid, other=0.0)
    top = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:
        top = tl.load(sinks_ptr + heads, mask=row_valid, other=0.0).to(tl.float32)
        top *= 1.4426950408889634
        total += 1.0
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    base = kv_ptr + head.to(tl.int64) * stride_kv_h
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
            acc, total, top, q, kv_desc, base, table, head, positions_q, dims, slopes, scale,
            soft_cap, lowest // TILE * TILE, tl.minimum(full_start, highest), lowest, highest,
            stride_kv_b, stride_kv_n, True, CAUSAL, WINDOW, HAS_SOFT_CAP, HAS_ALIBI, D, D_PAD,
            PAGE, TILE, USE_TMA, PRECISION, STAGES,
        )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, kv_desc, base, table, head, positions_q, dims, slopes, scale,
        soft_cap, full_start, full_end, lowest, highest,
        stride_kv_b, stride_kv_n, False, CAUSAL, WINDOW, HAS_SOFT_CAP, HAS_ALIBI, D, D_PAD,
        PAGE, TILE, USE_TMA, PRECISION, STAGES,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, kv_desc, base, table, head, positions_q, dims, slopes, scale,
        soft_cap, full_end, highest, lowest, highest,
        stride_kv_b, stride_kv_n, True, CAUSAL, WINDOW, HAS_SOFT_CAP, HAS_ALIBI, D, D_PAD,
        PAGE, TILE, USE_TMA, PRECISION, STAGES,
    )  # fmt: skip
    acc /= total[:, None]
    tl.store(
        out_ptr + at_q[:, None] * stride_o_t + heads[:, None] * stride_o_h + dims[None, :],
        acc, mask=row_valid[:, None] & dim_valid[None, :],
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelConfig:
    """Tile sizes and launch parameters of both kernels; ``chunk`` None is chosen per batch."""

    decode_tile: int
    decode_warps: int
    decode_stages: int
    prefill_rows: int
    prefill_tile: int
    prefill_warps: int
    prefill_stages: int
    tma: bool
    chunk: int | None = None


def default_config(page: int, head_size: int, dtype: torch.dtype, is_cuda: bool) -> KernelConfig:
    """The fastest of the configurations tried on one H100 (head size 128, bf16).

    Pages of 64 tokens and more go through the tensor-copy engine, a box of 64 tokens at a time
    (478 TFLOP/s on 4 x 4096 causal, 386 by pointers at page 16); wider heads and fp32 take
    smaller tiles, which is what fits in shared memory.
    """
    wide = head_size > 128 or dtype == torch.float32
    decode_tile = 32 if wide else 64
    tma = is_cuda and page % 64 == 0 and head_size in (64, 128) and dtype != torch.float32
    if wide:
        rows, tile, warps, stages = 64, 32, 4, 2
    elif tma:
        rows, tile, warps, stages = 128, 64, 4, 2
    else:
        rows, tile, warps, stages = 256, 64, 8, 3
    return KernelConfig(
        decode_tile=decode_tile, decode_warps=2, decode_stages=3,
        prefill_rows=rows, prefill_tile=tile, prefill_warps=warps, prefill_stages=stages, tma=tma,
    )  # fmt: skip


@functools.cache
def num_programs(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 stands in for them under the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def choose_chunk(total_tokens: int, max_tokens: int, requests: int, programs: int) -> int:
    """Tokens of one split: a power of two from 256 to 4096.

    ``total_tokens`` x KV heads is divided so that ``programs`` programs, what the device runs at
    once, get one split each; longer splits are cheaper to merge. Where one request is far longer
    than the rest, splits stay short, so that its last one doesn't run alone at the end.
    """
    want = max(total_tokens // programs, 1)
    longest = 2048 if max_tokens * requests > 4 * total_tokens else 4096
    return min(max(1 << (want - 1).bit_length(), 256), longest)


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
    total_seq_len: int,
    scale: float,
    has_decodes: bool = True,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    causal: bool = True,
    config: KernelConfig | None = None,
) -> None:
    """Attention of a batch of decodes, prompt chunks, or both, into ``out``.

    Args:
        q: ``(T, Q, D)``, any strides over T and Q, dense D.
        kv_cache: ``(B, H, N, 2 * D)`` view in the dtype of ``q``, dense last dimension.
        out: ``(T, Q, D)``; every row of a scheduled token is written.
        query_start_loc: int32 ``(R + 1,)``; seq_lens: int32 ``(R,)``; block_table: int32
            ``(R, max_blocks)`` of blocks of ``N`` tokens.
        max_query_len, max_seq_len, total_seq_len: upper bounds known on the host.
        window: tokens that a query sees, itself included; 0 for all.
        alibi_slopes, sinks: float32 ``(Q,)``.
        has_decodes: some request has exactly one query token.
    """
    num_heads, head_size = q.shape[1], q.shape[2]
    num_kv_heads, page = kv_cache.shape[1], kv_cache.shape[2]
    group = num_heads // num_kv_heads
    requests = seq_lens.shape[0]
    d_pad = triton.next_power_of_2(head_size)
    config = config or default_config(page, head_size, q.dtype, q.is_cuda)
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    common = {
        "WINDOW": window, "HAS_SOFT_CAP": soft_cap > 0, "HAS_ALIBI": alibi_slopes is not None,
        "HAS_SINKS": sinks is not None, "GROUP": group, "D": head_size, "D_PAD": d_pad,
        "PAGE": page, "PRECISION": precision,
    }  # fmt: skip
    kv_strides = kv_cache.stride()[:3]
    assert kv_cache.stride(3) == 1 and q.stride(2) == 1 and out.stride(2) == 1
    if has_decodes:
        programs = 2 * num_programs(q.device)
        chunk = config.chunk or choose_chunk(
            total_seq_len * num_kv_heads, max_seq_len * num_kv_heads, requests, programs
        )
        visible = min(max_seq_len, window) if window else max_seq_len
        max_splits = triton.cdiv(visible, chunk) + (1 if window else 0)
        part = q.new_empty((requests, num_heads, max_splits, head_size), dtype=torch.float32)
        lse = q.new_empty((requests, num_heads, max_splits), dtype=torch.float32)
        _decode_kernel[(num_kv_heads, max_splits, requests)](
            q, kv_cache, out, part, lse, block_table, seq_lens, query_start_loc,
            alibi_slopes, sinks, scale, soft_cap, chunk,
            q.stride(0), q.stride(1), out.stride(0), out.stride(1), *kv_strides,
            block_table.stride(0), *part.stride()[:3], *lse.stride()[:2],
            ROWS=max(16, triton.next_power_of_2(group)), TILE=config.decode_tile,
            num_warps=config.decode_warps, num_stages=config.decode_stages, **common,
        )  # fmt: skip
        if max_splits > 1:
            _merge_kernel[(requests, num_heads)](
                out, part, lse, seq_lens, query_start_loc, chunk,
                out.stride(0), out.stride(1), *part.stride()[:3], *lse.stride()[:2],
                WINDOW=window, D=head_size, D_PAD=d_pad,
                MAX_SPLITS=triton.next_power_of_2(max_splits), STEP=4, num_warps=1,
            )  # fmt: skip
    if max_query_len > 1:
        rows = max(config.prefill_rows, triton.next_power_of_2(group))
        tokens = rows // group
        tile = config.prefill_tile
        # The copy engine reads a box of TILE tokens of one page; smaller pages take pointers.
        kv_desc = None
        if config.tma:
            kv_desc = TensorDescriptor.from_tensor(kv_cache, [1, 1, tile, head_size])
        _prefill_kernel[(num_kv_heads, q.shape[0] // tokens + requests)](
            q, kv_cache, kv_desc, out, block_table, seq_lens, query_start_loc,
            alibi_slopes, sinks, requests, scale, soft_cap,
            q.stride(0), q.stride(1), out.stride(0), out.stride(1), *kv_strides,
            block_table.stride(0), SKIP_DECODES=has_decodes, CAUSAL=causal, TOKENS=tokens,
            ROWS=rows, TILE=tile, USE_TMA=config.tma, num_warps=config.prefill_warps,
            STAGES=config.prefill_stages, **common,
        )  # fmt: skip
