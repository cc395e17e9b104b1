"""Storing keys and values into the packed, paged cache in Triton; norms and RoPE on the way.

The cache is a view ``(B, H, N, 2 * D)`` with any strides over B, H and N and a dense last
dimension, or the bytes of a quantised format (``kv_formats``). Slot ``s`` is token ``s % N`` of
block ``s // N``; slot -1 stores nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.utils.dependent_launch import await_previous, options, release
from vllm.v1.attention.ops.kv_formats import KVFormat, SideScales
from vllm.v1.attention.ops.triton_formats import FormatArguments, layer_scales, quantised

__all__ = ["rotate_and_store"]

# Heads of one program.
_HEADS = 8


@triton.jit
def _normed_and_rotated(
    row, weight_ptr, eps, dims, partner, valid, rotated, cos, sin,
    D: tl.constexpr, ROTARY: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Rows ``(heads, D)`` in fp32 from addresses of their starts, norm and rotation applied.

    A dimension's partner is read again rather than shuffled between threads: it is in the same
    cache lines.
    """
    x = tl.load(row + dims[None, :], mask=valid, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        weight = tl.load(weight_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)
        x = x * scale * weight[None, :]
    if ROTARY > 0:
        other = tl.load(row + partner[None, :], mask=valid & rotated[None, :], other=0.0)
        other = other.to(tl.float32)
        if HAS_NORM:
            weight = tl.load(weight_ptr + partner, mask=rotated, other=0.0).to(tl.float32)
            other = other * scale * weight[None, :]
        x = tl.where(rotated[None, :], x * cos[None, :] + other * sin[None, :], x)
    return x


@triton.jit
def _store_side(
    kv_ptr, at, at_scale, x, shared, heads_valid,
    LARGEST: tl.constexpr, FORMAT: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Quantise a side of some heads, fp32 ``(heads, D)``, and store it and its scales."""
    NUM_BYTES: tl.constexpr = D // 2 if FORMAT >= 5 else D
    raw, own = quantised(x, shared, LARGEST, FORMAT)
    byte = tl.arange(0, D_PAD // 2 if FORMAT >= 5 else D_PAD)
    there = heads_valid[:, None] & (byte < NUM_BYTES)[None, :]
    tl.store(kv_ptr + at[:, None] + byte[None, :], raw, mask=there)
    if FORMAT == 6:
        group = tl.arange(0, D_PAD // 16)
        there = heads_valid[:, None] & (group < D // 16)[None, :]
        tl.store(at_scale[:, None] + group[None, :], own, mask=there)
    elif FORMAT >= 3:
        tl.store(at_scale, own, mask=heads_valid)


@triton.jit
def _rotate_and_store_kernel(
    q_ptr, k_ptr, v_ptr, kv_ptr, kv_scale_ptr, k_scale, v_scale, positions_ptr, cos_sin_ptr,
    slots_ptr, q_weight_ptr, k_weight_ptr, eps,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h,
    stride_kv_b, stride_kv_h, stride_kv_n, stride_s_b, stride_s_h, stride_s_n, stride_cos_sin,
    page,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, ROTARY: tl.constexpr, NEOX: tl.constexpr, HAS_NORM: tl.constexpr,
    LARGEST: tl.constexpr, FORMAT: tl.constexpr, V_AT: tl.constexpr, V_SCALE_AT: tl.constexpr,
    UNIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some heads of one token: query heads are rewritten in place, KV heads stored.

    Dimension ``d < ROTARY`` pairs with ``d +- ROTARY / 2`` (NEOX) or ``d ^ 1``.
    """
    release(PDL)
    await_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dims = tl.arange(0, D_PAD)
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
    cos = tl.zeros([D_PAD], tl.float32)
    sin = tl.zeros([D_PAD], tl.float32)
    if ROTARY > 0:
        at = cos_sin_ptr + tl.load(positions_ptr + token) * stride_cos_sin + frequency
        cos = tl.load(at, mask=rotated, other=1.0).to(tl.float32)
        sin = tl.load(at + HALF, mask=rotated, other=0.0).to(tl.float32)
        sin = tl.where(first, -sin, sin)
    Q_PARTS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    heads = part * HEADS + tl.arange(0, HEADS)
    if Q_PARTS > 0:  # noqa: SIM102 (a constexpr prunes the branch: there may be no query)
        if part < Q_PARTS:
            valid = (heads < Q_HEADS)[:, None] & (dims < D)[None, :]
            row = q_ptr + token * stride_q_t + heads[:, None] * stride_q_h
            q = _normed_and_rotated(
                row, q_weight_ptr, eps, dims, partner, valid, rotated, cos, sin,
                D, ROTARY, HAS_NORM,
            )  # fmt: skip
            # Every thread has read its partner before any writes it.
            tl.debug_barrier()
            tl.store(row + dims[None, :], q, mask=valid if HAS_NORM else valid & rotated[None, :])
    if part >= Q_PARTS:
        heads -= Q_PARTS * HEADS
        slot = tl.load(slots_ptr + token)
        if slot >= 0:
            valid = (heads < KV_HEADS)[:, None] & (dims < D)[None, :]
            k = _normed_and_rotated(
                k_ptr + token * stride_k_t + heads[:, None] * stride_k_h, k_weight_ptr, eps,
                dims, partner, valid, rotated, cos, sin, D, ROTARY, HAS_NORM,
            )  # fmt: skip
            v = tl.load(
                v_ptr + token * stride_v_t + heads[:, None] * stride_v_h + dims[None, :],
                mask=valid, other=0.0,
            )  # fmt: skip
            begin = (
                (slot // page) * stride_kv_b * UNIT + (slot % page) * stride_kv_n * UNIT
                + heads.to(tl.int64) * stride_kv_h * UNIT
            )  # fmt: skip
            if FORMAT == 0:
                at_slot = kv_ptr + begin[:, None] + dims[None, :]
                tl.store(at_slot, k, mask=valid)
                tl.store(at_slot + V_AT, v, mask=valid)
            else:
                at_scale = begin
                at_v_scale = begin
                if FORMAT >= 3:
                    at_scale = (
                        kv_scale_ptr + (slot // page) * stride_s_b + (slot % page) * stride_s_n
                        + heads.to(tl.int64) * stride_s_h
                    )  # fmt: skip
                    at_v_scale = at_scale + V_SCALE_AT
                _store_side(
                    kv_ptr, begin, at_scale, k, k_scale, heads < KV_HEADS, LARGEST, FORMAT, D,
                    D_PAD,
                )  # fmt: skip
                _store_side(
                    kv_ptr, begin + V_AT, at_v_scale, v.to(tl.float32), v_scale,
                    heads < KV_HEADS, LARGEST, FORMAT, D, D_PAD,
                )  # fmt: skip


def rotate_and_store(
    query: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor | None = None,
    cos_sin_cache: torch.Tensor | None = None,
    is_neox: bool = True,
    norm_weights: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
    fmt: KVFormat | None = None,
    scales: SideScales | None = None,
) -> None:
    """Store ``key`` and ``value`` at their slots; with ``positions``, rotate q and k first.

    Args:
        query: ``(T, Q, D)``, rewritten in place; None where nothing is rotated or normed.
        key, value: ``(T, K, D)``, any strides over T and K; ``key`` itself stays as it is.
        kv_cache: ``(B, K, N, 2 * D)`` view; with ``fmt`` single bytes, ``(B, slots, N, content)``.
        slot_mapping: int64 ``(T,)``. positions: int64 ``(T,)``.
        cos_sin_cache: ``(max positions, rotary)``, cosines then sines.
        norm_weights: ``(D,)`` each, of an RMSNorm over each head of query and key that comes
            before the rotation.
        scales: of the layer, for a format with one per tensor.
    """
    tokens = slot_mapping.shape[0]
    kv_heads, head_size = key.shape[1:]
    rotary = 0 if cos_sin_cache is None else cos_sin_cache.shape[1]
    q_heads = 0 if query is None else query.shape[1]
    assert key.stride(2) == 1 and value.stride(2) == 1
    if not tokens:
        return
    heads = min(_HEADS, triton.next_power_of_2(kv_heads))
    q_weight, k_weight = norm_weights or (None, None)
    cache, shared = FormatArguments(kv_cache, fmt, head_size), layer_scales(fmt, scales)
    _rotate_and_store_kernel[(tokens, triton.cdiv(q_heads, heads) + triton.cdiv(kv_heads, heads))](
        query, key, value, cache.data, cache.scales, shared.k, shared.v, positions, cos_sin_cache,
        slot_mapping, q_weight, k_weight, eps, *((0, 0) if query is None else query.stride()[:2]),
        *key.stride()[:2], *value.stride()[:2], *cache.strides, *cache.scale_strides,
        0 if cos_sin_cache is None else cos_sin_cache.stride(0), kv_cache.shape[2],
        Q_HEADS=q_heads, KV_HEADS=kv_heads, HEADS=heads, D=head_size,
        D_PAD=triton.next_power_of_2(head_size), ROTARY=rotary, NEOX=is_neox,
        HAS_NORM=norm_weights is not None, LARGEST=0.0 if fmt is None else fmt.largest,
        num_warps=4 if heads > 2 else 1, **cache.constants,
        **options(key.device),
    )  # fmt: skip
