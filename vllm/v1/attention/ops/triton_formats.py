"""Quantised contents of a packed cache in Triton: bytes to numbers and back, inside kernels.

The formulae are those of ``kv_formats``, whose codes are the ``FORMAT`` here; 0 is a plain cache.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from vllm.utils.torch_utils import nvfp4_split_data_scale
from vllm.v1.attention.ops.kv_formats import KVFormat, SideScales
from vllm.v1.attention.ops.turboquant import TurboQuantFormat, levels_on

__all__ = ["FormatArguments", "layer_scales", "numbers", "quantised", "scaled", "widened"]

_E5M2 = tl.constexpr(2)
_INT8 = tl.constexpr(3)
_INT4 = tl.constexpr(5)
_NVFP4 = tl.constexpr(6)
# Left in the numbers of nvfp4 by ``numbers``, so that they stay within float16: value / 2^8.
_NVFP4_FACTOR = 256.0


@triton.jit
def _e2m1(nibble, DTYPE: tl.constexpr):
    """Sign, two bits of exponent, one of mantissa, as a number."""
    magnitude = (nibble & 7).to(tl.int32)
    normal = (2 + (magnitude & 1)).to(tl.float32) * (1 << (magnitude >> 1)).to(tl.float32) * 0.25
    x = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, normal)
    return tl.where(nibble >= 8, -x, x).to(DTYPE)


@triton.jit
def _nibbles(raw, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """The low and the high number of each byte."""
    if FORMAT == _NVFP4:
        return _e2m1(raw & 15, DTYPE), _e2m1(raw >> 4, DTYPE)
    low = (raw & 15).to(tl.int8) - 8
    high = (raw >> 4).to(tl.int8) - 8
    return low.to(DTYPE), high.to(DTYPE)


@triton.jit
def widened(raw, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """A side's data ``(rows, bytes)`` as numbers ``(rows, D)`` of ``DTYPE``, not yet scaled.

    Every number of every format is exact in float16 and bfloat16.
    """
    if FORMAT >= _INT4:
        low, high = _nibbles(raw, DTYPE, FORMAT)
        both = tl.join(low, high)
        x = tl.reshape(both, (raw.shape[0], 2 * raw.shape[1]))
    elif FORMAT == _INT8:
        x = raw.to(tl.int8, bitcast=True).to(DTYPE)
    elif FORMAT == _E5M2:
        x = raw.to(tl.float8e5, bitcast=True).to(DTYPE)
    else:
        x = raw.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    return x


@triton.jit
def scaled(x, scales, GROUPS: tl.constexpr):
    """Numbers ``(rows, 16 * GROUPS)`` times e4m3 scales ``(rows, GROUPS)`` given as bytes."""
    own = scales.to(tl.float8e4nv, bitcast=True).to(x.dtype)
    y = tl.reshape(x, (x.shape[0], GROUPS, 16)) * own[:, :, None]
    return tl.reshape(y, (x.shape[0], x.shape[1]))


@triton.jit
def numbers(
    raw, scales, COMPUTE: tl.constexpr, FORMAT: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """Bytes ``(..., VEC)`` as numbers; twice where a byte holds two, low nibbles first.

    ``scales`` are nvfp4's bytes ``(..., VEC / 8)``, at least one. ASM: four bytes in a register at
    a time, whichever they are, to float16.
    """
    if FORMAT == _NVFP4:
        low, high = _fp4_numbers(raw, scales, COMPUTE, ASM)
    elif FORMAT == _INT4:
        low, high = _int4_numbers(raw, COMPUTE, ASM)
    elif FORMAT == _INT8:
        low = _int8_numbers(raw, COMPUTE, ASM)
        high = low
    elif FORMAT == _E5M2:
        low = _e5m2_numbers(raw, COMPUTE, ASM)
        high = low
    else:
        low = _e4m3_numbers(raw, COMPUTE, ASM)
        high = low
    return low, high


@triton.jit
def _e4m3_numbers(raw, COMPUTE: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        x = tl.inline_asm_elementwise(
            """
            {
            .reg .b16 a, b;
            mov.b32 {a, b}, $2;
            cvt.rn.f16x2.e4m3x2 $0, a;
            cvt.rn.f16x2.e4m3x2 $1, b;
            }
            """,
            "=&r,=&r,r", [raw], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        x = raw.to(tl.float8e4nv, bitcast=True).to(COMPUTE)
    return x


@triton.jit
def _e5m2_numbers(raw, COMPUTE: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        # The upper byte of float16.
        x = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424;",
            "=&r,=&r,r", [raw], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        x = raw.to(tl.float8e5, bitcast=True).to(COMPUTE)
    return x


@triton.jit
def _int8_numbers(raw, COMPUTE: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        # 0x6400 | u is 1024 + u; a byte with its sign flipped is 128 + x.
        x = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, m;
            xor.b32 t, $2, 0x80808080;
            mov.b32 m, 0x64806480;
            prmt.b32 $0, t, 0x64646464, 0x4140;
            prmt.b32 $1, t, 0x64646464, 0x4342;
            sub.f16x2 $0, $0, m;
            sub.f16x2 $1, $1, m;
            }
            """,
            "=&r,=&r,r", [raw], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        x = raw.to(tl.int8, bitcast=True).to(COMPUTE)
    return x


@triton.jit
def _int4_numbers(raw, COMPUTE: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        # 0x6400 | n is 1024 + n, and 0x5400 | n << 4 is 64 + n.
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, u, m, n;
            mov.b32 m, 0x64086408;
            mov.b32 n, 0x54805480;
            prmt.b32 t, $4, 0, 0x4140;
            prmt.b32 u, $4, 0, 0x4342;
            lop3.b32 $0, t, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $2, t, 0x00f000f0, 0x54005400, 0xea;
            lop3.b32 $1, u, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $3, u, 0x00f000f0, 0x54005400, 0xea;
            sub.f16x2 $0, $0, m;
            sub.f16x2 $1, $1, m;
            sub.f16x2 $2, $2, n;
            sub.f16x2 $3, $3, n;
            }
            """,
            "=&r,=&r,=&r,=&r,r", [raw], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low, high = _nibbles(raw, COMPUTE, _INT4)
    return low, high


@triton.jit
def _fp4_numbers(raw, scales, COMPUTE: tl.constexpr, ASM: tl.constexpr):
    """Values over ``_NVFP4_FACTOR``."""
    if ASM:
        # Exponent and mantissa of e2m1 in those of float16: value / 2^14.
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t, u, v;
            prmt.b32 v, $4, 0, 0x4140;
            shl.b32 t, v, 9;
            shl.b32 u, v, 12;
            and.b32 t, t, 0x0e000e00;
            lop3.b32 $0, u, 0x80008000, t, 0xea;
            shl.b32 t, v, 5;
            shl.b32 u, v, 8;
            and.b32 t, t, 0x0e000e00;
            lop3.b32 $2, u, 0x80008000, t, 0xea;
            prmt.b32 v, $4, 0, 0x4342;
            shl.b32 t, v, 9;
            shl.b32 u, v, 12;
            and.b32 t, t, 0x0e000e00;
            lop3.b32 $1, u, 0x80008000, t, 0xea;
            shl.b32 t, v, 5;
            shl.b32 u, v, 8;
            and.b32 t, t, 0x0e000e00;
            lop3.b32 $3, u, 0x80008000, t, 0xea;
            }
            """,
            "=&r,=&r,=&r,=&r,r", [raw], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
        own = scales.to(tl.float8e4nv, bitcast=True).to(tl.float16) * 64.0
    else:
        low, high = _nibbles(raw, COMPUTE, _NVFP4)
        own = scales.to(tl.float8e4nv, bitcast=True).to(COMPUTE) * 0.00390625
    own = own.to(COMPUTE)
    a: tl.constexpr = raw.shape[0]
    b: tl.constexpr = raw.shape[1]
    c: tl.constexpr = raw.shape[2]
    d: tl.constexpr = raw.shape[3]
    e: tl.constexpr = raw.shape[4]
    runs: tl.constexpr = (e + 7) // 8
    shape: tl.constexpr = (a * b, c, d, runs, e // runs)
    own = tl.reshape(own, (a * b, c, d, runs, 1))
    low = tl.reshape(tl.reshape(low, shape) * own, (a, b, c, d, e))
    high = tl.reshape(tl.reshape(high, shape) * own, (a, b, c, d, e))
    return low, high


@triton.jit
def _fp4_codes(x):
    """Nibbles of numbers that are divided by their scales: to the nearest, ties to even."""
    a = tl.abs(x)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32)
    code += (a >= 1.75).to(tl.int32) + (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32)
    code += (a > 5.0).to(tl.int32)
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    return code | sign


@triton.jit
def quantised(x, scale, LARGEST: tl.constexpr, FORMAT: tl.constexpr):
    """A side ``(rows, D)`` in fp32 as bytes ``(rows, bytes)``, and the scale of each row.

    ``scale`` is the layer's where the format has one per tensor. The scales of nvfp4 are bytes
    ``(rows, D / 16)``.
    """
    if FORMAT == _NVFP4:
        groups = tl.reshape(x, (x.shape[0], x.shape[1] // 16, 16))
        most = tl.max(tl.abs(groups), 2) / LARGEST / scale
        fp8 = tl.minimum(most, 448.0).to(tl.float8e4nv)
        step = fp8.to(tl.float32) * scale
        y = tl.where(step[:, :, None] > 0, groups / step[:, :, None], 0.0)
        nibbles = _fp4_codes(y)
        low, high = tl.split(tl.reshape(nibbles, (x.shape[0], x.shape[1] // 2, 2)))
        raw = (low | (high << 4)).to(tl.uint8)
        own = fp8.to(tl.uint8, bitcast=True)
    else:
        if FORMAT < _INT8:
            own = tl.zeros([x.shape[0]], tl.float32) + scale
        else:
            own = tl.maximum(tl.max(tl.abs(x), 1), 1e-12) / LARGEST
        y = x / own[:, None]
        if FORMAT == _INT4:
            nibbles = (tl.floor(y + 0.5) + 8).to(tl.int32)
            low, high = tl.split(tl.reshape(nibbles, (x.shape[0], x.shape[1] // 2, 2)))
            raw = (low | (high << 4)).to(tl.uint8)
        elif FORMAT == _INT8:
            raw = tl.floor(y + 0.5).to(tl.int8).to(tl.uint8, bitcast=True)
        else:
            y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
            if FORMAT == _E5M2:
                raw = y.to(tl.float8e5).to(tl.uint8, bitcast=True)
            else:
                raw = y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return raw, own


class FormatArguments:
    """What a kernel is told of a cache: the bytes or numbers, where scales lie, what they mean.

    Attributes:
        data: the cache as the kernel addresses it: itself, or a view of single bytes.
        scales: where sides have scales, a view of them that begins at the first of K's: float32
            for one per token, bytes for nvfp4, float16 for TurboQuant's slots.
        levels: what the codes of TurboQuant's keys stand for.
        strides: of B, H and N, in units of ``UNIT`` elements, by which a kernel multiplies them:
            it then knows that rows begin at multiples of so many bytes, and reads words.
        scale_strides: of B, H and N, in elements of ``scales``.
        kv_heads: KV heads.
        alignment: bytes that every row of the cache is a multiple of.
        factor: what ``numbers`` leaves out of K and of V.
        constants: ``FORMAT``; ``V_AT``, elements of ``data`` from K to V; ``V_SCALE_AT``, elements
            of ``scales`` from K's to V's; ``UNIT``.
    """

    __slots__ = (
        "alignment",
        "constants",
        "data",
        "factor",
        "kv_heads",
        "levels",
        "scale_strides",
        "scales",
        "strides",
    )

    def __init__(self, kv_cache: torch.Tensor, fmt: KVFormat | None, head_size: int) -> None:
        assert kv_cache.stride(3) == 1
        self.data = kv_cache
        self.kv_heads = kv_cache.shape[1]
        self.scales: torch.Tensor | None = None
        self.levels: torch.Tensor | None = None
        self.factor, self.alignment = 1.0, 1
        side, v_scale_at = head_size, 0
        if fmt is not None:
            raw = self.data = kv_cache.view(torch.uint8)
            side = fmt.side_bytes(head_size)
            if fmt.code == _NVFP4.value:
                self.kv_heads //= 2
                side = v_scale_at = self.kv_heads * kv_cache.stride(1)
                self.data, self.scales = nvfp4_split_data_scale(raw[:, : self.kv_heads])
                self.factor = _NVFP4_FACTOR
                assert self.data.shape[3] * 2 == head_size
            elif isinstance(fmt, TurboQuantFormat):
                assert raw.shape[3] == fmt.content_bytes(head_size)
                side, scales_at = fmt.value_at(head_size), fmt.value_scales_at(head_size)
                # A key's length is the first, or the value's step where there is none.
                first = fmt.key_bytes(head_size) if fmt.rotates else scales_at
                self.scales = raw.view(torch.float16)[..., first // 2]
                v_scale_at = (scales_at - first) // 2
                if fmt.rotates:
                    self.levels, _ = levels_on(fmt.key_bits, raw.device)
            else:
                assert raw.shape[3] == 2 * side
            if fmt.per_token_head and not isinstance(fmt, TurboQuantFormat):
                self.scales = raw.view(torch.float32)[..., fmt.data_bytes(head_size) // 4]
                v_scale_at = side // 4
        else:
            assert self.data.shape[3] == 2 * side
        strides = self.data.stride()[:3]
        unit = 1
        if fmt is not None:
            # Strides over axes of one are never used for an address.
            used = (s for s, n in zip(strides, self.data.shape, strict=False) if n > 1)
            self.alignment = unit = math.gcd(16, *used, self.data.data_ptr())
        self.strides = tuple(stride // unit for stride in strides)
        self.scale_strides = (0, 0, 0) if self.scales is None else self.scales.stride()[:3]
        self.constants: dict[str, Any] = {
            "FORMAT": 0 if fmt is None else fmt.code,
            "V_AT": side,
            "V_SCALE_AT": v_scale_at,
            "UNIT": unit,
        }


def layer_scales(fmt: KVFormat | None, scales: SideScales | None) -> SideScales:
    """Factors that a layer's sides share: 1 unless the format has one per tensor."""
    if fmt is None or fmt.per_token_head or scales is None:
        return SideScales()
    return scales
