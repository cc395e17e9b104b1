"""Quantised contents of a packed cache: what the bytes of one (head, token) say, in PyTorch.

================  =========================  ===================================================
--kv-cache-dtype  bytes of a side, D wide    value of dimension d
================  =========================  ===================================================
fp8, fp8_e4m3     D x e4m3                   data[d] * scale of the layer's side
fp8_e5m2          D x e5m2                   data[d] * scale of the layer's side
int8_per_token_head  D x int8, fp32 scale    data[d] * scale
fp8_per_token_head   D x e4m3, fp32 scale    data[d] * scale
int4_per_token_head  D/2 bytes, fp32 scale   (nibble - 8) * scale; byte j has d = 2j low, 2j+1 high
nvfp4             D/2 bytes, D/16 x e4m3     e2m1[nibble] * block scale * scale of the layer's side
================  =========================  ===================================================

The content of (head, token) is the side of K, then that of V. A scale of its own is the side's
largest magnitude over the largest number of the format (127, 448, 7), so every side reaches it.

nvfp4 is the exception: K heads and V heads are apart on the head axis, ``(B, 2H, N, D/2 + D/16)``,
and a side of a block is all its data, then all its scales, one for 16 dimensions
(``nvfp4_split_data_scale``). A block scale is the largest magnitude over 6, by the layer's scale.

Owns these formulae and the plain form of storing and reading; the kernels' are in
``triton_formats`` and csrc/cpu/kv_formats.h. TurboQuant's slots are in ``turboquant``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from vllm.utils.torch_utils import nvfp4_split_data_scale
from vllm.v1.kv_cache.content import NVFP4_GROUP
from vllm.v1.kv_cache.declare import TURBOQUANT_BITS

__all__ = ["E2M1", "FORMATS", "KVFormat", "NVFP4Format", "SideScales", "kv_format"]

_SCALE_BYTES = 4
# A side of zeros keeps a scale that divides.
_LEAST_MAGNITUDE = 1e-12
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of e2m1 by the low three bits of a nibble; the fourth is the sign."""
_LARGEST_E4M3 = 448.0


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
        return self.code == 5

    @property
    def largest_value(self) -> float:
        """Largest magnitude that is kept where the layer's factor is 1."""
        return self.largest

    @property
    def has_layer_scales(self) -> bool:
        """The layer has a factor for each side, which ``SideScales`` holds."""
        return not self.per_token_head

    def content_bytes(self, head_size: int) -> int:
        """Bytes of one (head slot, token)."""
        return 2 * self.side_bytes(head_size)

    def head_slots(self, num_kv_heads: int) -> int:
        """Extent of the head axis."""
        return num_kv_heads

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

    def store(
        self,
        kv_cache: torch.Tensor,
        blocks: torch.Tensor,
        offsets: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scales: SideScales | None = None,
    ) -> None:
        """Write tokens ``(T, K, D)`` to ``offsets`` (T,) of ``blocks`` (T,) of a cache's bytes."""
        kv_cache[blocks, :, offsets] = self.quantise_kv(key, value, scales)

    def read(self, pages: torch.Tensor, scales: SideScales | None = None) -> torch.Tensor:
        """K then V ``(P * N, K, 2 * D)`` of all tokens of ``pages``, bytes ``(P, heads, N, C)``."""
        return self.dequantise_kv(pages.transpose(1, 2), scales).flatten(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class NVFP4Format(KVFormat):
    """e2m1 numbers with a scale for every 16; K heads and V heads apart on the head axis."""

    @property
    def largest_value(self) -> float:
        return self.largest * _LARGEST_E4M3

    def content_bytes(self, head_size: int) -> int:
        return head_size // 2 + head_size // NVFP4_GROUP

    def head_slots(self, num_kv_heads: int) -> int:
        return 2 * num_kv_heads

    def data_bytes(self, head_size: int) -> int:
        return head_size // 2

    def side_bytes(self, head_size: int) -> int:
        return self.content_bytes(head_size)

    def quantise(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """One side: numbers ``(..., D)`` to bytes, ``D / 2`` of data, then scales."""
        groups = x.float().unflatten(-1, (-1, NVFP4_GROUP))
        magnitude = groups.abs().amax(dim=-1, keepdim=True)
        own = (magnitude / self.largest / scale).clamp(max=_LARGEST_E4M3).to(torch.float8_e4m3fn)
        step = own.float() * scale
        y = torch.where(step > 0, groups / step, 0.0)
        a = y.abs()
        # To the nearest, ties to the even of two neighbours.
        code = (a > 0.25).to(torch.uint8) + (a >= 0.75) + (a > 1.25) + (a >= 1.75)
        code = code + (a > 2.5) + (a >= 3.5) + (a > 5.0)
        nibbles = (code | (y.signbit().to(torch.uint8) << 3)).flatten(-2)
        data = nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
        return torch.cat((data, own.squeeze(-1).view(torch.uint8)), dim=-1)

    def dequantise(self, side: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        data, own = side.split((side.shape[-1] * 8 // 9, side.shape[-1] // 9), dim=-1)
        nibbles = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2).long()
        signed = torch.tensor((*E2M1, *(-x for x in E2M1)), device=side.device)
        numbers = signed[nibbles].unflatten(-1, (-1, NVFP4_GROUP))
        return (numbers * own.view(torch.float8_e4m3fn).float().unsqueeze(-1) * scale).flatten(-2)

    def store(
        self,
        kv_cache: torch.Tensor,
        blocks: torch.Tensor,
        offsets: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scales: SideScales | None = None,
    ) -> None:
        scales = scales or SideScales()
        heads = key.shape[1]
        sides = (key, scales.k, kv_cache[:, :heads]), (value, scales.v, kv_cache[:, heads:])
        for x, scale, side in sides:
            data, block_scales = nvfp4_split_data_scale(side)
            content = self.quantise(x, scale)
            data[blocks, :, offsets] = content[..., : data.shape[-1]]
            block_scales[blocks, :, offsets] = content[..., data.shape[-1] :]

    def read(self, pages: torch.Tensor, scales: SideScales | None = None) -> torch.Tensor:
        scales = scales or SideScales()
        heads = pages.shape[1] // 2
        found = []
        for side, scale in ((pages[:, :heads], scales.k), (pages[:, heads:], scales.v)):
            parts = torch.cat(nvfp4_split_data_scale(side), dim=-1)
            found.append(self.dequantise(parts.transpose(1, 2).flatten(0, 1), scale))
        return torch.cat(found, dim=-1)


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
        "nvfp4": NVFP4Format(code=6, dtype=torch.uint8, largest=6.0, per_token_head=False),
    }
)
"""By the name that ``--kv-cache-dtype`` gives them."""


def kv_format(cache_dtype: str) -> KVFormat | None:
    """The quantised content called ``cache_dtype``; None where the cache holds plain numbers."""
    if cache_dtype in TURBOQUANT_BITS:
        from vllm.v1.attention.ops.turboquant import TURBOQUANT_FORMATS

        return TURBOQUANT_FORMATS[cache_dtype]
    return FORMATS.get(cache_dtype)
