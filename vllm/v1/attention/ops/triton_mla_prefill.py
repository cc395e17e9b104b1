"""Attention of prompts to keys and values that are expanded from a paged cache of latents.

``expand_latents`` multiplies the latents of requests, read where they lie in the cache, with the
projection of some heads; ``expanded_attention`` attends to what came out, and takes the rotated
part of the keys from the cache again. Both work off tables of tiles that the host makes, so a
launch has no idle programs and nothing waits for the device.

The cache is a view ``(B, N, R + rope)`` with any strides over B and N and a dense last dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from vllm.v1.attention.ops.triton_mla import LOG2_E

__all__ = ["attention_tiles", "expand_latents", "expand_tiles", "expanded_attention"]

_EXPAND_TOKENS = 128
_EXPAND_COLUMNS = 128
_EXPAND_FIELDS = 4
_QUERY_TOKENS = 128
_QUERY_FIELDS = 6


def expand_tiles(rows: Sequence[int], seq_lens: Sequence[int]) -> np.ndarray:
    """Tiles of the tokens of requests, int32 ``(n, 4)``: request, first token, tokens, output row.

    Args:
        rows: of the block table, one for each request.
        seq_lens: tokens of each in the cache; their outputs lie one behind the other.
    """
    tiles = []
    base = 0
    for row, length in zip(rows, seq_lens, strict=True):
        tiles += [
            (row, begin, min(_EXPAND_TOKENS, length - begin), base + begin)
            for begin in range(0, length, _EXPAND_TOKENS)
        ]
        base += length
    return np.array(tiles, dtype=np.int32).reshape(-1, _EXPAND_FIELDS)


def attention_tiles(
    rows: Sequence[int],
    first_tokens: Sequence[int],
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
) -> np.ndarray:
    """Tiles of new tokens, int32 ``(n, 6)``, those that see most first.

    Fields: request, row of the first query, queries, position of the first, first expanded row of
    the request, 0.
    """
    tiles = []
    base = 0
    for row, first, count, length in zip(rows, first_tokens, query_lens, seq_lens, strict=True):
        tiles += [
            (row, first + at, min(_QUERY_TOKENS, count - at), length - count + at, base, 0)
            for at in range(0, count, _QUERY_TOKENS)
        ]
        base += length
    tiles.sort(key=lambda tile: -tile[3])
    return np.array(tiles, dtype=np.int32).reshape(-1, _QUERY_FIELDS)


@triton.jit
def _expand_kernel(
    kv_ptr, weight_ptr, out_ptr, block_table_ptr, tiles_ptr,
    stride_kv_b, stride_kv_n, stride_w_h, stride_w_d, stride_o_t, stride_bt, columns,
    WIDTH: tl.constexpr, RANK: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, FIELDS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``latents (TOKENS, R) x weight (R, COLUMNS)``; column c is number c % WIDTH of a head."""
    tile = tiles_ptr + tl.program_id(1) * FIELDS
    request = tl.load(tile).to(tl.int64)
    begin = tl.load(tile + 1)
    count = tl.load(tile + 2)
    first = tl.load(tile + 3).to(tl.int64)
    rows = tl.arange(0, TOKENS)
    valid = rows < count
    tokens = begin + rows
    blocks = tl.load(block_table_ptr + request * stride_bt + tokens // PAGE, mask=valid, other=0)
    at = blocks.to(tl.int64) * stride_kv_b + (tokens % PAGE) * stride_kv_n
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_valid = column < columns
    at_weight = (column // WIDTH) * stride_w_h + (column % WIDTH) * stride_w_d
    acc = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for k in tl.range(0, RANK, DEPTH, num_stages=STAGES):
        depth = k + tl.arange(0, DEPTH)
        inside = depth < RANK
        x = tl.load(
            kv_ptr + at[:, None] + depth[None, :], mask=valid[:, None] & inside[None, :], other=0.0
        )
        w = tl.load(
            weight_ptr + at_weight[None, :] + depth[:, None],
            mask=column_valid[None, :] & inside[:, None], other=0.0,
        )  # fmt: skip
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    target = out_ptr + (first + rows)[:, None] * stride_o_t + column[None, :]
    tl.store(target, acc, mask=valid[:, None] & column_valid[None, :])


def expand_latents(
    kv_cache: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    block_table: torch.Tensor,
    tiles: torch.Tensor,
) -> None:
    """Keys or values of some heads for all tokens of the tiles.

    Args:
        kv_cache: ``(B, N, R + rope)``.
        weight: ``(H, width, R)`` in the cache's dtype, any strides over H and width.
        out: ``(S, H * width)``, rows may be strided.
        tiles: of ``expand_tiles``, on the device.
    """
    heads, width, rank = weight.shape
    assert weight.stride(2) == 1 and out.stride(1) == 1 and kv_cache.stride(2) == 1
    exact = weight.dtype == torch.float32
    tokens = _EXPAND_TOKENS
    columns = 32 if exact else _EXPAND_COLUMNS
    _expand_kernel[(triton.cdiv(heads * width, columns), tiles.shape[0])](
        kv_cache, weight, out, block_table, tiles, *kv_cache.stride()[:2], *weight.stride()[:2],
        out.stride(0), block_table.stride(0), heads * width, WIDTH=width, RANK=rank,
        PAGE=kv_cache.shape[1], TOKENS=tokens, COLUMNS=columns, DEPTH=32 if exact else 64,
        FIELDS=_EXPAND_FIELDS, STAGES=1 if exact else 3,
        PRECISION="tf32x3" if exact else "tf32", num_warps=8,
    )  # fmt: skip


@triton.jit
def _attend(
    acc, total, top, q, q_rotated, k_ptr, v_ptr, kv_ptr, table, positions, dims, rope_dims, v_dims,
    scale, start, end, highest, stride_k_t, stride_v_t, stride_kv_b, stride_kv_n,
    MASKED: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr,
    RANK: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of ``[start, end)``; only a MASKED call looks at bounds."""
    for begin in tl.range(start, end, TILE, num_stages=STAGES):
        tokens = begin + tl.arange(0, TILE)
        seen = tokens < highest
        if MASKED:
            block = tl.load(table + tokens // PAGE, mask=seen, other=0)
        else:
            block = tl.load(table + tokens // PAGE)
        at = block.to(tl.int64) * stride_kv_b + (tokens % PAGE) * stride_kv_n
        row = tokens.to(tl.int64)
        k_mask = (dims < NOPE)[:, None]
        r_mask = (rope_dims < ROPE)[:, None]
        v_mask = (v_dims < V)[None, :]
        if MASKED:
            k_mask = k_mask & seen[None, :]
            r_mask = r_mask & seen[None, :]
            v_mask = v_mask & seen[:, None]
        k = tl.load(k_ptr + row[None, :] * stride_k_t + dims[:, None], mask=k_mask, other=0.0)
        rotated = tl.load(
            kv_ptr + at[None, :] + (RANK + rope_dims)[:, None], mask=r_mask, other=0.0
        )
        s = tl.dot(q, k, input_precision=PRECISION)
        s = tl.dot(q_rotated, rotated, s, input_precision=PRECISION) * scale
        if MASKED:
            s = tl.where(tokens[None, :] <= positions[:, None], s, -1.0e30)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + row[:, None] * stride_v_t + v_dims[None, :], mask=v_mask, other=0.0)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit
def _expanded_kernel(
    q_ptr, k_ptr, v_ptr, kv_ptr, out_ptr, block_table_ptr, tiles_ptr, scale,
    stride_q_t, stride_q_h, stride_k_t, stride_v_t, stride_o_t, stride_o_h,
    stride_kv_b, stride_kv_n, stride_bt,
    NOPE: tl.constexpr, NOPE_PAD: tl.constexpr, ROPE: tl.constexpr, ROPE_PAD: tl.constexpr,
    V: tl.constexpr, V_PAD: tl.constexpr, RANK: tl.constexpr, PAGE: tl.constexpr,
    TOKENS: tl.constexpr, TILE: tl.constexpr, FIELDS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head against all keys that they see; scores are in base 2."""
    head = tl.program_id(0).to(tl.int64)
    tile = tiles_ptr + tl.program_id(1) * FIELDS
    request = tl.load(tile).to(tl.int64)
    first = tl.load(tile + 1).to(tl.int64)
    count = tl.load(tile + 2)
    position = tl.load(tile + 3)
    base = tl.load(tile + 4).to(tl.int64)
    rows = tl.arange(0, TOKENS)
    row_valid = rows < count
    positions = position + rows
    dims = tl.arange(0, NOPE_PAD)
    rope_dims = tl.arange(0, ROPE_PAD)
    v_dims = tl.arange(0, V_PAD)
    at_q = q_ptr + (first + rows)[:, None] * stride_q_t + head * stride_q_h
    q = tl.load(at_q + dims[None, :], mask=row_valid[:, None] & (dims < NOPE)[None, :], other=0.0)
    q_rotated = tl.load(
        at_q + (NOPE + rope_dims)[None, :],
        mask=row_valid[:, None] & (rope_dims < ROPE)[None, :], other=0.0,
    )  # fmt: skip
    top = tl.full([TOKENS], -1.0e30, tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    acc = tl.zeros([TOKENS, V_PAD], tl.float32)
    table = block_table_ptr + request * stride_bt
    k_rows = k_ptr + base * stride_k_t + head * NOPE
    v_rows = v_ptr + base * stride_v_t + head * V
    highest = position + count
    full_end = (position + 1) // TILE * TILE
    acc, total, top = _attend(
        acc, total, top, q, q_rotated, k_rows, v_rows, kv_ptr, table, positions, dims, rope_dims,
        v_dims, scale, 0, full_end, highest, stride_k_t, stride_v_t, stride_kv_b, stride_kv_n,
        False, NOPE, ROPE, V, RANK, PAGE, TILE, STAGES, PRECISION,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, q_rotated, k_rows, v_rows, kv_ptr, table, positions, dims, rope_dims,
        v_dims, scale, full_end, highest, highest, stride_k_t, stride_v_t, stride_kv_b,
        stride_kv_n, True, NOPE, ROPE, V, RANK, PAGE, TILE, STAGES, PRECISION,
    )  # fmt: skip
    acc *= (1.0 / total)[:, None]
    tl.store(
        out_ptr + (first + rows)[:, None] * stride_o_t + head * stride_o_h + v_dims[None, :],
        acc, mask=row_valid[:, None] & (v_dims < V)[None, :],
    )  # fmt: skip


def expanded_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
    block_table: torch.Tensor,
    tiles: torch.Tensor,
    *,
    rank: int,
    scale: float,
) -> None:
    """Causal attention of the tiles' tokens to expanded keys and values of H heads.

    Args:
        query: ``(T, H, nope + rope)``, any strides over T and H.
        keys: ``(S, H * nope)``, values: ``(S, H * v)``, of ``expand_latents``.
        kv_cache: ``(B, N, rank + rope)``, for the rotated parts of keys.
        out: ``(T, H, v)``, any strides over T and H; rows outside the tiles stay as they are.
        tiles: of ``attention_tiles``, on the device.
    """
    heads, v_width = out.shape[1:]
    nope = keys.shape[1] // heads
    rope = query.shape[2] - nope
    assert query.stride(2) == out.stride(2) == kv_cache.stride(2) == 1
    assert kv_cache.shape[2] == rank + rope and values.shape[1] == heads * v_width
    exact = query.dtype == torch.float32
    _expanded_kernel[(heads, tiles.shape[0])](
        query, keys, values, kv_cache, out, block_table, tiles, scale * LOG2_E,
        *query.stride()[:2], keys.stride(0), values.stride(0), *out.stride()[:2],
        *kv_cache.stride()[:2], block_table.stride(0), NOPE=nope,
        NOPE_PAD=max(16, triton.next_power_of_2(nope)), ROPE=rope,
        ROPE_PAD=max(16, triton.next_power_of_2(rope)), V=v_width,
        V_PAD=max(16, triton.next_power_of_2(v_width)), RANK=rank, PAGE=kv_cache.shape[1],
        TOKENS=_QUERY_TOKENS, TILE=32 if exact else 64, FIELDS=_QUERY_FIELDS,
        STAGES=1 if exact else 2, PRECISION="tf32x3" if exact else "tf32", num_warps=8,
    )  # fmt: skip
