"""Attention to latents for many heads on Hopper, in Gluon: 64 heads of a share by two warp groups.

With 64 heads and more the products bound a decode, not the reading. Each warp group computes the
scores of half a tile's tokens and, after the weights went through shared memory, half of the
latents' columns; Triton's own choice has both compute all scores. Two tiles lie in shared memory:
the next one arrives while one is worked on. Only for 512 + 64 numbers in 16 bits and pages of
whole tiles; ``triton_mla`` takes the others, and says what the arguments are.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm.utils.dependent_launch import options

__all__ = ["launch"]

_TILE = 64


@gluon.jit
def _fetch(
    latents, rotated, barrier, latents_desc, rotated_desc, kv_ptr, table, begin, end, stride_kv_b,
    rows_of_block, STRIDE_N: gl.constexpr, RANK: gl.constexpr, ROPE: gl.constexpr,
    PAGE: gl.constexpr, TILE: gl.constexpr, BULK: gl.constexpr,
):  # fmt: skip
    """Begin to copy a tile, if there is one; tokens past the end are the last one again.

    With BULK whole tiles are copied without threads, which would wait where memory is busy; then
    the barrier says when they are there. An incomplete one is there when its threads' copies are.
    """
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    if begin < end:
        block = gl.load(table + begin // PAGE)
        by_threads = True
        if BULK:
            by_threads = begin + TILE > end
            if begin + TILE <= end:
                row_of_all = block * rows_of_block + begin % PAGE
                mbarrier.expect(barrier, TILE * (RANK + ROPE) * 2)
                tma.async_copy_global_to_shared(latents_desc, [row_of_all, 0], barrier, latents)
                tma.async_copy_global_to_shared(rotated_desc, [row_of_all, RANK], barrier, rotated)
        if by_threads:
            page = kv_ptr + block.to(gl.int64) * stride_kv_b + begin % PAGE * STRIDE_N
            most = end - begin - 1
            row = gl.minimum(gl.arange(0, TILE, gl.SliceLayout(1, wide)), most)
            column = gl.arange(0, RANK, gl.SliceLayout(0, wide))
            at = page + (row * STRIDE_N)[:, None] + column[None, :]
            async_copy.async_copy_global_to_shared(latents, at)
            row_narrow = gl.minimum(gl.arange(0, TILE, gl.SliceLayout(1, narrow)), most)
            column_narrow = gl.arange(0, ROPE, gl.SliceLayout(0, narrow))
            at_narrow = page + RANK + (row_narrow * STRIDE_N)[:, None] + column_narrow[None, :]
            async_copy.async_copy_global_to_shared(rotated, at_narrow)
            if BULK:
                mbarrier.arrive(barrier, count=1)
    async_copy.commit_group()


@gluon.jit
def wide_absorbed_kernel(
    q_ptr, rotated_ptr, kv_ptr, out_ptr, part_ptr, lse_ptr, block_table_ptr, programs_ptr,
    requests_ptr, scale,
    stride_q_t, stride_q_h, stride_r_t, stride_r_h, stride_o_t, stride_o_h,
    stride_kv_b, stride_bt, stride_part_i, stride_part_h, stride_lse_i,
    latents_desc, rotated_desc, rows_of_block,
    BULK: gl.constexpr, STRIDE_N: gl.constexpr, HEADS: gl.constexpr, RANK: gl.constexpr,
    ROPE: gl.constexpr,
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
    barriers = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(barriers.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    turn = 0
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
            slot = (turn + ahead) % 2
            _fetch(
                latents.index(slot), rotated.index(slot), barriers.index(slot), latents_desc,
                rotated_desc, kv_ptr, table, start + ahead * TILE, end, stride_kv_b, rows_of_block,
                STRIDE_N, RANK, ROPE, PAGE, TILE, BULK,
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
        fence_async_shared()
        for begin in range(start, end, TILE):
            which = turn % 2
            if BULK:
                mbarrier.wait(barriers.index(which), turn // 2 % 2)
                if begin + TILE > end:
                    async_copy.wait_group(0)
                    fence_async_shared()
            else:
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
            # Both groups have read the tile.
            gl.thread_barrier()
            _fetch(
                tile, rotated_tile, barriers.index(which), latents_desc, rotated_desc, kv_ptr,
                table, begin + 2 * TILE, end, stride_kv_b, rows_of_block, STRIDE_N, RANK, ROPE,
                PAGE, TILE, BULK,
            )  # fmt: skip
            turn += 1
        all_total = gl.sum(total, 1)
        acc = acc * gl.convert_layout(1.0 / all_total, gl.SliceLayout(1, sums))[:, None]
        head = part * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, sums))
        column = gl.arange(0, RANK, gl.SliceLayout(0, sums))
        valid = (head < HEADS)[:, None]
        if (low <= first_tile) & (end_tile <= high):
            at_out = out_ptr + row * stride_o_t + (head * stride_o_h)[:, None]
            gl.store(at_out + column[None, :], acc.to(dtype), mask=valid)
        else:
            place = (2 * program + (first_tile > low)).to(gl.int64)
            at_part = part_ptr + place * stride_part_i + (head * stride_part_h)[:, None]
            gl.store(at_part + column[None, :], acc, mask=valid)
            one = part * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
            lse = top + gl.log2(all_total)
            gl.store(lse_ptr + place * stride_lse_i + one, lse, mask=one < HEADS)
        async_copy.wait_group(0)


def launch(
    grid: tuple[int, int],
    arguments: tuple[Any, ...],
    sizes: dict[str, Any],
    kv_cache: torch.Tensor,
    bulk: bool,
) -> None:
    """Launch the kernel; with ``bulk`` whole tiles are copied by the copy engine where it can.

    Args:
        arguments, sizes: of the kernel, up to what is of tiles.
        kv_cache: ``(B, N, 576)``; the engine takes it as rows of one distance.
    """
    block, row = kv_cache.stride()[:2]
    bulk = bulk and block % row == 0 and row % 8 == 0 and kv_cache.data_ptr() % 16 == 0
    rows_of_block = block // row
    tiles: list[Any] = [None, None]
    if bulk:
        layout = gl.NVMMASharedLayout(128, 16, 2)
        shape = [(kv_cache.shape[0] - 1) * rows_of_block + kv_cache.shape[1], kv_cache.shape[2]]
        tiles = [
            TensorDescriptor(kv_cache, shape, [row, 1], [_TILE, width], layout)
            for width in (sizes["RANK"], sizes["ROPE"])
        ]
    wide_absorbed_kernel[grid](
        *arguments, *tiles, rows_of_block, BULK=bulk, **sizes, num_warps=8,
        **options(kv_cache.device),
    )  # fmt: skip
