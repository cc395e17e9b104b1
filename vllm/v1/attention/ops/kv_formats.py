"""Quantised contents of a packed cache: what the bytes of one (head, token) say, in PyTorch.

================  =========================  ===================================================
--kv-cache-dtype  bytes of a side, D wide    value of dimension d
================  =========================  ===================================================
fp8, fp8_e4m3     D x e4m3                   data[d] * scale of the layer's side
fp8_e5m2          D x e5m2                   data[d] * scale of the layer's side
int8_per_token_head  D x int8, fp32 scale    data[d] * scale
fp8_per_token_head   D x e4m3, fp32 scale    data[d] * scale
int4_per_token_head  D/2 bytes, fp32 scale   (nibble - 8) * scale; byte j has d = 2j low, 2j+1 high
================  =========================  ===================================================

The content of (head, token) is the side of K, then that of V. A scale of its own is the side's
largest magnitude over the largest number of the format (127, 448, 7), so every side reaches it.

Owns these formulae and the plain form of storing and reading; the kernels' are in
``triton_formats``. Knows nothing of pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

__all__ = ["FORMATS", "KVFormat", "SideScales", "kv_format"]

_SCALE_BYTES = 4
# A side of zeros keeps a scale that divides.
_LEAST_MAGNITUDE = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class SideScales:
    """Scales of a layer's K and V where a format has one per tensor: value = data * scale."""

    k: float = 1.0
    v: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KVFormat:
    """One quantised content.

    Attributes:
        code: what kernels call it (``triton_formats``).
        dtype: of the data; int4 is kept as bytes.
        largest: largest magnitude of the data.
        per_token_head: a scale lies behind each side's data; else the layer has one per side.
    """

    code: int
    dtype: torch.dtype
    largest: float
    per_token_head: bool

    @property
    def is_int4(self) -> bool:
        return self.dtype == torch.uint8

    def data_bytes(self, head_size: int) -> int:
        """Bytes of a side's data."""
        return head_size // 2 if self.is_int4 else head_size

    def side_bytes(self, head_size: int) -> int:
        """Bytes of a side, its scale included."""
        return self.data_bytes(head_size) + (_SCALE_BYTES if self.per_token_head else 0)

    def quantise(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """One side: numbers ``(..., D)`` to uint8 ``(..., side_bytes)``; ``scale`` per tensor."""
        wide = x.float()
        if not self.per_token_head:
            data = (wide / scale).clamp(-self.largest, self.largest).to(self.dtype)
            return data.view(torch.uint8)
        magnitude = wide.abs().amax(dim=-1, keepdim=True).clamp(min=_LEAST_MAGNITUDE)
        own = magnitude / self.largest
        scaled = wide / own
        if self.is_int4:
            nibbles = (torch.floor(scaled + 0.5) + 8).to(torch.uint8)
            data = nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
        elif self.dtype == torch.int8:
            data = torch.floor(scaled + 0.5).to(torch.int8).view(torch.uint8)
        else:
            data = scaled.to(self.dtype).view(torch.uint8)
        return torch.cat((data, own.view(torch.uint8)), dim=-1)

    def dequantise(self, side: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """One side back: uint8 ``(..., side_bytes)`` to float32 ``(..., D)``."""
        if not self.per_token_head:
            return side.view(self.dtype).float() * scale
        data = side[..., :-_SCALE_BYTES]
        own = side[..., -_SCALE_BYTES:].clone().view(torch.float32)
        if self.is_int4:
            pairs = torch.stack((data & 15, data >> 4), dim=-1)
            return (pairs.flatten(-2).float() - 8) * own
        return data.view(self.dtype).float() * own

    def quantise_kv(
        self, key: torch.Tensor, value: torch.Tensor, scales: SideScales | None = None
    ) -> torch.Tensor:
        """Content uint8 ``(..., 2 * side_bytes)`` of keys and values ``(..., D)``."""
        scales = scales or SideScales()
        return torch.cat((self.quantise(key, scales.k), self.quantise(value, scales.v)), dim=-1)

    def dequantise_kv(
        self, content: torch.Tensor, scales: SideScales | None = None
    ) -> torch.Tensor:
        """K then V, float32 ``(..., 2 * D)``, of ``content`` (single bytes)."""
        scales = scales or SideScales()
        key, value = content.view(torch.uint8).chunk(2, dim=-1)
        return torch.cat((self.dequantise(key, scales.k), self.dequantise(value, scales.v)), -1)


_E4M3 = KVFormat(code=1, dtype=torch.float8_e4m3fn, largest=448.0, per_token_head=False)

FORMATS: Mapping[str, KVFormat] = MappingProxyType(
    {
        "fp8": _E4M3,
        "fp8_e4m3": _E4M3,
        "fp8_e5m2": KVFormat(
            code=2, dtype=torch.float8_e5m2, largest=57344.0, per_token_head=False
        ),
        "int8_per_token_head": KVFormat(
            code=3, dtype=torch.int8, largest=127.0, per_token_head=True
        ),
        "fp8_per_token_head": KVFormat(
            code=4, dtype=torch.float8_e4m3fn, largest=448.0, per_token_head=True
        ),
        "int4_per_token_head": KVFormat(
            code=5, dtype=torch.uint8, largest=7.0, per_token_head=True
        ),
    }
)
"""By the name that ``--kv-cache-dtype`` gives them."""


def kv_format(cache_dtype: str) -> KVFormat | None:
    """The quantised content called ``cache_dtype``; None where the cache holds plain numbers."""
    return FORMATS.get(cache_dtype)
