"""Quantised contents of a packed cache in Triton: bytes to numbers and back, inside kernels.

The formulae are those of ``kv_formats``, whose codes are the ``FORMAT`` here; 0 is a plain cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vllm.v1.attention.ops.kv_formats import KVFormat, SideScales

__all__ = ["FormatArguments", "layer_scales", "quantised", "widened"]

# A content with scales is 2 * D + 8 or D + 8 bytes long, D a multiple of 16.
_SCALED_ALIGNMENT = 8
_E5M2 = tl.constexpr(2)
_INT8 = tl.constexpr(3)
_INT4 = tl.constexpr(5)


@triton.jit
def widened(raw, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """A side's data ``(rows, bytes)`` as numbers ``(rows, D)`` of ``DTYPE``, not yet scaled.

    Every number of every format is exact in float16 and bfloat16.
    """
    if FORMAT == _INT4:
        low = (raw & 15).to(tl.int8) - 8
        high = (raw >> 4).to(tl.int8) - 8
        both = tl.join(low, high)
        x = tl.reshape(both, (raw.shape[0], 2 * raw.shape[1])).to(DTYPE)
    elif FORMAT == _INT8:
        x = raw.to(tl.int8, bitcast=True).to(DTYPE)
    elif FORMAT == _E5M2:
        x = raw.to(tl.float8e5, bitcast=True).to(DTYPE)
    else:
        x = raw.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    return x


@triton.jit
def quantised(x, scale, LARGEST: tl.constexpr, FORMAT: tl.constexpr):
    """A side ``(rows, D)`` in fp32 as bytes ``(rows, bytes)``, and the scale of each row.

    ``scale`` is the layer's where the format has one per tensor.
    """
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
        scales: a float32 view of the same bytes, where sides have scales of their own.
        constants: ``FORMAT``; ``V_AT``, elements of ``data`` from K to V; ``SCALE_AT``, floats
            from a side's start to its scale; ``UNIT``, what ``strides`` count.
        strides: of B, H and N, in units of ``UNIT`` elements, by which a kernel multiplies them:
            it then knows that sides with scales begin at multiples of 8 bytes, and reads words.
    """

    __slots__ = ("constants", "data", "scales", "strides")

    def __init__(self, kv_cache: torch.Tensor, fmt: KVFormat | None, head_size: int) -> None:
        assert kv_cache.stride(3) == 1
        self.data = kv_cache
        self.scales: torch.Tensor | None = None
        side, data_bytes = head_size, 0
        if fmt is not None:
            self.data = kv_cache.view(torch.uint8)
            side, data_bytes = fmt.side_bytes(head_size), fmt.data_bytes(head_size)
            if fmt.per_token_head:
                self.scales = self.data.view(torch.float32)
        assert self.data.shape[3] == 2 * side
        unit = _SCALED_ALIGNMENT if self.scales is not None else 1
        strides = self.data.stride()[:3]
        assert unit == 1 or not any(stride % unit for stride in strides)
        self.strides = strides if unit == 1 else tuple(stride // unit for stride in strides)
        self.constants: dict[str, Any] = {
            "FORMAT": 0 if fmt is None else fmt.code,
            "V_AT": side,
            "SCALE_AT": data_bytes // 4,
            "UNIT": unit,
        }


def layer_scales(fmt: KVFormat | None, scales: SideScales | None) -> SideScales:
    """Factors that a layer's sides share: 1 unless the format has one per tensor."""
    if fmt is None or fmt.per_token_head or scales is None:
        return SideScales()
    return scales
