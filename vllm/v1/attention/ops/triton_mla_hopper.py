"""Attention to latents for many heads on Hopper, in Gluon: 64 heads of a share by two warp groups.

With 64 heads and more the products bound a decode, not the reading. Each warp group computes the
scores of half a tile's tokens and, after the weights went through shared memory, half of the
latents' columns; Triton's own choice has both compute all scores. Two tiles lie in shared memory:
the next one arrives while one is worked on. Only for 512 + 64 numbers in 16 bits and pages of
whole tiles; ``triton_mla`` takes the others, and says what the arguments are.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["WARPS", "wide_absorbed_kernel"]

WARPS = 8


@gluon.jit
def _fetch(
    latents, rotated, kv_ptr, table, begin, end, stride_kv_b, STRIDE_N: gl.constexpr,
    RANK: gl.constexpr, ROPE: gl.constexpr, PAGE: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Begin to copy a tile, if there is one; tokens past the end are the last one again."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    if begin < end:
        block = gl.load(table + begin // PAGE).to(gl.int64)
        page = kv_ptr + block * stride_kv_b + begin % PAGE * STRIDE_N
        most = end - begin - 1
        row = gl.minimum(gl.arange(0, TILE, gl.SliceLayout(1, wide)), most)
        column = gl.arange(0, RANK, gl.SliceLayout(0, wide))
        at = page + (row * STRIDE_N)[:, None] + column[None, :]
        async_copy.async_copy_global_to_shared(latents, at)
        row = gl.minimum(gl.arange(0, TILE, gl.SliceLayout(1, narrow)), most)
        column = gl.arange(0, ROPE, gl.SliceLayout(0, narrow))
        at = page + RANK + (row * STRIDE_N)[:, None] + column[None, :]
        async_copy.async_copy_global_to_shared(rotated, at)
    async_copy.commit_group()


@gluon.jit
def wide_absorbed_kernel(
    q_ptr, rotated_ptr, kv_ptr, out_ptr, part_ptr, lse_ptr, block_table_ptr, programs_ptr,
    requests_ptr, scale,
    stride_q_t, stride_q_h, stride_r_t, stride_r_h, stride_o_t, stride_o_h,
    stride_kv_b, stride_bt, stride_part_i, stride_part_h, stride_lse_i,
    STRIDE_N: gl.constexpr, HEADS: gl.constexpr, RANK: gl.constexpr, ROPE: gl.constexpr,
    PAGE: gl.constexpr, P_FIELDS: gl.constexpr, R_FIELDS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One share for 64 heads; scores are in base 2 (``scale`` carries log2 e)."""
    ROWS: gl.constexpr = 64
    TILE: gl.constexpr = 64
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, TILE // 2, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, RANK // 2, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    operand: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = q_ptr.dtype.element_ty

    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    part = gl.program_id(0)
    program = gl.program_id(1)
    share = programs_ptr + program * P_FIELDS
    low = gl.load(share)
    high = gl.load(share + 1)
    first = gl.load(share + 2)
    last = gl.load(share + 3)
    if low >= high:
        return
    q_tile = gl.allocate_shared_memory(dtype, [ROWS, RANK], operand)
    q_rotated_tile = gl.allocate_shared_memory(dtype, [ROWS, ROPE], operand)
    latents = gl.allocate_shared_memory(dtype, [2, TILE, RANK], operand)
    rotated = gl.allocate_shared_memory(dtype, [2, TILE, ROPE], operand)
    weights = gl.allocate_shared_memory(dtype, [ROWS, TILE], operand)
    for request in range(first, last + 1):
        fields = requests_ptr + request * R_FIELDS
        first_tile = gl.load(fields)
        end_tile = gl.load(fields + 1)
        length = gl.load(fields + 2)
        row = gl.load(fields + 3).to(gl.int64)
        start = (gl.maximum(low, first_tile) - first_tile) * TILE
        end = gl.minimum((gl.minimum(high, end_tile) - first_tile) * TILE, length)
        table = block_table_ptr + gl.cast(request, gl.int64) * stride_bt
        for ahead in gl.static_range(2):
            _fetch(
                latents.index(ahead), rotated.index(ahead), kv_ptr, table, start + ahead * TILE,
                end, stride_kv_b, STRIDE_N, RANK, ROPE, PAGE, TILE,
            )  # fmt: skip
        head = part * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, wide))
        column = gl.arange(0, RANK, gl.SliceLayout(0, wide))
        at = q_ptr + row * stride_q_t + (head * stride_q_h)[:, None] + column[None, :]
        q_tile.store(gl.load(at, mask=(head < HEADS)[:, None], other=0.0))
        head = part * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, narrow))
        column = gl.arange(0, ROPE, gl.SliceLayout(0, narrow))
        at = rotated_ptr + row * stride_r_t + (head * stride_r_h)[:, None] + column[None, :]
        q_rotated_tile.store(gl.load(at, mask=(head < HEADS)[:, None], other=0.0))

        top = gl.full([ROWS], -1.0e30, gl.float32, gl.SliceLayout(1, scores))
        total = gl.zeros([ROWS, TILE], gl.float32, scores)
        acc = gl.zeros([ROWS, RANK], gl.float32, sums)
        which = 0
        for begin in range(start, end, TILE):
            async_copy.wait_group(1)
            fence_async_shared()
            tile = latents.index(which)
            rotated_tile = rotated.index(which)
            s = gl.zeros([ROWS, TILE], gl.float32, scores)
            s = warpgroup_mma(q_tile, tile.permute((1, 0)), s, use_acc=False, is_async=True)
            s = warpgroup_mma(q_rotated_tile, rotated_tile.permute((1, 0)), s, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            token = begin + gl.arange(0, TILE, gl.SliceLayout(0, scores))
            s = gl.where((token < end)[None, :], s * scale, float("-inf"))
            new_top = gl.maximum(top, gl.max(s, 1))
            p = gl.exp2(s - new_top[:, None])
            shrink = gl.exp2(top - new_top)
            # Of each thread's own columns: summed over them when all tiles are done.
            total = total * shrink[:, None] + p
            weights.store(p.to(dtype))
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, sums))[:, None]
            fence_async_shared()
            acc = warpgroup_mma(weights, tile, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            top = new_top
            _fetch(
                tile, rotated_tile, kv_ptr, table, begin + 2 * TILE, end, stride_kv_b, STRIDE_N,
                RANK, ROPE, PAGE, TILE,
            )  # fmt: skip
            which = 1 - which
        all_total = gl.sum(total, 1)
        acc = acc * gl.convert_layout(1.0 / all_total, gl.SliceLayout(1, sums))[:, None]
        head = part * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, sums))
        column = gl.arange(0, RANK, gl.SliceLayout(0, sums))
        valid = (head < HEADS)[:, None]
        if (low <= first_tile) & (end_tile <= high):
            at_out = out_ptr + row * stride_o_t + (head * stride_o_h)[:, None]
            gl.store(at_out + column[None, :], acc.to(dtype), mask=valid)
        else:
            slot = (2 * program + (first_tile > low)).to(gl.int64)
            at_part = part_ptr + slot * stride_part_i + (head * stride_part_h)[:, None]
            gl.store(at_part + column[None, :], acc, mask=valid)
            one = part * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
            lse = top + gl.log2(all_total)
            gl.store(lse_ptr + slot * stride_lse_i + one, lse, mask=one < HEADS)
        async_copy.wait_group(0)
