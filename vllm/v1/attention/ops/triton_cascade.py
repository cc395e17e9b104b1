"""Decodes behind a prefix that all requests share: its pages are read once for all of them.

The queries of all requests are the rows of tiles that attend to the prefix, cut into stretches so
that the device is busy; what follows the prefix is every request's own, by the decode kernel over
the rest of its block table. A last kernel merges the parts by their log-sum-exps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm.v1.attention.ops.paged_attn import PagedAttention
from vllm.v1.attention.ops.triton_decode import DecodePlan, num_multiprocessors, plan_decodes
from vllm.v1.attention.ops.triton_split_attention import split_attention

__all__ = ["CascadePlan", "cascade_attention", "plan_cascade", "prefix_worth_sharing"]

_LEAST_PREFIX = 256
_LEAST_REQUESTS = 4
_STRETCH = 128
_MAX_STRETCHES = 64
_ROWS = 64
_TILE = 64


def prefix_worth_sharing(prefix_len: int, requests: int, shortest: int, page: int) -> int:
    """Tokens of a shared prefix to read once, whole blocks of it; 0 where it doesn't pay.

    Args:
        prefix_len: tokens that all requests share.
        shortest: tokens of the shortest request; at least one stays its own.
    """
    usable = min(prefix_len, shortest - 1) // page * page
    pays = usable >= _LEAST_PREFIX and requests >= _LEAST_REQUESTS
    return usable if pays else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CascadePlan:
    """Of one step; ``rest`` plans what follows the prefix."""

    prefix_len: int
    page: int
    rest: DecodePlan
    rest_lens: torch.Tensor
    """int32 (R,): tokens of each request behind the prefix."""


def plan_cascade(
    prefix_len: int,
    page: int,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    kv_heads: int,
    max_seq_len: int,
) -> CascadePlan:
    """Plan a step in which every request has one token; ``prefix_len`` is whole blocks."""
    assert prefix_len % page == 0
    rest_lens = seq_lens - prefix_len
    rest = plan_decodes(rest_lens, query_start_loc, kv_heads, max_seq_len - prefix_len)
    return CascadePlan(prefix_len=prefix_len, page=page, rest=rest, rest_lens=rest_lens)


@triton.jit(do_not_specialize=["prefix_len", "tokens", "stretch"])
def _shared_prefix_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, lse_ptr, block_table_ptr, prefix_len, tokens, stretch, scale,
    soft_cap,
    stride_q_t, stride_q_h, stride_k_b, stride_k_h, stride_k_n, stride_v_b, stride_v_h, stride_v_n,
    stride_part_s, stride_part_t, stride_part_h, stride_lse_s, stride_lse_t,
    HAS_SOFT_CAP: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some (token, head) rows of one KV head against one stretch of the prefix."""
    head = tl.program_id(0)
    split = tl.program_id(2)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = (rows // GROUP).to(tl.int64)
    heads = head * GROUP + rows % GROUP
    row_valid = token < tokens
    dims = tl.arange(0, D_PAD)
    dim_valid = dims < D
    both = row_valid[:, None] & dim_valid[None, :]
    q = tl.load(
        q_ptr + token[:, None] * stride_q_t + heads[:, None] * stride_q_h + dims[None, :],
        mask=both, other=0.0,
    )  # fmt: skip
    top = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    start = split * stretch
    end = tl.minimum(start + stretch, prefix_len)
    k_base = k_ptr + head.to(tl.int64) * stride_k_h
    v_base = v_ptr + head.to(tl.int64) * stride_v_h
    for begin in tl.range(start, end, TILE):
        at = begin + tl.arange(0, TILE)
        valid = at < end
        block = tl.load(block_table_ptr + at // PAGE, mask=valid, other=0).to(tl.int64)
        slot = at % PAGE
        k = tl.load(
            k_base + (block * stride_k_b + slot * stride_k_n)[None, :] + dims[:, None],
            mask=valid[None, :] & dim_valid[:, None], other=0.0,
        )  # fmt: skip
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        if HAS_SOFT_CAP:
            # tanh(x) = 2 / (1 + exp(-2x)) - 1
            s = soft_cap * (2.0 / (1.0 + tl.exp2(s * (-2.8853900817779268 / soft_cap))) - 1.0)
        s = tl.where(valid[None, :], s * 1.4426950408889634, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(
            v_base + (block * stride_v_b + slot * stride_v_n)[:, None] + dims[None, :],
            mask=valid[:, None] & dim_valid[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    at_part = part_ptr + split.to(tl.int64) * stride_part_s + token * stride_part_t
    tl.store(
        (at_part + heads * stride_part_h)[:, None] + dims[None, :], acc / total[:, None], mask=both
    )
    tl.store(
        lse_ptr + split.to(tl.int64) * stride_lse_s + token * stride_lse_t + heads,
        top + tl.log2(total), mask=row_valid,
    )  # fmt: skip


@triton.jit
def _merge_kernel(
    part_ptr, lse_ptr, rest_ptr, rest_lse_ptr, rest_lens_ptr, sinks_ptr, out_ptr, splits,
    stride_part_s, stride_part_t, stride_part_h, stride_lse_s, stride_lse_t, stride_rest_t,
    stride_rest_h, stride_rest_lse_t, stride_o_t, stride_o_h,
    HAS_SINKS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One head of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    # A request that only fills a batch up.
    if tl.load(rest_lens_ptr + token) <= 0:
        return
    dims = tl.arange(0, D_PAD)
    valid = dims < D
    split = tl.arange(0, SPLITS)
    lse = tl.load(
        lse_ptr + split * stride_lse_s + token * stride_lse_t + head, mask=split < splits,
        other=-1.0e30,
    )  # fmt: skip
    rest_lse = tl.load(rest_lse_ptr + token * stride_rest_lse_t + head)
    top = tl.maximum(tl.max(lse, 0), rest_lse)
    if HAS_SINKS:
        # A score without a value.
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    weights = tl.exp2(lse - top)
    rest_weight = tl.exp2(rest_lse - top)
    total = tl.sum(weights, 0) + rest_weight
    if HAS_SINKS:
        total += tl.exp2(sink - top)
    at = part_ptr + token * stride_part_t + head * stride_part_h
    parts = tl.load(
        at + split[:, None] * stride_part_s + dims[None, :],
        mask=(split < splits)[:, None] & valid[None, :], other=0.0,
    )  # fmt: skip
    rest = tl.load(rest_ptr + token * stride_rest_t + head * stride_rest_h + dims, mask=valid)
    x = tl.sum(parts * weights[:, None], 0) + rest.to(tl.float32) * rest_weight
    tl.store(out_ptr + token * stride_o_t + head * stride_o_h + dims, x / total, mask=valid)


def cascade_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
    plan: CascadePlan,
    *,
    query_start_loc: torch.Tensor,
    block_table: torch.Tensor,
    max_seq_len: int,
    scale: float,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attention of one token of each request into ``out``.

    Args:
        q, out: ``(R, Q, D)``, any strides over R and Q.
        kv_cache: ``(B, H, N, 2 * D)`` in the dtype of ``q``, any strides with a dense last axis.
        query_start_loc: int32 ``(R + 1,)``. block_table: int32 ``(R, blocks)``, whose rows begin
            with the same blocks.
    """
    tokens, num_heads, width = q.shape
    kv_heads, page = kv_cache.shape[1:3]
    assert page == plan.page
    keys, values = PagedAttention.split_kv_cache(kv_cache, kv_heads, width)
    group = num_heads // kv_heads
    row_tiles = triton.cdiv(tokens * group, _ROWS)
    wanted = triton.cdiv(2 * num_multiprocessors(q.device), row_tiles * kv_heads)
    splits = min(wanted, _MAX_STRETCHES, triton.cdiv(plan.prefix_len, _STRETCH))
    stretch = triton.cdiv(triton.cdiv(plan.prefix_len, splits), _TILE) * _TILE
    splits = triton.cdiv(plan.prefix_len, stretch)
    part = q.new_empty((splits, tokens, num_heads, width), dtype=torch.float32)
    lse = q.new_empty((splits, tokens, num_heads), dtype=torch.float32)
    pad = max(16, triton.next_power_of_2(width))
    _shared_prefix_kernel[(kv_heads, row_tiles, splits)](
        q, keys, values, part, lse, block_table, plan.prefix_len, tokens, stretch, scale, soft_cap,
        *q.stride()[:2], *keys.stride()[:3], *values.stride()[:3], *part.stride()[:3],
        *lse.stride()[:2], HAS_SOFT_CAP=soft_cap > 0, GROUP=group, ROWS=_ROWS, D=width, D_PAD=pad,
        PAGE=page, TILE=_TILE, PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        num_warps=4,
    )  # fmt: skip
    rest, rest_lse = torch.empty_like(q), lse.new_empty((tokens, num_heads))
    split_attention(
        q, keys, values, rest,
        query_start_loc=query_start_loc, seq_lens=plan.rest_lens,
        block_table=block_table[:, plan.prefix_len // page :], max_query_len=1,
        max_seq_len=max_seq_len - plan.prefix_len, scale=scale, plan=plan.rest, soft_cap=soft_cap,
        lse=rest_lse,
    )  # fmt: skip
    _merge_kernel[(tokens, num_heads)](
        part, lse, rest, rest_lse, plan.rest_lens, sinks, out, splits, *part.stride()[:3],
        *lse.stride()[:2], *rest.stride()[:2], rest_lse.stride(0), *out.stride()[:2],
        HAS_SINKS=sinks is not None, D=width, D_PAD=pad, SPLITS=triton.next_power_of_2(splits),
        num_warps=2,
    )  # fmt: skip
