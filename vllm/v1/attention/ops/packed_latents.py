"""Latents and index keys as bytes: fp8 values with their scales beside them.

A latent of 512 is 584 bytes: 448 fp8 (e4m3) values, 64 rotated ones in bfloat16, 7 exponents (one
for each 64 fp8 values: the scale is 2^(e - 127)) and a spare byte. A key of an index of width D is
D + 4 bytes: D fp8 values and a float32 scale.
"""

from __future__ import annotations

import torch

__all__ = ["pack_index_keys", "pack_latents", "unpack_index_keys", "unpack_latents"]

_NOPE, _ROPE, _GROUP, _BYTES = 448, 64, 64, 584
_MOST = 448.0  # of e4m3


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """(..., 512) -> (..., 584) uint8."""
    groups = latents[..., :_NOPE].float().unflatten(-1, (-1, _GROUP))
    most = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    exponents = torch.log2(most / _MOST).ceil().clamp(-127, 127)
    values = (groups * torch.exp2(-exponents)).clamp(-_MOST, _MOST).to(torch.float8_e4m3fn)
    packed = latents.new_zeros((*latents.shape[:-1], _BYTES), dtype=torch.uint8)
    packed[..., :_NOPE] = values.flatten(-2).view(torch.uint8)
    rotated = latents[..., _NOPE:].to(torch.bfloat16).contiguous()
    packed[..., _NOPE : _NOPE + 2 * _ROPE] = rotated.view(torch.uint8)
    packed[..., _NOPE + 2 * _ROPE : -1] = (exponents.squeeze(-1) + 127).to(torch.uint8)
    return packed


def unpack_latents(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(..., 584) uint8 -> (..., 512)."""
    values = packed[..., :_NOPE].contiguous().view(torch.float8_e4m3fn).float()
    exponents = packed[..., _NOPE + 2 * _ROPE : -1].float() - 127
    groups = values.unflatten(-1, (-1, _GROUP)) * torch.exp2(exponents).unsqueeze(-1)
    rotated = packed[..., _NOPE : _NOPE + 2 * _ROPE].contiguous().view(torch.bfloat16)
    return torch.cat((groups.flatten(-2).to(dtype), rotated.to(dtype)), dim=-1)


def pack_index_keys(keys: torch.Tensor) -> torch.Tensor:
    """(..., D) -> (..., D + 4) uint8."""
    wide = keys.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-30) / _MOST
    values = (wide / scale).clamp(-_MOST, _MOST).to(torch.float8_e4m3fn)
    return torch.cat((values.view(torch.uint8), scale.view(torch.uint8)), dim=-1)


def unpack_index_keys(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(..., D + 4) uint8 -> (..., D)."""
    values = packed[..., :-4].contiguous().view(torch.float8_e4m3fn).float()
    scale = packed[..., -4:].contiguous().view(torch.float32)
    return (values * scale).to(dtype)
