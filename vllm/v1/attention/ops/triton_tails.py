"""Zeros behind the last token of blocks that a step has begun.

For kernels of libraries that read whole pages: what lies behind a request's last token gets the
weight 0 there, and 0 * NaN is NaN. A block that is begun belongs to one request alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["clear_tails"]


@triton.jit
def _clear_kernel(
    kv_ptr, block_table_ptr, query_start_ptr, seq_lens_ptr, stride_b, stride_h, stride_n, stride_bt,
    page, content, BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    length = tl.load(seq_lens_ptr + request)
    new = tl.load(query_start_ptr + request + 1) - tl.load(query_start_ptr + request)
    used = length % page
    # A decode behind the block's first token: its tail was cleared when it was begun.
    if (length <= 0) | (used == 0) | ((new <= 1) & (used > new)):
        return
    row = block_table_ptr + request.to(tl.int64) * stride_bt
    block = tl.load(row + length // page).to(tl.int64)
    at = tl.arange(0, BLOCK)
    target = kv_ptr + block * stride_b + head * stride_h + at
    for slot in tl.range(used, page):
        tl.store(target + slot * stride_n, 0.0, mask=at < content)


def clear_tails(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """Zero the unused slots of requests' last blocks.

    A decode in a block that an earlier step began leaves it as it is: that step cleared it. A part
    of a prompt clears its last block in any case, which a step without this call may have begun.

    Args:
        kv_cache: ``(B, H, N, C)``, or ``(B, N, C)`` of latents; dense last dimension.
        block_table: int32 ``(R, blocks)``. query_start_loc: int32 ``(R + 1,)``.
        seq_lens: int32 ``(R,)``, this step's tokens included.
    """
    cache = kv_cache if kv_cache.dim() == 4 else kv_cache.unsqueeze(1)
    assert cache.stride(3) == 1
    _clear_kernel[(seq_lens.shape[0], cache.shape[1])](
        cache, block_table, query_start_loc, seq_lens, *cache.stride()[:3], block_table.stride(0),
        cache.shape[2], cache.shape[3], BLOCK=triton.next_power_of_2(cache.shape[3]), num_warps=1,
    )  # fmt: skip
