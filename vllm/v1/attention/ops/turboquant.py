"""TurboQuant slots: rotated keys by Lloyd-Max codes, values by uniform codes; plain PyTorch.

A slot holds the key and the value of one (head, token), in this order:

==================  ======================================================================
bytes               content
==================  ======================================================================
D, or ceil(Dk/8)    key: e4m3 where its codes have 8 bits, else codes of k bits
2 (k < 8)           fp16: length of the key over that of its codes' vector
ceil(Dv/8)          value: codes of v bits
2, 2                fp16: step and zero of the value
0 or 1              the slot is rounded up to even
==================  ======================================================================

Code d takes bits ``[d * bits, (d + 1) * bits)``, counted from the lowest of the first byte. A key
``x`` is stored as the codes of ``y = sqrt(D) * H x / |x|``, H the orthonormal Hadamard matrix (its
own inverse): coordinates of a rotated vector are nearly normal, so each is rounded to the nearest
of the 8 or 16 levels that Lloyd and Max found best for a normal number. Reading it back,
``H c * |x| / |c|``, the codes' vector ``c`` is brought to the key's length ("nc"). A value is
``code * step + zero`` with the zero at its least number and the last code at its largest.

Sources: TurboQuant (ICLR 2026), DRIVE (NeurIPS 2021), Lloyd, Least Squares Quantization in PCM
(1982). Knows nothing of pages.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from vllm.v1.attention.ops.kv_formats import KVFormat, SideScales
from vllm.v1.kv_cache.declare import TURBOQUANT_BITS, turboquant_slot_bytes

__all__ = ["TURBOQUANT_FORMATS", "TurboQuantFormat", "hadamard", "levels_on", "normal_levels"]

_LARGEST_E4M3 = 448.0


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _share(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


@functools.cache
def normal_levels(bits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Levels and the thresholds between them that round a standard normal number best.

    Each level is the mean of what it stands for, each threshold halfway between two levels.
    """
    count = 1 << (bits - 1)
    # Symmetric about zero: the upper half is enough.
    levels = [3.0 * (i + 0.5) / count for i in range(count)]
    for _ in range(3000):
        edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(levels)), 40.0]
        levels = [
            (_density(a) - _density(b)) / (_share(b) - _share(a))
            for a, b in itertools.pairwise(edges)
        ]
    both = tuple(-x for x in reversed(levels)) + tuple(levels)
    return both, tuple((a + b) / 2 for a, b in itertools.pairwise(both))


@functools.cache
def levels_on(bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``normal_levels`` as float32 tensors."""
    levels, thresholds = normal_levels(bits)
    return torch.tensor(levels, device=device), torch.tensor(thresholds, device=device)


@functools.cache
def hadamard(size: int, device: torch.device) -> torch.Tensor:
    """The orthonormal Hadamard matrix, float32 ``(size, size)``; ``size`` is a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix * size**-0.5


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes ``(..., D)`` to bytes ``(..., D * bits / 8)``; D is a multiple of 8."""
    words = codes.long().unflatten(-1, (-1, 8)) << (bits * torch.arange(8, device=codes.device))
    shifts = 8 * torch.arange(bits, device=codes.device)
    return ((words.sum(-1, keepdim=True) >> shifts) & 255).flatten(-2).to(torch.uint8)


def unpack(data: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes again, int64."""
    shifts = 8 * torch.arange(bits, device=data.device)
    words = (data.long().unflatten(-1, (-1, bits)) << shifts).sum(-1, keepdim=True)
    codes = words >> (bits * torch.arange(8, device=data.device))
    return (codes & ((1 << bits) - 1)).flatten(-2)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurboQuantFormat(KVFormat):
    """One preset."""

    name: str
    key_bits: int
    value_bits: int

    @property
    def has_layer_scales(self) -> bool:
        return False

    @property
    def rotates(self) -> bool:
        """Keys are stored rotated: queries have to be, too."""
        return self.key_bits < 8

    def content_bytes(self, head_size: int) -> int:
        return turboquant_slot_bytes(self.name, head_size)

    def key_bytes(self, head_size: int) -> int:
        """Bytes of a key's data."""
        return head_size * self.key_bits // 8

    def value_at(self, head_size: int) -> int:
        """Bytes from a slot's start to the value's data."""
        return self.key_bytes(head_size) + (2 if self.rotates else 0)

    def value_scales_at(self, head_size: int) -> int:
        """Bytes from a slot's start to the value's step."""
        return self.value_at(head_size) + head_size * self.value_bits // 8

    def quantise_kv(
        self, key: torch.Tensor, value: torch.Tensor, scales: SideScales | None = None
    ) -> torch.Tensor:
        slot = torch.cat((self._key(key.float()), self._value(value.float())), dim=-1)
        spare = self.content_bytes(key.shape[-1]) - slot.shape[-1]
        return torch.nn.functional.pad(slot, (0, spare)) if spare else slot

    def _key(self, x: torch.Tensor) -> torch.Tensor:
        if not self.rotates:
            data = x.clamp(-_LARGEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn)
            return data.view(torch.uint8)
        size = x.shape[-1]
        length = x.norm(dim=-1, keepdim=True)
        turned = x @ hadamard(size, x.device)
        y = torch.where(length > 0, turned * size**0.5 / length, 0.0)
        levels, thresholds = levels_on(self.key_bits, x.device)
        codes = torch.bucketize(y, thresholds)
        found = levels[codes]
        own = (length / found.norm(dim=-1, keepdim=True)).half()
        return torch.cat((pack(codes, self.key_bits), own.view(torch.uint8)), dim=-1)

    def _value(self, x: torch.Tensor) -> torch.Tensor:
        last = (1 << self.value_bits) - 1
        zero = x.amin(dim=-1, keepdim=True)
        step = ((x.amax(dim=-1, keepdim=True) - zero) / last).half()
        zero = zero.half()
        y = torch.where(step > 0, (x - zero.float()) / step.float(), 0.0)
        codes = torch.floor(y + 0.5).clamp(0, last)
        parts = (pack(codes, self.value_bits), step.view(torch.uint8), zero.view(torch.uint8))
        return torch.cat(parts, dim=-1)

    def dequantise_kv(
        self, content: torch.Tensor, scales: SideScales | None = None
    ) -> torch.Tensor:
        content = content.view(torch.uint8)
        size = self.head_size_of(content.shape[-1])
        data = content[..., : self.key_bytes(size)]
        if self.rotates:
            levels, _ = levels_on(self.key_bits, content.device)
            own = self._halves(content, self.key_bytes(size), 1)
            turned = levels[unpack(data, self.key_bits)] * own
            key = turned @ hadamard(size, content.device)
        else:
            key = data.contiguous().view(torch.float8_e4m3fn).float()
        at, end = self.value_at(size), self.value_scales_at(size)
        step, zero = self._halves(content, end, 2).split(1, dim=-1)
        value = unpack(content[..., at:end], self.value_bits) * step + zero
        return torch.cat((key, value), dim=-1)

    @staticmethod
    def _halves(content: torch.Tensor, at: int, count: int) -> torch.Tensor:
        return content[..., at : at + 2 * count].contiguous().view(torch.float16).float()

    def head_size_of(self, content_bytes: int) -> int:
        """D of slots of so many bytes."""
        sizes = (1 << power for power in range(3, 11))
        return next(size for size in sizes if self.content_bytes(size) == content_bytes)


TURBOQUANT_FORMATS: Mapping[str, TurboQuantFormat] = MappingProxyType(
    {
        name: TurboQuantFormat(
            code=7 + index,
            dtype=torch.uint8,
            largest=_LARGEST_E4M3,
            per_token_head=True,
            name=name,
            key_bits=key_bits,
            value_bits=value_bits,
        )
        for index, (name, (key_bits, value_bits)) in enumerate(TURBOQUANT_BITS.items())
    }
)
"""By the name that ``--kv-cache-dtype`` gives them; codes 7 and up."""
