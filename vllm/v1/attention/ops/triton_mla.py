"""Attention to latents themselves over a paged cache, in Triton: store, and decode with split KV.

The cache is a view ``(B, N, R + rope)`` with any strides over B and N and a dense last dimension:
a latent of width R, then the rotated part of the key. All heads share it; with the projections
absorbed into query and output, a latent is key and value at once and is read once for as many
heads as fit the rows of a tile. Programs take equal shares of all requests' tokens
(``triton_shares``): the launch depends on the number of requests alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm.utils.dependent_launch import await_previous, options, release
from vllm.v1.attention.ops.triton_decode import num_multiprocessors
from vllm.v1.attention.ops.triton_shares import (
    PROGRAM_FIELDS,
    REQUEST_FIELDS,
    SHARE_TILE,
    SharePlan,
    make_share_buffers,
    merge_shares,
)

__all__ = [
    "AbsorbedConfig",
    "absorbed_attention",
    "default_absorbed_config",
    "make_absorbed_buffers",
    "store_latents",
]

LOG2_E = 1.4426950408889634
# What the widest configuration takes.
_SHARED_BYTES = 231_000


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
    q_ptr, rotated_ptr, kv_ptr, out_ptr, part_ptr, lse_ptr, block_table_ptr, programs_ptr,
    requests_ptr, scale,
    stride_q_t, stride_q_h, stride_r_t, stride_r_h, stride_o_t, stride_o_h,
    stride_kv_b, stride_bt, stride_part_i, stride_part_h, stride_lse_i,
    STRIDE_N: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
    RANK_PAD: tl.constexpr, ROPE: tl.constexpr, ROPE_PAD: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    P_FIELDS: tl.constexpr, R_FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One share for ``ROWS`` heads; scores are in base 2 (``scale`` carries log2 e)."""
    release(PDL)
    await_previous(PDL)
    part = tl.program_id(0)
    program = tl.program_id(1)
    share = programs_ptr + program * P_FIELDS
    low = tl.load(share)
    high = tl.load(share + 1)
    first = tl.load(share + 2)
    last = tl.load(share + 3)
    if low >= high:
        return
    heads = part * ROWS + tl.arange(0, ROWS)
    head_valid = heads < HEADS
    dims = tl.arange(0, RANK_PAD)
    dim_valid = dims < RANK
    rope_dims = tl.arange(0, ROPE_PAD)
    rope_valid = rope_dims < ROPE
    out_valid = head_valid[:, None] & dim_valid[None, :]
    within = tl.arange(0, TILE)
    for request in tl.range(first, last + 1, num_stages=1):
        fields = requests_ptr + request * R_FIELDS
        first_tile = tl.load(fields)
        end_tile = tl.load(fields + 1)
        length = tl.load(fields + 2)
        row = tl.load(fields + 3).to(tl.int64)
        start = (tl.maximum(low, first_tile) - first_tile) * UNIT
        end = tl.minimum((tl.minimum(high, end_tile) - first_tile) * UNIT, length)
        q = tl.load(
            q_ptr + row * stride_q_t + heads[:, None] * stride_q_h + dims[None, :],
            mask=out_valid, other=0.0,
        )  # fmt: skip
        q_rotated = tl.load(
            rotated_ptr + row * stride_r_t + heads[:, None] * stride_r_h + rope_dims[None, :],
            mask=head_valid[:, None] & rope_valid[None, :], other=0.0,
        )  # fmt: skip
        top = tl.full([ROWS], -1.0e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, RANK_PAD], tl.float32)
        table = block_table_ptr + tl.cast(request, tl.int64) * stride_bt
        for begin in tl.range(start, end, TILE, num_stages=STAGES):
            begin = tl.multiple_of(begin, TILE)
            tokens = begin + within
            valid = tokens < end
            if PAGE % TILE == 0:
                # A tile lies in one page: offsets in it are the same in all iterations.
                block = tl.load(table + begin // PAGE).to(tl.int64)
                page = kv_ptr + block * stride_kv_b + begin % PAGE * STRIDE_N
                at = page + (within * STRIDE_N)[:, None]
            else:
                blocks = tl.load(table + tokens // PAGE, mask=valid, other=0).to(tl.int64)
                at = kv_ptr + (blocks * stride_kv_b + tokens % PAGE * STRIDE_N)[:, None]
            there = valid[:, None]
            if RANK < RANK_PAD:
                there = there & dim_valid[None, :]
            latent = tl.load(at + dims[None, :], mask=there, other=0.0)
            there = valid[:, None]
            if ROPE < ROPE_PAD:
                there = there & rope_valid[None, :]
            rotated = tl.load(at + (RANK + rope_dims)[None, :], mask=there, other=0.0)
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
        if (low <= first_tile) & (end_tile <= high):
            at_out = out_ptr + row * stride_o_t + heads[:, None] * stride_o_h + dims[None, :]
            tl.store(at_out, acc, mask=out_valid)
        else:
            slot = (2 * program + (first_tile > low)).to(tl.int64)
            at_part = part_ptr + slot * stride_part_i + heads[:, None] * stride_part_h
            tl.store(at_part + dims[None, :], acc, mask=out_valid)
            tl.store(lse_ptr + slot * stride_lse_i + heads, top + tl.log2(total), mask=head_valid)


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsorbedConfig:
    """``rows`` heads of a program, ``tile`` tokens of an iteration (divides 64), and the launch.

    ``resident`` programs of a multiprocessor are planned. With ``by_groups`` ``triton_mla_hopper``
    takes what it can, with ``bulk`` by copies of whole tiles.
    """

    rows: int
    tile: int
    warps: int
    stages: int
    resident: int = 1
    by_groups: bool = False
    bulk: bool = True


@functools.cache
def default_absorbed_config(
    num_heads: int, dtype: torch.dtype, device: torch.device
) -> AbsorbedConfig:
    """What is fastest on an H100 at R = 512, where shared memory holds two tiles of 64 latents.

    GPUs with less shared memory get tiles that fit 100 KiB.
    """
    if dtype == torch.float32:
        return AbsorbedConfig(rows=16, tile=16, warps=4, stages=1, resident=2)
    has_groups = False
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        if facts.shared_memory_per_multiprocessor < _SHARED_BYTES:
            return AbsorbedConfig(rows=16, tile=32, warps=4, stages=2, resident=2)
        has_groups = facts.major == 9
    if num_heads <= 16 and not has_groups:
        return AbsorbedConfig(rows=16, tile=64, warps=4, stages=2, resident=2)
    return AbsorbedConfig(rows=64, tile=64, warps=8, stages=3, by_groups=has_groups)


def make_absorbed_buffers(
    requests: int,
    num_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    config: AbsorbedConfig | None = None,
) -> SharePlan:
    """Buffers for plans of ``absorbed_attention`` of up to ``requests`` requests."""
    config = config or default_absorbed_config(num_heads, dtype, device)
    slots = num_multiprocessors(device) * config.resident
    return make_share_buffers(requests, -(-num_heads // config.rows), slots, device)


def absorbed_attention(
    query: torch.Tensor,
    rotated: torch.Tensor,
    kv_cache: torch.Tensor,
    out: torch.Tensor,
    plan: SharePlan,
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
        plan: in buffers of ``make_absorbed_buffers`` for Q heads.
        block_table: int32 ``(R, max_blocks)``.
    """
    num_heads, rank = query.shape[1:]
    rope = rotated.shape[2]
    config = config or default_absorbed_config(num_heads, query.dtype, query.device)
    tiles = -(-num_heads // config.rows)
    assert query.stride(2) == rotated.stride(2) == out.stride(2) == kv_cache.stride(2) == 1
    assert plan.head_tiles == tiles, "a plan for another number of heads"
    slots = 2 * plan.num_programs
    part = query.new_empty((slots, num_heads, rank), dtype=torch.float32)
    lse = query.new_empty((slots, num_heads), dtype=torch.float32)
    arguments = (
        query, rotated, kv_cache, out, part, lse, block_table, plan.programs, plan.requests,
        scale * LOG2_E, *query.stride()[:2], *rotated.stride()[:2], *out.stride()[:2],
        kv_cache.stride(0), block_table.stride(0), *part.stride()[:2], lse.stride(0),
    )  # fmt: skip
    sizes = {"STRIDE_N": kv_cache.stride(1), "HEADS": num_heads, "RANK": rank, "ROPE": rope}
    sizes |= {"PAGE": kv_cache.shape[1], "P_FIELDS": PROGRAM_FIELDS, "R_FIELDS": REQUEST_FIELDS}
    grid = tiles, plan.num_programs
    if config.by_groups and (rank, rope) == (512, 64) and kv_cache.shape[1] % SHARE_TILE == 0:
        # Gluon is imported where it can run: the interpreter knows nothing of it.
        from vllm.v1.attention.ops import triton_mla_hopper

        triton_mla_hopper.launch(grid, arguments, sizes, kv_cache, config.bulk)
    else:
        _absorbed_kernel[grid](
            *arguments, **sizes, ROWS=config.rows,
            RANK_PAD=max(16, triton.next_power_of_2(rank)),
            ROPE_PAD=max(16, triton.next_power_of_2(rope)), TILE=config.tile, UNIT=SHARE_TILE,
            STAGES=config.stages, PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
            num_warps=config.warps, **options(query.device),
        )  # fmt: skip
    merge_shares(part, lse, out, plan)
