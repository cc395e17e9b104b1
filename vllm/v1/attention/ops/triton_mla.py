"""Attention to latents themselves over a paged cache, in Triton: store, and decode with split KV.

The cache is a view ``(B, N, R + rope)`` with any strides over B and N and a dense last dimension:
a latent of width R, then the rotated part of the key. All heads share it; with the projections
absorbed into query and output, a latent is key and value at once and is read once for as many
heads as fit the rows of a tile. Work items are those of ``triton_decode``: the launch depends on
the number of requests alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm.v1.attention.ops.triton_decode import DecodePlan

__all__ = [
    "AbsorbedConfig",
    "absorbed_attention",
    "default_absorbed_config",
    "head_tiles",
    "store_latents",
]

# As in ``triton_decode``.
_FIELDS = 8
_MAX_SPLITS = 64
LOG2_E = 1.4426950408889634


@triton.jit
def _store_latents_kernel(
    latent_ptr, rotated_ptr, kv_ptr, slots_ptr, page, stride_latent, stride_rotated,
    stride_kv_b, stride_kv_n,
    RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    at = tl.arange(0, BLOCK)
    is_rotated = (at >= RANK) & (at < RANK + ROPE)
    x = tl.load(latent_ptr + token * stride_latent + at, mask=at < RANK, other=0.0)
    y = tl.load(rotated_ptr + token * stride_rotated + at - RANK, mask=is_rotated, other=0.0)
    target = kv_ptr + (slot // page) * stride_kv_b + (slot % page) * stride_kv_n
    tl.store(target + at, tl.where(is_rotated, y, x), mask=at < RANK + ROPE)


def store_latents(
    latents: torch.Tensor,
    rotated: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Store each token's latent and rotated key part at its slot.

    Args:
        latents: ``(T, R)``; rotated: ``(T, rope)``; rows may be strided.
        kv_cache: ``(B, N, R + rope)``, any strides over B and N.
        slot_mapping: int64 ``(S,)``, S <= T; slot ``s`` is state ``s % N`` of block ``s // N``,
            -1 stores nothing.
    """
    rank, rope = latents.shape[1], rotated.shape[1]
    assert latents.stride(1) == rotated.stride(1) == kv_cache.stride(2) == 1
    assert kv_cache.shape[2] == rank + rope
    if slot_mapping.shape[0]:
        _store_latents_kernel[(slot_mapping.shape[0],)](
            latents, rotated, kv_cache, slot_mapping, kv_cache.shape[1], latents.stride(0),
            rotated.stride(0), kv_cache.stride(0), kv_cache.stride(1), RANK=rank, ROPE=rope,
            BLOCK=triton.next_power_of_2(rank + rope), num_warps=2,
        )  # fmt: skip


@triton.jit
def _absorbed_kernel(
    q_ptr, rotated_ptr, kv_ptr, out_ptr, part_ptr, lse_ptr, block_table_ptr, items_ptr, count_ptr,
    arrived_ptr, scale,
    stride_q_t, stride_q_h, stride_r_t, stride_r_h, stride_o_t, stride_o_h,
    stride_kv_b, stride_kv_n, stride_bt, stride_part_i, stride_part_h, stride_lse_i,
    HEADS: tl.constexpr, ROWS: tl.constexpr, FIELDS: tl.constexpr, RANK: tl.constexpr,
    RANK_PAD: tl.constexpr, ROPE: tl.constexpr, ROPE_PAD: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """One item for ``ROWS`` heads; scores are in base 2 (``scale`` carries log2 e).

    An item that is all of its request writes the output; the others leave a normalised partial
    output and its log2-sum-exp, and the last to arrive merges them, in the order of the tokens.
    """
    part = tl.program_id(0)
    index = tl.program_id(1)
    if index >= tl.load(count_ptr):
        return
    item = items_ptr + index * FIELDS
    request = tl.load(item)
    start = tl.load(item + 1)
    end = tl.load(item + 2)
    split = tl.load(item + 3)
    num_splits = tl.load(item + 4)
    row = tl.load(item + 5).to(tl.int64)

    heads = part * ROWS + tl.arange(0, ROWS)
    head_valid = heads < HEADS
    dims = tl.arange(0, RANK_PAD)
    dim_valid = dims < RANK
    rope_dims = tl.arange(0, ROPE_PAD)
    rope_valid = rope_dims < ROPE
    q = tl.load(
        q_ptr + row * stride_q_t + heads[:, None] * stride_q_h + dims[None, :],
        mask=head_valid[:, None] & dim_valid[None, :], other=0.0,
    )  # fmt: skip
    q_rotated = tl.load(
        rotated_ptr + row * stride_r_t + heads[:, None] * stride_r_h + rope_dims[None, :],
        mask=head_valid[:, None] & rope_valid[None, :], other=0.0,
    )  # fmt: skip
    top = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, RANK_PAD], tl.float32)
    table = block_table_ptr + request.to(tl.int64) * stride_bt
    for begin in tl.range(start, end, TILE, num_stages=STAGES):
        begin = tl.multiple_of(begin, TILE)
        tokens = begin + tl.arange(0, TILE)
        valid = tokens < end
        if PAGE % TILE == 0:
            # A tile lies in one page.
            block = tl.load(table + begin // PAGE).to(tl.int64)
            at = block * stride_kv_b + (tokens % PAGE) * stride_kv_n
        else:
            blocks = tl.load(table + tokens // PAGE, mask=valid, other=0).to(tl.int64)
            at = blocks * stride_kv_b + (tokens % PAGE) * stride_kv_n
        latent = tl.load(
            kv_ptr + at[:, None] + dims[None, :], mask=valid[:, None] & dim_valid[None, :],
            other=0.0,
        )  # fmt: skip
        rotated = tl.load(
            kv_ptr + at[:, None] + (RANK + rope_dims)[None, :],
            mask=valid[:, None] & rope_valid[None, :], other=0.0,
        )  # fmt: skip
        s = tl.dot(q, tl.trans(latent), input_precision=PRECISION)
        s = tl.dot(q_rotated, tl.trans(rotated), s, input_precision=PRECISION)
        s = tl.where(valid[None, :], s * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(latent.dtype), latent, acc, input_precision=PRECISION)
        top = new_top
    acc *= (1.0 / total)[:, None]
    at_out = out_ptr + row * stride_o_t + heads[:, None] * stride_o_h + dims[None, :]
    out_valid = head_valid[:, None] & dim_valid[None, :]
    if num_splits == 1:
        tl.store(at_out, acc, mask=out_valid)
        return
    at_part = part_ptr + heads[:, None] * stride_part_h + dims[None, :]
    at_lse = lse_ptr + heads
    mine = index.to(tl.int64)
    tl.store(at_part + mine * stride_part_i, acc, mask=out_valid)
    tl.store(at_lse + mine * stride_lse_i, top + tl.log2(total), mask=head_valid)
    # All threads have written before the one that counts says so.
    tl.debug_barrier()
    arrived = arrived_ptr + request * tl.num_programs(0) + part
    if tl.atomic_add(arrived, 1, sem="acq_rel") != num_splits - 1:
        return
    # For the next launch.
    tl.store(arrived, 0)
    first = mine - split
    # Past the first-level cache, which knows nothing of other multiprocessors' writes.
    splits = tl.arange(0, MAX_SPLITS)
    all_lse = tl.load(
        at_lse[None, :] + (first + splits)[:, None] * stride_lse_i,
        mask=(splits < num_splits)[:, None] & head_valid[None, :], other=-1.0e30,
        cache_modifier=".cg",
    )  # fmt: skip
    top = tl.max(all_lse, 0)
    total = tl.sum(tl.exp2(all_lse - top[None, :]), 0)
    acc = tl.zeros([ROWS, RANK_PAD], tl.float32)
    for other in tl.range(0, num_splits):
        lse = tl.load(
            at_lse + (first + other) * stride_lse_i, mask=head_valid, other=-1.0e30,
            cache_modifier=".cg",
        )  # fmt: skip
        x = tl.load(
            at_part + (first + other) * stride_part_i, mask=out_valid, other=0.0,
            cache_modifier=".cg",
        )  # fmt: skip
        acc += x * tl.exp2(lse - top)[:, None]
    tl.store(at_out, acc / total[:, None], mask=out_valid)


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsorbedConfig:
    """``rows`` heads of a program, ``tile`` tokens of an iteration (divides 64), and the launch."""

    rows: int
    tile: int
    warps: int
    stages: int


def default_absorbed_config(num_heads: int, dtype: torch.dtype) -> AbsorbedConfig:
    """The fastest of those tried on one H100 at R = 512 (64 x 4096, page 64).

    Tensor cores take 16 rows at least: 161 us with tiles of 64 for 16 heads, 168 with 32. For 128
    heads 499 us with 32 rows and 567 with 64, whose accumulator spills registers.
    """
    if dtype == torch.float32:
        return AbsorbedConfig(rows=16, tile=16, warps=4, stages=1)
    if num_heads <= 16:
        return AbsorbedConfig(rows=16, tile=64, warps=4, stages=2)
    return AbsorbedConfig(rows=32, tile=32, warps=4, stages=2)


def head_tiles(num_heads: int, dtype: torch.dtype, config: AbsorbedConfig | None = None) -> int:
    """Programs that share an item: what a plan for this many heads is made with as KV heads."""
    config = config or default_absorbed_config(num_heads, dtype)
    return -(-num_heads // config.rows)


def absorbed_attention(
    query: torch.Tensor,
    rotated: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
    plan: DecodePlan,
    block_table: torch.Tensor,
    *,
    scale: float,
    config: AbsorbedConfig | None = None,
) -> None:
    """Weighted sums of latents for the planned requests' tokens, into their rows of ``out``.

    Args:
        query: ``(T, Q, R)``, queries as they meet latents; rotated: ``(T, Q, rope)``; any strides
            over T and Q, dense last dimension.
        kv_cache: ``(B, N, R + rope)`` in the dtype of ``query``.
        out: ``(T, Q, R)``, any strides over T and Q.
        plan: made with ``head_tiles(Q, dtype)`` as its KV heads.
        block_table: int32 ``(R, max_blocks)``.
    """
    num_heads, rank = query.shape[1:]
    rope = rotated.shape[2]
    config = config or default_absorbed_config(num_heads, query.dtype)
    tiles = head_tiles(num_heads, query.dtype, config)
    assert query.stride(2) == rotated.stride(2) == out.stride(2) == kv_cache.stride(2) == 1
    assert plan.arrived.shape[1] == tiles, "a plan for another number of heads"
    part = query.new_empty((plan.num_items, num_heads, rank), dtype=torch.float32)
    lse = query.new_empty((plan.num_items, num_heads), dtype=torch.float32)
    _absorbed_kernel[(tiles, plan.num_items)](
        query, rotated, kv_cache, out, part, lse, block_table, plan.items, plan.count, plan.arrived,
        scale * LOG2_E, *query.stride()[:2], *rotated.stride()[:2], *out.stride()[:2],
        *kv_cache.stride()[:2], block_table.stride(0), *part.stride()[:2], lse.stride(0),
        HEADS=num_heads, ROWS=config.rows, FIELDS=_FIELDS, RANK=rank,
        RANK_PAD=max(16, triton.next_power_of_2(rank)), ROPE=rope,
        ROPE_PAD=max(16, triton.next_power_of_2(rope)), PAGE=kv_cache.shape[1], TILE=config.tile,
        STAGES=config.stages, PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
        MAX_SPLITS=_MAX_SPLITS, num_warps=config.warps,
    )  # fmt: skip
