"""RMSNorm, alone or fused with the residual sum before it; Gemma's form of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm import _custom_ops as ops
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.weight_loading import make_parameter

__all__ = ["GemmaRMSNorm", "RMSNorm"]


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dim, in fp32 inside.

    Args:
        has_weight: False for a weight of ones that no checkpoint holds.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        dtype: torch.dtype | None = None,
        has_weight: bool = True,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.variance_epsilon = eps
        weight = make_parameter(hidden_size, dtype=dtype)
        nn.init.ones_(weight)
        self.register_parameter("weight", weight if has_weight else None)
        self.weight_data = weight.data
        self.sums_ranks = False
        """Before it is added to a residual, ``x`` is summed over the tensor-parallel ranks: the
        layer that makes it leaves that to this one."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """The norm of ``x`` (..., h); with ``residual`` (T, h): (norm of the sum, the sum).

        The second form writes both results over its inputs.
        """
        if residual is None:
            return ops.rms_norm(x, self.weight_data, self.variance_epsilon)
        if self.sums_ranks:
            group = get_tp_group()
            if group.add_rms_norm(x, residual, self.weight_data, self.variance_epsilon):
                return x, residual
            x = group.all_reduce(x)
        ops.fused_add_rms_norm(x, residual, self.weight_data, self.variance_epsilon)
        return x, residual

    def forward_in_place(self, x: torch.Tensor) -> None:
        """Write the norm over ``x`` (..., h), which may be a strided view."""
        ops.rms_norm(x, self.weight_data, self.variance_epsilon, out=x)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, eps={self.variance_epsilon}"


class GemmaRMSNorm(RMSNorm):
    """An RMSNorm whose weight is stored less one: ``... * (1 + weight)``.

    The sum is kept in float32, where 16 bits would round small weights away.
    """

    def __init__(
        self, hidden_size: int, eps: float = 1e-6, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(hidden_size, eps, dtype)
        self.weight_data.zero_()
        self.process_weights_after_loading()

    def process_weights_after_loading(self) -> None:
        assert self.weight is not None
        self.weight_data = self.weight.data.float() + 1
