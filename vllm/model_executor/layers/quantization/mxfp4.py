"""MXFP4 (OCP Microscaling Formats v1.0): runs of 32 weights of 4 bits with one 8-bit exponent.

========  ======================  ==========================================================
tensor    shape                   content
========  ======================  ==========================================================
blocks    (..., groups, 16)       uint8; the low half of a byte is the weight before the high's
scales    (..., groups)           uint8; a group's weights are multiplied with 2^(scale - 127)
========  ======================  ==========================================================

A weight is E2M1: sign, two bits of exponent, one of mantissa; all 16 values times any scale are
exact in bfloat16.
"""

from __future__ import annotations

import torch

from vllm.model_executor.layers.weight_loading import WeightShapeError

__all__ = ["dequantize_mxfp4"]

_GROUP_BYTES = 16
_BIAS = 127
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
_BYTES = torch.arange(256)
_PAIRS = torch.stack((_VALUES[_BYTES & 15], _VALUES[_BYTES >> 4]), dim=-1)
"""Byte -> its two weights."""


def dequantize_mxfp4(
    blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Weights (E, rows, 32 * groups) out of blocks (E, rows, groups, 16), scales (E, rows, groups).

    Raises:
        WeightShapeError: the shapes do not belong together.
    """
    if blocks.dim() != 4 or blocks.shape[-1] != _GROUP_BYTES or blocks.shape[:-1] != scales.shape:
        raise WeightShapeError(blocks.shape, (*scales.shape, _GROUP_BYTES))
    experts, rows, groups, _ = blocks.shape
    weight = torch.empty((experts, rows, groups, 2 * _GROUP_BYTES), dtype=dtype)
    for out, packed, exponents in zip(weight, blocks, scales, strict=True):
        pairs = _PAIRS.index_select(0, packed.flatten().int())
        factors = torch.ldexp(torch.ones(rows, groups), exponents.int() - _BIAS)
        out.copy_(pairs.view(out.shape).mul_(factors.unsqueeze(-1)))
    return weight.flatten(-2)
