"""Paged attention in Triton over keys and values that are two tensors, of equal width or not.

K is ``(B, H, N, D)``, V ``(B, H, N, Dv)``, each with any strides over B, H and N and a dense last
dimension; normally both are views of one packed cache (``paged_attn``). Requests with one query
token are the decode kernel's, split by the plan of ``triton_decode``; the prefill kernel serves
prompts and chunks behind a prefix. Scores are in base 2. Runs on NVIDIA and AMD GPUs alike: no
copy engine, no instruction of one vendor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.v1.attention.ops.triton_decode import (
    MAX_SPLITS,
    DecodePlan,
    finish_item,
    open_item,
    plan_decodes,
)
from vllm.v1.attention.ops.triton_paged_attention import query_tile
from vllm.v1.attention.ops.triton_softmax import open_softmax, score, softmax_step

__all__ = ["split_attention", "store_split"]


@triton.jit
def _paged_decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, lse_ptr, block_table_ptr, items_ptr, count_ptr,
    arrived_ptr, slopes_ptr, sinks_ptr, sums_ptr, scale, soft_cap,
    stride_q_t, stride_q_h, stride_o_t, stride_o_h, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_bt, stride_part_i, stride_part_h, stride_lse_i,
    stride_sums_t,
    WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr,
    DV_PAD: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """One item for the query heads of one KV head; the last of a request's items merges them."""
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
    v_dims = tl.arange(0, DV_PAD)
    v_valid = v_dims < DV
    q = tl.load(
        q_ptr + row * stride_q_t + heads[:, None] * stride_q_h + dims[None, :],
        mask=row_valid[:, None] & dim_valid[None, :], other=0.0,
    )  # fmt: skip
    positions = tl.zeros([ROWS], tl.int32) + (length - 1)
    slopes, top, total = open_softmax(
        slopes_ptr, sinks_ptr, heads, row_valid, split == 0, ROWS, HAS_ALIBI, HAS_SINKS
    )
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    k_base = k_ptr + head.to(tl.int64) * stride_k_h
    v_base = v_ptr + head.to(tl.int64) * stride_v_h
    table = block_table_ptr + request.to(tl.int64) * stride_bt
    for begin in tl.range(start, end, TILE):
        tokens = begin + tl.arange(0, TILE)
        valid = tokens < end
        if WINDOW > 0:
            valid = valid & (tokens >= length - WINDOW)
        block = tl.load(table + tokens // PAGE, mask=valid, other=0).to(tl.int64)
        slot = tokens % PAGE
        k = tl.load(
            k_base + (block * stride_k_b + slot * stride_k_n)[None, :] + dims[:, None],
            mask=valid[None, :] & dim_valid[:, None], other=0.0,
        )  # fmt: skip
        s = score(
            q, k, tokens, positions, tokens, slopes, scale, soft_cap, False, HAS_SOFT_CAP,
            HAS_ALIBI, PRECISION,
        )  # fmt: skip
        s = tl.where(valid[None, :], s, float("-inf"))
        p, shrink, total, top = softmax_step(s, top, total)
        v = tl.load(
            v_base + (block * stride_v_b + slot * stride_v_n)[:, None] + v_dims[None, :],
            mask=valid[:, None] & v_valid[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    acc *= (1.0 / total)[:, None]
    AT_ONCE: tl.constexpr = 4 if GROUP_PAD <= 4 else (2 if GROUP_PAD <= 8 else 1)
    finish_item(
        acc, total, top, out_ptr, part_ptr, lse_ptr, arrived_ptr, index, request, split, num_splits,
        row, head, heads, row_valid, v_dims, stride_o_t, stride_o_h, stride_part_i, stride_part_h,
        stride_lse_i, DV, ROWS, DV_PAD, MAX_SPLITS, AT_ONCE, GROUP, GROUP_PAD, sums_ptr,
        stride_sums_t,
    )  # fmt: skip


@triton.jit
def _attend(
    acc, total, top, q, k_base, v_base, table, positions, dims, v_dims, slopes, scale, soft_cap,
    start, end, lowest, highest, stride_k_b, stride_k_n, stride_v_b, stride_v_n,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of ``[start, end)``; only a MASKED call looks at bounds."""
    for begin in tl.range(start, end, TILE, num_stages=STAGES):
        tokens = begin + tl.arange(0, TILE)
        slot = tokens % PAGE
        k_mask = (dims < D)[:, None]
        v_mask = (v_dims < DV)[None, :]
        if MASKED:
            # Slots never written, or freed behind the window, may hold NaN.
            there = (tokens >= lowest) & (tokens < highest)
            block = tl.load(table + tokens // PAGE, mask=there, other=0).to(tl.int64)
            k_mask = k_mask & there[None, :]
            v_mask = v_mask & there[:, None]
        else:
            block = tl.load(table + tokens // PAGE).to(tl.int64)
        k = tl.load(
            k_base + (block * stride_k_b + slot * stride_k_n)[None, :] + dims[:, None],
            mask=k_mask, other=0.0,
        )  # fmt: skip
        s = score(
            q, k, tokens, positions, tokens, slopes, scale, soft_cap, False, HAS_SOFT_CAP,
            HAS_ALIBI, PRECISION,
        )  # fmt: skip
        if MASKED:
            seen = there[None, :]
            if CAUSAL:
                seen = seen & (tokens[None, :] <= positions[:, None])
            if WINDOW > 0:
                seen = seen & (tokens[None, :] > positions[:, None] - WINDOW)
            s = tl.where(seen, s, -1.0e30)
        p, shrink, total, top = softmax_step(s, top, total)
        v = tl.load(
            v_base + (block * stride_v_b + slot * stride_v_n)[:, None] + v_dims[None, :],
            mask=v_mask, other=0.0,
        )  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, top


@triton.jit(do_not_specialize=["requests"])
def _prefix_prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, block_table_ptr, seq_lens_ptr, query_start_ptr, slopes_ptr,
    sinks_ptr, requests, scale, soft_cap,
    stride_q_t, stride_q_h, stride_o_t, stride_o_h, stride_k_b, stride_k_h, stride_k_n,
    stride_v_b, stride_v_h, stride_v_n, stride_bt,
    WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr,
    DV_PAD: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``TOKENS`` new tokens x ``GROUP`` heads against their prefix and themselves."""
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    request, first, query_len, begin_q = query_tile(query_start_ptr, requests, tile, TOKENS)
    # Requests with one query token are the decode kernel's.
    if (begin_q >= query_len) | (query_len == 1):
        return
    length = tl.load(seq_lens_ptr + request)
    context = length - query_len
    rows = tl.arange(0, ROWS)
    token = begin_q + rows // GROUP
    heads = head * GROUP + rows % GROUP
    row_valid = (rows < TOKENS * GROUP) & (token < query_len)
    positions = context + token
    dims = tl.arange(0, D_PAD)
    v_dims = tl.arange(0, DV_PAD)
    at_q = (first + token).to(tl.int64)
    q = tl.load(
        q_ptr + at_q[:, None] * stride_q_t + heads[:, None] * stride_q_h + dims[None, :],
        mask=row_valid[:, None] & (dims < D)[None, :], other=0.0,
    )  # fmt: skip
    slopes, top, total = open_softmax(
        slopes_ptr, sinks_ptr, heads, row_valid, True, ROWS, HAS_ALIBI, HAS_SINKS
    )
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    k_base = k_ptr + head.to(tl.int64) * stride_k_h
    v_base = v_ptr + head.to(tl.int64) * stride_v_h
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
            acc, total, top, q, k_base, v_base, table, positions, dims, v_dims, slopes, scale,
            soft_cap, lowest // TILE * TILE, tl.minimum(full_start, highest), lowest, highest,
            stride_k_b, stride_k_n, stride_v_b, stride_v_n, True, CAUSAL, WINDOW, HAS_SOFT_CAP,
            HAS_ALIBI, D, DV, PAGE, TILE, STAGES, PRECISION,
        )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, k_base, v_base, table, positions, dims, v_dims, slopes, scale,
        soft_cap, full_start, full_end, lowest, highest,
        stride_k_b, stride_k_n, stride_v_b, stride_v_n, False, CAUSAL, WINDOW, HAS_SOFT_CAP,
        HAS_ALIBI, D, DV, PAGE, TILE, STAGES, PRECISION,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, k_base, v_base, table, positions, dims, v_dims, slopes, scale,
        soft_cap, full_end, highest, lowest, highest,
        stride_k_b, stride_k_n, stride_v_b, stride_v_n, True, CAUSAL, WINDOW, HAS_SOFT_CAP,
        HAS_ALIBI, D, DV, PAGE, TILE, STAGES, PRECISION,
    )  # fmt: skip
    acc *= (1.0 / total)[:, None]
    tl.store(
        out_ptr + at_q[:, None] * stride_o_t + heads[:, None] * stride_o_h + v_dims[None, :],
        acc, mask=row_valid[:, None] & (v_dims < DV)[None, :],
    )  # fmt: skip


def split_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
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
    lse: torch.Tensor | None = None,
) -> None:
    """Attention of new tokens to a cache that holds their keys and values already.

    Args:
        q: ``(T, Q, D)``, out: ``(T, Q, Dv)``; any strides over T and Q.
        key_cache: ``(B, H, N, D)``, value_cache: ``(B, H, N, Dv)`` in the dtype of ``q``.
        query_start_loc: int32 ``(R + 1,)``; seq_lens: int32 ``(R,)``; block_table: int32
            ``(R, blocks)``.
        has_decodes: some request may have exactly one new token.
        plan: of those; made here where it is None.
        lse: float32 ``(T, Q)``, of the requests with one token: logarithms, to the base 2, of the
            sums that their weights were divided by.
    """
    num_heads, width = q.shape[1:]
    kv_heads, page = key_cache.shape[1:3]
    width_v = value_cache.shape[3]
    group = num_heads // kv_heads
    requests = seq_lens.shape[0]
    assert q.stride(2) == out.stride(2) == key_cache.stride(3) == value_cache.stride(3) == 1
    exact = q.dtype == torch.float32
    strides = (
        *q.stride()[:2], *out.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3],
        block_table.stride(0),
    )  # fmt: skip
    shared = {
        "WINDOW": window, "HAS_SOFT_CAP": soft_cap > 0, "HAS_ALIBI": alibi_slopes is not None,
        "HAS_SINKS": sinks is not None, "GROUP": group, "D": width,
        "D_PAD": max(16, triton.next_power_of_2(width)), "DV": width_v,
        "DV_PAD": max(16, triton.next_power_of_2(width_v)), "PAGE": page,
        "PRECISION": "tf32x3" if exact else "tf32",
    }  # fmt: skip
    wide = exact or max(width, width_v) > 128
    if has_decodes:
        plan = plan or plan_decodes(seq_lens, query_start_loc, kv_heads, max_seq_len, window)
        part = q.new_empty((plan.num_items, num_heads, width_v), dtype=torch.float32)
        part_lse = q.new_empty((plan.num_items, num_heads), dtype=torch.float32)
        _paged_decode_kernel[(kv_heads, plan.num_items)](
            q, key_cache, value_cache, out, part, part_lse, block_table, plan.items, plan.count,
            plan.arrived, alibi_slopes, sinks, lse, scale, soft_cap, *strides, *part.stride()[:2],
            part_lse.stride(0), 0 if lse is None else lse.stride(0), **shared,
            GROUP_PAD=triton.next_power_of_2(group), ROWS=max(16, triton.next_power_of_2(group)),
            TILE=32 if wide else 64, MAX_SPLITS=MAX_SPLITS, num_warps=4, num_stages=2,
        )  # fmt: skip
    if max_query_len > 1:
        rows = max(64 if wide else 128, triton.next_power_of_2(group))
        tokens = rows // group
        _prefix_prefill_kernel[(kv_heads, q.shape[0] // tokens + requests)](
            q, key_cache, value_cache, out, block_table, seq_lens, query_start_loc, alibi_slopes,
            sinks, requests, scale, soft_cap, *strides, **shared, CAUSAL=causal, TOKENS=tokens,
            ROWS=rows, TILE=32 if wide else 64, STAGES=1 if exact else 2,
            num_warps=4 if wide else 8,
        )  # fmt: skip


@triton.jit
def _store_kernel(
    k_ptr, v_ptr, key_cache_ptr, value_cache_ptr, slots_ptr, page, heads,
    stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_kc_b, stride_kc_h, stride_kc_n,
    stride_vc_b, stride_vc_h, stride_vc_n,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    block = slot // page
    at = slot % page
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    dims = tl.arange(0, D_PAD)[None, :]
    v_dims = tl.arange(0, DV_PAD)[None, :]
    k_valid = (head < heads) & (dims < D)
    v_valid = (head < heads) & (v_dims < DV)
    k = tl.load(k_ptr + token * stride_k_t + head * stride_k_h + dims, mask=k_valid, other=0.0)
    v = tl.load(v_ptr + token * stride_v_t + head * stride_v_h + v_dims, mask=v_valid, other=0.0)
    at_k = block * stride_kc_b + head * stride_kc_h + at * stride_kc_n
    at_v = block * stride_vc_b + head * stride_vc_h + at * stride_vc_n
    tl.store(key_cache_ptr + at_k + dims, k, mask=k_valid)
    tl.store(value_cache_ptr + at_v + v_dims, v, mask=v_valid)


def store_split(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Store keys ``(T, H, D)`` and values ``(T, H, Dv)`` at slots int64 ``(S,)``, S <= T.

    Slot ``s`` is token ``s % N`` of block ``s // N``; -1 stores nothing.
    """
    heads, width = key.shape[1:]
    width_v = value.shape[2]
    assert key.stride(2) == value.stride(2) == key_cache.stride(3) == value_cache.stride(3) == 1
    if not slot_mapping.shape[0]:
        return
    at_once = min(8, triton.next_power_of_2(heads))
    _store_kernel[(slot_mapping.shape[0], triton.cdiv(heads, at_once))](
        key, value, key_cache, value_cache, slot_mapping, key_cache.shape[2], heads,
        *key.stride()[:2], *value.stride()[:2], *key_cache.stride()[:3],
        *value_cache.stride()[:3], D=width, D_PAD=triton.next_power_of_2(width), DV=width_v,
        DV_PAD=triton.next_power_of_2(width_v), HEADS=at_once, num_warps=2,
    )  # fmt: skip
