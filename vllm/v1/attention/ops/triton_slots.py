"""TurboQuant slots in Triton: storing them, and reading them inside the attention kernels.

What the bytes say is in ``turboquant``, whose codes (7 and up) are the ``FORMAT`` here. Keys come
rotated already. Slots lie where the cache's strides say; nothing is flattened.
"""

from __future__ import annotations

import functools
import struct

import torch
import triton
import triton.language as tl

from vllm.v1.attention.ops.turboquant import (
    TurboQuantFormat,
    hadamard,
    levels_on,
    normal_levels,
)

__all__ = [
    "key_codes_asm",
    "key_dimensions",
    "key_tile",
    "slot_keys",
    "slot_values",
    "store_slots",
    "value_codes_asm",
    "value_dimensions",
    "value_tile",
]

_K8V4 = tl.constexpr(7)
_K4V4 = tl.constexpr(8)
_K3V3 = tl.constexpr(10)
# Heads of one program.
_HEADS = 8


@triton.jit
def _codes(at, dims, there, BITS: tl.constexpr):
    """Codes (rows, D) of data that begins at the addresses ``at`` (rows,)."""
    bit = dims * BITS
    word = tl.load(at[:, None] + (bit // 8)[None, :], mask=there, other=0).to(tl.int32)
    if BITS == 3:
        crosses = there & (bit % 8 > 5)[None, :]
        high = tl.load(at[:, None] + (bit // 8 + 1)[None, :], mask=crosses, other=0).to(tl.int32)
        word = word | (high << 8)
    return (word >> (bit % 8)[None, :]) & ((1 << BITS) - 1)


@triton.jit
def slot_keys(at, dims, there, levels_ptr, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """Keys (rows, D) of slots at the addresses ``at``, rotated, their lengths left out."""
    if FORMAT == _K8V4:
        raw = tl.load(at[:, None] + dims[None, :], mask=there, other=0)
        k = raw.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    elif FORMAT == _K4V4:
        k = tl.load(levels_ptr + _codes(at, dims, there, 4)).to(DTYPE)
    else:
        k = tl.load(levels_ptr + _codes(at, dims, there, 3)).to(DTYPE)
    return k


@triton.jit
def slot_values(at, dims, there, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """Codes of values (rows, D) whose data begins at the addresses ``at``."""
    if FORMAT == _K3V3:
        v = _codes(at, dims, there, 3).to(DTYPE)
    else:
        v = _codes(at, dims, there, 4).to(DTYPE)
    return v


@functools.cache
def key_codes_asm(bits: int) -> str:
    """PTX: two words of nibbles to what the codes stand for, eight times two float16.

    A lookup is a permutation of the bytes of a table of eight. Of sixteen levels the upper eight
    are in it; the lower are theirs with the sign changed, in reverse.
    """
    levels = normal_levels(bits)[0][-8:]
    raw = struct.pack("<8e", *levels)
    # Low bytes of the eight, then high bytes; four to a word.
    tables = [int.from_bytes(raw[i + half : i + half + 8 : 2], "little")
              for half in (0, 1) for i in (0, 8)]  # fmt: skip
    lines = [f"mov.b32 t{i}, {table:#x};" for i, table in enumerate(tables)]
    for place, order in enumerate((0x5140, 0x7362)):
        # Nibbles 0 and 1 of the first word's byte, of the second's, then of their next bytes.
        lines.append(f"prmt.b32 x, $8, $9, {order:#x};")
        if bits == 4:
            # A lower code is subtracted from 7: its three bits are inverted.
            lines += [
                "and.b32 u, x, 0x88888888;", "shr.u32 v, u, 3;", "sub.u32 u, u, v;",
                "lop3.b32 v, x, u, 0x77777777, 0x82;", "shl.b32 u, x, 4;",
            ]  # fmt: skip
        else:
            lines.append("mov.b32 v, x;")
        for half, signs in enumerate((0xD9C8, 0xFBEA)):
            lines += ["prmt.b32 a, t0, t1, v;", "prmt.b32 b, t2, t3, v;"]
            if bits == 4:
                # The highest bit of each code, all over a byte.
                lines += [f"prmt.b32 w, u, x, {signs:#x};", "lop3.b32 b, b, w, 0x80808080, 0xf2;"]
            at = place * 4 + half * 2
            lines += [f"prmt.b32 ${at}, a, b, 0x6240;", f"prmt.b32 ${at + 1}, a, b, 0x7351;"]
            if not half:
                lines.append("shr.u32 v, v, 16;")
    return "{\n.reg .b32 a, b, u, v, w, x, t<4>;\n" + "\n".join(lines) + "\n}"


@functools.cache
def value_codes_asm(bits: int) -> str:
    """PTX: two words of nibbles to codes less half their number, eight times two float16."""
    centre = 1 << (bits - 1)
    # 0x6400 | n is 1024 + n, and 0x5400 | n << 4 is 64 + n.
    low, high = 0x6400 + centre, 0x5400 + 16 * centre
    lines = [f"mov.b32 m, {low << 16 | low:#x};", f"mov.b32 n, {high << 16 | high:#x};"]
    for place, order in enumerate((0x5410, 0x7632)):
        lines.append(f"prmt.b32 x, $8, $9, {order:#x};")
        for half in (0, 1):
            at = place * 4 + half * 2
            if half:
                lines.append("shr.u32 x, x, 8;")
            lines += [
                f"lop3.b32 ${at}, x, 0x000f000f, 0x64006400, 0xea;",
                f"lop3.b32 ${at + 1}, x, 0x00f000f0, 0x54005400, 0xea;",
                f"sub.f16x2 ${at}, ${at}, m;", f"sub.f16x2 ${at + 1}, ${at + 1}, n;",
            ]  # fmt: skip
    return "{\n.reg .b32 m, n, x;\n" + "\n".join(lines) + "\n}"


@triton.jit
def _funnel(low, high, shift, ASM: tl.constexpr):
    """The 32 bits from bit ``shift`` (0 to 31) of two words on."""
    if ASM:
        x = tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, shift], dtype=tl.uint32,
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        x = (((high.to(tl.uint64) << 32) | low.to(tl.uint64)) >> shift.to(tl.uint64)).to(tl.uint32)
    return x


@triton.jit
def _spread(x):
    """The lowest eight codes of three bits, each in a nibble."""
    x = (x & 0x0000FFFF) | ((x << 4) & 0xFFFF0000)
    x = (x & 0x00FF00FF) | ((x << 2) & 0xFF00FF00)
    x = (x & 0x0F0F0F0F) | ((x << 1) & 0xF0F0F0F0)
    return x & 0x77777777


@triton.jit
def _sixteen(at, BITS: tl.constexpr, ASM: tl.constexpr):
    """Sixteen codes from each address on, as two words of eight nibbles, the first code lowest.

    Addresses are multiples of two: words are read from multiples of four and shifted. What lies
    behind the codes in a slot is as long as what is read too much.
    """
    address = at.to(tl.uint64)
    shift = (address & 2).to(tl.uint32) * 8
    word = (address - (address & 2)).to(tl.pointer_type(tl.uint32))
    w0 = tl.load(word)
    w1 = tl.load(word + 1)
    low = _funnel(w0, w1, shift, ASM)
    if BITS == 4:
        high = _funnel(w1, tl.load(word + 2), shift, ASM)
    else:
        high = _spread(_funnel(low, w1 >> shift, tl.full(shift.shape, 24, tl.uint32), ASM))
        low = _spread(low)
    return low, high


@triton.jit
def _eight(words, CODES_ASM: tl.constexpr, ASM: tl.constexpr):
    """The nibbles of words: eight tensors, joined; the last axes are bits 2, 1, 0 of the place.

    ASM: as the numbers that ``CODES_ASM`` makes of them, two words at a time, in float16.
    """
    if ASM:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            CODES_ASM, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r", [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16,
                   tl.float16, tl.float16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        a = words & 15
        b = (words >> 4) & 15
        c = (words >> 8) & 15
        d = (words >> 12) & 15
        e = (words >> 16) & 15
        f = (words >> 20) & 15
        g = (words >> 24) & 15
        h = words >> 28
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.join(even, odd)


@triton.jit
def key_tile(
    page, stride_n, first, last, levels_ptr, TILE: tl.constexpr, D: tl.constexpr,
    BITS: tl.constexpr, CODES_ASM: tl.constexpr, COMPUTE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Keys of a tile as the right side (dimensions, tokens) of ``triton_byte_decode``'s product.

    Of the slots from ``page`` on, in the order of ``key_dimensions``; their lengths left out.
    """
    UNITS: tl.constexpr = D // 64
    t = tl.arange(0, 4)[:, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None]
    r = tl.arange(0, TILE // 8)[None, None, :, None]
    unit = tl.arange(0, UNITS)[None, None, None, :] * 4 + t
    token = tl.minimum(tl.maximum(r * 8 + g % 2 * 4 + g // 2, first), last)
    low, high = _sixteen(page + token * stride_n + unit * (2 * BITS), BITS, ASM)
    x = _eight(tl.join(low, high), CODES_ASM, ASM)
    if not ASM:
        x = tl.load(levels_ptr + x).to(COMPUTE)
    return tl.reshape(tl.permute(x, (3, 5, 6, 0, 7, 4, 2, 1)), (D, TILE))


@triton.jit
def key_dimensions(D: tl.constexpr):
    """Dimension of each row of ``key_tile``."""
    c = tl.arange(0, D)
    unit = c // 64 * 4 + c // 4 % 4
    return unit * 16 + c % 2 * 8 + c // 32 % 2 * 4 + c // 16 % 2 * 2 + c // 2 % 2


@triton.jit
def value_tile(
    page, stride_n, first, last, TILE: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
    CODES_ASM: tl.constexpr, COMPUTE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Codes of values, less half their number, as the right side (tokens, dimensions).

    Sums of products stay small that way.
    """
    UNITS: tl.constexpr = (D + 64) // 128
    t = tl.arange(0, 4)[:, None, None, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None, None, None]
    # Two tokens that meet in a register: the first axis that lanes leave to registers.
    e = tl.arange(0, 2)[None, None, :, None, None, None]
    s = tl.arange(0, TILE // 16)[None, None, None, :, None, None]
    h = tl.arange(0, 2)[None, None, None, None, :, None]
    token = tl.minimum(tl.maximum(s * 16 + h * 8 + e * 4 + t, first), last)
    if D >= 128:
        unit = tl.arange(0, UNITS)[None, None, None, None, None, :] * 8 + g
    else:
        unit = g // 2
    low, high = _sixteen(page + token * stride_n + unit * (2 * BITS), BITS, ASM)
    if D >= 128:
        x = tl.join(_eight(low, CODES_ASM, ASM), _eight(high, CODES_ASM, ASM))
        x = tl.permute(x, (3, 0, 4, 2, 5, 9, 6, 7, 8, 1))
    else:
        # Two lanes have the same sixteen: each takes its half.
        x = _eight(tl.where(g % 2 == 0, low, high), CODES_ASM, ASM)
        x = tl.permute(x, (3, 0, 4, 2, 5, 6, 7, 8, 1))
    if not ASM:
        x = x.to(COMPUTE) - (1 << (BITS - 1))
    return tl.reshape(x, (TILE, D))


@triton.jit
def value_dimensions(D: tl.constexpr):
    """Dimension of each column of ``value_tile``."""
    c = tl.arange(0, D)
    if D >= 128:
        at = (c // 128 * 8 + c % 8) * 16 + c // 64 % 2 * 8 + c // 8 % 8
    else:
        at = c % 8 * 8 + c // 8
    return at


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
