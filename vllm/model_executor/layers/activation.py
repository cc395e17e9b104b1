"""Activation functions of gated MLPs."""

import torch
from torch import nn

from vllm import _custom_ops as ops

__all__ = ["SiluAndMul"]


class SiluAndMul(nn.Module):
    """``silu(first half) * second half``: (..., 2 * i) -> (..., i)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.silu_and_mul(x)
