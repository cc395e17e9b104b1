"""Rotary position embeddings: a table of cosines and sines per model, and how it is scaled.

``get_rope`` reads ``rope_parameters`` as transformers 5 writes it (see
``transformers_utils.hf_config`` for the older form). Formulas: RoPE arXiv:2104.09864, linear
arXiv:2306.15595, dynamic NTK and YaRN arXiv:2309.00071, llama3 as in Llama 3.1's release.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from vllm import _custom_ops as ops
from vllm.errors import ConfigError, UnsupportedError

__all__ = ["RotaryEmbedding", "get_rope"]


class RotaryEmbedding(nn.Module):
    """Rotates the first ``rotary_dim`` of each head by its token's position.

    ``cos_sin_cache`` (max_position, rotary_dim) float32 holds cosines, then sines; in a 16-bit
    dtype neighbouring positions beyond a few hundred would fall together.
    """

    cos_sin_cache: torch.Tensor

    def __init__(
        self,
        head_size: int,
        rotary_dim: int,
        max_position: int,
        is_neox_style: bool,
        inv_freq: torch.Tensor,
        attention_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.head_size = head_size
        self.rotary_dim = rotary_dim
        self.max_position = max_position
        self.is_neox_style = is_neox_style
        angles = torch.outer(torch.arange(max_position, dtype=torch.float32), inv_freq)
        table = torch.cat((angles.cos(), angles.sin()), dim=-1) * attention_factor
        self.register_buffer("cos_sin_cache", table, persistent=False)

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rotate ``query`` (T, Q * D) and ``key`` (T, K * D) in place; strided rows are fine."""
        ops.rotary_embedding(
            positions, query, key, self.head_size, self.cos_sin_cache, self.is_neox_style
        )
        return query, key

    def extra_repr(self) -> str:
        return f"rotary_dim={self.rotary_dim}, max_position={self.max_position}"


_Frequencies = tuple[torch.Tensor, float]


def _plain(base: float, dim: int) -> torch.Tensor:
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


def _default(rope: Mapping[str, Any], dim: int, max_position: int, trained: int) -> _Frequencies:
    return _plain(rope["rope_theta"], dim), 1.0


def _linear(rope: Mapping[str, Any], dim: int, max_position: int, trained: int) -> _Frequencies:
    return _plain(rope["rope_theta"], dim) / rope["factor"], 1.0


def _dynamic(rope: Mapping[str, Any], dim: int, max_position: int, trained: int) -> _Frequencies:
    """The base grows with the length served; one base for all, since keys stay in the cache."""
    factor = rope["factor"]
    growth = factor * max(max_position, trained) / trained - (factor - 1)
    return _plain(rope["rope_theta"] * growth ** (dim / (dim - 2)), dim), 1.0


def _llama3(rope: Mapping[str, Any], dim: int, max_position: int, trained: int) -> _Frequencies:
    """Long wavelengths are stretched, short ones kept, those between blended."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    inv_freq = _plain(rope["rope_theta"], dim)
    wavelength = 2 * math.pi / inv_freq
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / factor + blend * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, blended)
    return torch.where(wavelength < original / high, inv_freq, scaled), 1.0


def _yarn(rope: Mapping[str, Any], dim: int, max_position: int, trained: int) -> _Frequencies:
    """Dimensions that turn often keep their frequency, slow ones are stretched, a ramp between."""
    base, original = rope["rope_theta"], rope["original_max_position_embeddings"]
    factor = rope.get("factor") or trained / original

    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        scale, scale_all = rope.get("mscale"), rope.get("mscale_all_dim")
        attention_factor = (
            magnitude(factor, scale) / magnitude(factor, scale_all)
            if scale and scale_all
            else magnitude(factor)
        )

    def dim_of_turns(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dim_of_turns(rope.get("beta_fast") or 32)
    high = dim_of_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001  # low == high would divide by zero
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    powers = base ** (torch.arange(0, dim, 2).float() / dim)
    kept = 1 - stretched
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, float(attention_factor)


def _frequency_factors(
    rope: Mapping[str, Any], dim: int, max_position: int, trained: int
) -> _Frequencies:
    """Each frequency has its own divisor, as GGUF files of Llama 3.1 give them."""
    return _plain(rope["rope_theta"], dim) / torch.tensor(rope["factors"]), 1.0


_SCALINGS: dict[
    str, tuple[Callable[[Mapping[str, Any], int, int, int], _Frequencies], tuple[str, ...]]
] = {
    "default": (_default, ()),
    "linear": (_linear, ("factor",)),
    "dynamic": (_dynamic, ("factor",)),
    "llama3": (_llama3, ("factor", "low_freq_factor", "high_freq_factor")),
    "yarn": (_yarn, ("original_max_position_embeddings",)),
    "frequency_factors": (_frequency_factors, ("factors",)),
}
"""Scaling -> (function, keys that must be there)."""

_shared: WeakValueDictionary[str, RotaryEmbedding] = WeakValueDictionary()


def get_rope(
    head_size: int,
    max_position: int,
    is_neox_style: bool = True,
    rope_parameters: Mapping[str, Any] | None = None,
    trained_max_position: int | None = None,
) -> RotaryEmbedding:
    """The rotary embedding of a model's layers; layers that agree share one.

    Args:
        max_position: positions in the table: the longest request that is served.
        rope_parameters: transformers 5's; ``partial_rotary_factor`` of a head is rotated.
        trained_max_position: ``max_position_embeddings`` of the model (dynamic, yarn).

    Raises:
        UnsupportedError: an unknown ``rope_type``.
        ConfigError: a parameter of the scaling is missing, or an odd number of dimensions
            would be rotated.
    """
    rope = {"rope_type": "default", "rope_theta": 10000.0, **(rope_parameters or {})}
    kind = rope["rope_type"]
    if kind not in _SCALINGS:
        raise UnsupportedError(
            f"rope_type {kind!r} is not supported; these are: {', '.join(_SCALINGS)}"
        )
    scaling, needed = _SCALINGS[kind]
    missing = [key for key in needed if rope.get(key) is None]
    if missing:
        raise ConfigError(f"config.json: rope_type {kind!r} needs {', '.join(missing)}")
    rotary_dim = int(head_size * rope.get("partial_rotary_factor", 1.0))
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_size:
        raise ConfigError(
            f"config.json: {rotary_dim} dimensions of a head of {head_size} cannot be rotated: "
            "RoPE turns pairs of them"
        )
    trained = trained_max_position or max_position
    device = torch.get_default_device()
    key = json.dumps(
        [head_size, max_position, is_neox_style, rope, trained, str(device)], sort_keys=True
    )
    shared = _shared.get(key)
    if shared is None:
        # On the CPU, so that every device rotates by the same angles.
        with torch.device("cpu"):
            inv_freq, attention_factor = scaling(rope, rotary_dim, max_position, trained)
            shared = RotaryEmbedding(
                head_size, rotary_dim, max_position, is_neox_style, inv_freq, attention_factor
            )
        _shared[key] = shared.to(device)
    return shared
