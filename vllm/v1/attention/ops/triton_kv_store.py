"""Storing keys and values into the packed, paged cache in Triton, with RoPE on the way if asked.

The cache is a view ``(B, H, N, 2 * D)`` with any strides over B, H and N and a dense last
dimension. Slot ``s`` is token ``s % N`` of block ``s // N``; slot -1 stores nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rotate_and_store_kernel(
    q_ptr, k_ptr, v_ptr, kv_ptr, positions_ptr, cos_sin_ptr, slots_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h,
    stride_kv_b, stride_kv_h, stride_kv_n, stride_cos_sin, page,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    ROTARY: tl.constexpr, NEOX: tl.constexpr,
):  # fmt: skip
    """One (token, head): a query head is rotated in place, a KV head rotated and stored.

    Dimension ``d < ROTARY`` pairs with ``d +- ROTARY / 2`` (NEOX) or ``d ^ 1``; its partner is
    read again rather than shuffled between threads: it is in the same cache line.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, D_PAD)
    valid = dims < D
    HALF: tl.constexpr = ROTARY // 2
    if NEOX:
        first = dims < HALF
        partner = tl.where(first, dims + HALF, dims - HALF)
        frequency = tl.where(first, dims, dims - HALF)
    else:
        first = dims % 2 == 0
        partner = dims ^ 1
        frequency = dims // 2
    rotated = dims < ROTARY
    if ROTARY > 0:
        at = cos_sin_ptr + tl.load(positions_ptr + token) * stride_cos_sin + frequency
        cos = tl.load(at, mask=rotated, other=1.0).to(tl.float32)
        sin = tl.load(at + HALF, mask=rotated, other=0.0).to(tl.float32)
        sin = tl.where(first, -sin, sin)
    if Q_HEADS > 0:  # noqa: SIM102 (a constexpr prunes the branch: there may be no query)
        if head < Q_HEADS:
            row = q_ptr + token * stride_q_t + head * stride_q_h
            x = tl.load(row + dims, mask=valid, other=0.0)
            other = tl.load(row + partner, mask=rotated, other=0.0)
            y = x * cos + other * sin
            # Every thread has read its partner before any writes it.
            tl.debug_barrier()
            tl.store(row + dims, y, mask=rotated)
    if head >= Q_HEADS:
        kv_head = head - Q_HEADS
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            row = k_ptr + token * stride_k_t + kv_head * stride_k_h
            k = tl.load(row + dims, mask=valid, other=0.0)
            if ROTARY > 0:
                other = tl.load(row + partner, mask=rotated, other=0.0)
                k = tl.where(rotated, k * cos + other * sin, k.to(tl.float32)).to(k.dtype)
            v = tl.load(v_ptr + token * stride_v_t + kv_head * stride_v_h + dims, mask=valid)
            at_slot = (
                kv_ptr + (slot // page) * stride_kv_b + kv_head * stride_kv_h
                + (slot % page) * stride_kv_n
            )  # fmt: skip
            tl.store(at_slot + dims, k, mask=valid)
            tl.store(at_slot + D + dims, v, mask=valid)


def rotate_and_store(
    query: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor | None = None,
    cos_sin_cache: torch.Tensor | None = None,
    is_neox: bool = True,
) -> None:
    """Store ``key`` and ``value`` at their slots; with ``positions``, rotate q and k first.

    Args:
        query: ``(T, Q, D)``, rotated in place; None where nothing is rotated.
        key, value: ``(T, K, D)``, any strides over T and K; ``key`` itself stays as it is.
        kv_cache: ``(B, K, N, 2 * D)`` view.
        slot_mapping: int64 ``(T,)``. positions: int64 ``(T,)``.
        cos_sin_cache: ``(max positions, rotary)``, cosines then sines.
    """
    tokens = slot_mapping.shape[0]
    kv_heads, head_size = key.shape[1:]
    rotary = 0 if cos_sin_cache is None else cos_sin_cache.shape[1]
    q_heads = 0 if query is None else query.shape[1]
    assert kv_cache.stride(3) == 1 and key.stride(2) == 1 and value.stride(2) == 1
    if not tokens:
        return
    _rotate_and_store_kernel[(tokens, q_heads + kv_heads)](
        query, key, value, kv_cache, positions, cos_sin_cache, slot_mapping,
        *((0, 0) if query is None else query.stride()[:2]), *key.stride()[:2],
        *value.stride()[:2], *kv_cache.stride()[:3],
        0 if cos_sin_cache is None else cos_sin_cache.stride(0), kv_cache.shape[2],
        Q_HEADS=q_heads, KV_HEADS=kv_heads, D=head_size,
        D_PAD=triton.next_power_of_2(head_size), ROTARY=rotary, NEOX=is_neox, num_warps=1,
    )  # fmt: skip
