"""A short convolution between two gates, as LFM2 has it: its state is the last few tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.parts import CausalConv1d, SegmentedLinear
from vllm.v1.kv_cache.state_shapes import MambaStateShapeCalculator

__all__ = ["ShortConv"]


class ShortConv(nn.Module, MambaBase):
    """``out_proj(C * conv(B * x))``, with B, C and x projected from the input.

    Args:
        intermediate_size: channels of the convolution.
        conv_kernel: taps, the token's own included.

    Raises:
        ConfigError: --tensor-parallel-size does not divide the channels.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        *,
        hidden_size: int,
        intermediate_size: int,
        conv_kernel: int,
        bias: bool,
        prefix: str,
    ) -> None:
        super().__init__()
        shapes = MambaStateShapeCalculator.short_conv(
            tp_size=get_tp_group().world_size,
            intermediate_size=intermediate_size,
            conv_kernel=conv_kernel,
        )
        ((channels,),) = shapes.segments
        gates = replace(channels, name="B"), replace(channels, name="C")
        self.in_proj = SegmentedLinear(
            hidden_size, (*gates, channels), bias=bias, prefix=f"{prefix}.in_proj"
        )
        self.conv = CausalConv1d((channels,), conv_kernel, bias=bias, activation=None)
        self.out_proj = RowParallelLinear(
            intermediate_size,
            hidden_size,
            bias=bias,
            prefix=f"{prefix}.out_proj",
            return_bias=False,
        )
        self.declare_states(vllm_config, prefix, shapes)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, hidden) -> (T, hidden)."""
        before, after, x = self.in_proj.forward(hidden_states).chunk(3, dim=-1)
        metadata = self.state_metadata()
        if metadata is None:
            mixed = torch.zeros_like(x)
        else:
            mixed = self.conv.forward(before * x, self.conv_state, metadata.segments)
        return self.out_proj.forward(mixed.mul_(after))
