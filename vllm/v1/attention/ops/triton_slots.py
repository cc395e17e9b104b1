"""Storing TurboQuant slots in Triton.

What the bytes say is in ``turboquant``; reading them is ``triton_slot_codes``'s. Slots lie where
the cache's strides say; nothing is flattened.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.v1.attention.ops.turboquant import TurboQuantFormat, hadamard, levels_on

__all__ = ["store_slots"]

# Heads of one program.
_HEADS = 8


@triton.jit
def _pack(at, codes, valid, BITS: tl.constexpr):
    """Store codes (rows, D) as bytes from the addresses ``at`` on."""
    ROWS: tl.constexpr = codes.shape[0]
    D: tl.constexpr = codes.shape[1]
    group = tl.arange(0, 8)
    shifted = tl.reshape(codes, (ROWS, D // 8, 8)) << (BITS * group)[None, None, :]
    words = tl.sum(shifted.to(tl.int64), 2)
    first = tl.arange(0, D // 8) * BITS
    for byte in tl.static_range(BITS):
        tl.store(
            at[:, None] + (first + byte)[None, :], ((words >> (8 * byte)) & 255).to(tl.uint8),
            mask=valid[:, None],
        )  # fmt: skip


@triton.jit
def _store_kernel(
    k_ptr, v_ptr, kv_ptr, levels_ptr, thresholds_ptr, slots_ptr,
    stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_kv_b, stride_kv_h, stride_kv_n, page,
    KV_HEADS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, ROOT: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_BYTES: tl.constexpr, V_AT: tl.constexpr,
    V_SCALES_AT: tl.constexpr,
):  # fmt: skip
    """Some heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    valid = heads < KV_HEADS
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    dims = tl.arange(0, D)
    k = tl.load(
        k_ptr + token * stride_k_t + heads[:, None] * stride_k_h + dims[None, :],
        mask=valid[:, None], other=0.0,
    ).to(tl.float32)  # fmt: skip
    v = tl.load(
        v_ptr + token * stride_v_t + heads[:, None] * stride_v_h + dims[None, :],
        mask=valid[:, None], other=0.0,
    ).to(tl.float32)  # fmt: skip
    at = kv_ptr + slot // page * stride_kv_b + slot % page * stride_kv_n
    at = at + heads.to(tl.int64) * stride_kv_h
    if KEY_BITS == 8:
        raw = tl.minimum(tl.maximum(k, -448.0), 448.0).to(tl.float8e4nv)
        tl.store(at[:, None] + dims[None, :], raw.to(tl.uint8, bitcast=True), mask=valid[:, None])
    else:
        length = tl.sqrt(tl.sum(k * k, 1))
        y = k * (ROOT / tl.maximum(length, 1e-30))[:, None]
        codes = tl.zeros([HEADS, D], tl.int32)
        for i in tl.static_range((1 << KEY_BITS) - 1):
            codes += (y > tl.load(thresholds_ptr + i)).to(tl.int32)
        found = tl.load(levels_ptr + codes)
        own = (length / tl.sqrt(tl.sum(found * found, 1))).to(tl.float16)
        _pack(at, codes, valid, KEY_BITS)
        tl.store((at + KEY_BYTES).to(tl.pointer_type(tl.float16)), own, mask=valid)
    LAST: tl.constexpr = (1 << VALUE_BITS) - 1
    least = tl.min(v, 1)
    step = ((tl.max(v, 1) - least) / LAST).to(tl.float16)
    zero = least.to(tl.float16)
    wide = step.to(tl.float32)
    x = (v - zero.to(tl.float32)[:, None]) / tl.where(wide > 0, wide, 1.0)[:, None]
    x = tl.where((wide > 0)[:, None], x, 0.0)
    x = tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), LAST * 1.0)
    _pack(at + V_AT, x.to(tl.int32), valid, VALUE_BITS)
    at_scales = (at + V_SCALES_AT).to(tl.pointer_type(tl.float16))
    tl.store(at_scales, step, mask=valid)
    tl.store(at_scales + 1, zero, mask=valid)


def store_slots(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    fmt: TurboQuantFormat,
) -> None:
    """Quantise ``key`` and ``value`` and store them at their slots.

    Args:
        key, value: ``(T, K, D)``, any strides over T and K, dense D; D a power of two.
        kv_cache: bytes ``(B, K, N, slot)`` with any strides over B, K and N.
        slot_mapping: int64 ``(S,)``, S <= T; -1 is not stored.
    """
    tokens = slot_mapping.shape[0]
    kv_heads, size = key.shape[1:]
    if not tokens:
        return
    raw = kv_cache.view(torch.uint8)
    assert raw.stride(3) == 1 and value.stride(2) == 1
    levels, thresholds = levels_on(fmt.key_bits if fmt.rotates else 4, key.device)
    if fmt.rotates:
        key = key[:tokens].float() @ hadamard(size, key.device)
    heads = min(_HEADS, triton.next_power_of_2(kv_heads))
    _store_kernel[(tokens, triton.cdiv(kv_heads, heads))](
        key, value, raw, levels, thresholds, slot_mapping, *key.stride()[:2], *value.stride()[:2],
        *raw.stride()[:3], raw.shape[2],
        KV_HEADS=kv_heads, HEADS=heads, D=size, ROOT=size**0.5, KEY_BITS=fmt.key_bits,
        VALUE_BITS=fmt.value_bits, KEY_BYTES=fmt.key_bytes(size), V_AT=fmt.value_at(size),
        V_SCALES_AT=fmt.value_scales_at(size), num_warps=4,
    )  # fmt: skip
