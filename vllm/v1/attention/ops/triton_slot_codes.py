"""Reading TurboQuant slots inside attention kernels: words from memory, numbers in registers.

A slot is as long as an odd multiple of two bytes, so rows begin anywhere; words are read from
multiples of four and shifted into place, sixteen codes at a time. Codes become numbers by permuting
bytes in PTX, or by a lookup in memory where there is none (float32, the interpreter). What the
bytes say is in ``turboquant``; where they lie, the cache's strides.
"""

from __future__ import annotations

import functools
import struct
from typing import Any

import torch
import triton
import triton.language as tl

from vllm.v1.attention.ops.kv_formats import KVFormat
from vllm.v1.attention.ops.turboquant import TurboQuantFormat, normal_levels

__all__ = [
    "interprets",
    "key_codes_asm",
    "key_dimensions",
    "key_tile",
    "slot_constants",
    "slot_keys",
    "slot_values",
    "value_codes_asm",
    "value_dimensions",
    "value_tile",
]


@functools.cache
def interprets() -> bool:
    """Kernels run in the interpreter, which knows no PTX."""
    return bool(triton.knobs.runtime.interpret)


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


def slot_constants(fmt: KVFormat | None, dtype: torch.dtype) -> dict[str, Any]:
    """What a kernel for queries of ``dtype`` is told of slots; nothing of other formats."""
    constants: dict[str, Any] = {"K_BITS": 0, "V_BITS": 0, "K_ASM": "", "V_ASM": ""}
    if isinstance(fmt, TurboQuantFormat):
        constants |= {"K_BITS": fmt.key_bits, "V_BITS": fmt.value_bits}
        if dtype != torch.float32 and not interprets():
            constants["V_ASM"] = value_codes_asm(fmt.value_bits)
            if fmt.rotates:
                constants["K_ASM"] = key_codes_asm(fmt.key_bits)
    return constants


@triton.jit
def _funnel(low, high, shift, HAS_PTX: tl.constexpr):
    """The 32 bits from bit ``shift`` (0 to 31) of two words on."""
    if HAS_PTX:
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
def _sixteen(at, BITS: tl.constexpr, CODES_ASM: tl.constexpr):
    """Sixteen codes from each address on, as two words of eight nibbles, the first code lowest.

    Addresses are multiples of two: words are read from multiples of four and shifted. What lies
    behind the codes in a slot is as long as what is read too much.
    """
    HAS_PTX: tl.constexpr = CODES_ASM != ""
    address = at.to(tl.uint64)
    shift = (address & 2).to(tl.uint32) * 8
    word = (address - (address & 2)).to(tl.pointer_type(tl.uint32))
    w0 = tl.load(word)
    w1 = tl.load(word + 1)
    low = _funnel(w0, w1, shift, HAS_PTX)
    if BITS == 4:
        high = _funnel(w1, tl.load(word + 2), shift, HAS_PTX)
    else:
        high = _spread(_funnel(low, w1 >> shift, tl.full(shift.shape, 24, tl.uint32), HAS_PTX))
        low = _spread(low)
    return low, high


@triton.jit
def _eight(words, CODES_ASM: tl.constexpr):
    """The nibbles of words, joined: the last three axes are bits 2, 1 and 0 of their place.

    With ``CODES_ASM`` the float16 numbers that it makes of them, two words at a time.
    """
    if CODES_ASM != "":
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
def _codes(at, D: tl.constexpr, BITS: tl.constexpr, CODES_ASM: tl.constexpr):
    """Codes, or what they stand for, from the addresses ``at`` on: (rows, D / 16, 2, 2, 2, 2)."""
    unit = tl.arange(0, D // 16) * (2 * BITS)
    low, high = _sixteen(at[:, None] + unit[None, :], BITS, CODES_ASM)
    return _eight(tl.join(low, high), CODES_ASM)


@triton.jit
def _as(x, CODES_ASM: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers in the queries' type, as a tensor whose making a product doesn't look into.

    Triton 3.6 fails to lay out operands of Hopper's products that are nothing but reshaped.
    """
    if CODES_ASM != "":
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    return x.to(DTYPE)


@triton.jit
def slot_keys(
    at, levels_ptr, D: tl.constexpr, BITS: tl.constexpr, CODES_ASM: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Keys (D, rows) of slots at the addresses ``at``, rotated, their lengths left out."""
    if BITS == 8:
        raw = tl.load(at[None, :] + tl.arange(0, D)[:, None])
        k = raw.to(tl.float8e4nv, bitcast=True)
    else:
        k = tl.permute(_codes(at, D, BITS, CODES_ASM), (1, 2, 3, 4, 5, 0))
        k = tl.reshape(k, (D, at.shape[0]))
        if CODES_ASM == "":
            k = tl.load(levels_ptr + k)
    return _as(k, CODES_ASM, DTYPE)


@triton.jit
def slot_values(
    at, D: tl.constexpr, BITS: tl.constexpr, CODES_ASM: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Codes of values (rows, D), less half their number, whose data begins at ``at``."""
    v = tl.reshape(_codes(at, D, BITS, CODES_ASM), (at.shape[0], D))
    v = _as(v, CODES_ASM, DTYPE)
    if CODES_ASM == "":
        v -= 1 << (BITS - 1)
    return v


@triton.jit
def key_tile(
    page, stride_n, first, last, levels_ptr, TILE: tl.constexpr, D: tl.constexpr,
    BITS: tl.constexpr, CODES_ASM: tl.constexpr, COMPUTE: tl.constexpr,
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
    low, high = _sixteen(page + token * stride_n + unit * (2 * BITS), BITS, CODES_ASM)
    x = _eight(tl.join(low, high), CODES_ASM)
    if CODES_ASM == "":
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
    CODES_ASM: tl.constexpr, COMPUTE: tl.constexpr,
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
    low, high = _sixteen(page + token * stride_n + unit * (2 * BITS), BITS, CODES_ASM)
    if D >= 128:
        x = tl.join(_eight(low, CODES_ASM), _eight(high, CODES_ASM))
        x = tl.permute(x, (3, 0, 4, 2, 5, 9, 6, 7, 8, 1))
    else:
        # Two lanes have the same sixteen: each takes its half.
        x = _eight(tl.where(g % 2 == 0, low, high), CODES_ASM)
        x = tl.permute(x, (3, 0, 4, 2, 5, 6, 7, 8, 1))
    if CODES_ASM == "":
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
