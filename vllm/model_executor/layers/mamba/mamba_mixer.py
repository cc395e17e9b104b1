"""The Mamba 1 mixer: projection, convolution, selective scan, gate, projection.

Owns the layer's parameters and its two states, sharded by channels. The recurrence itself is
``vllm._state_ops.selective_scan``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from vllm import _state_ops as ops
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.parts import (
    CausalConv1d,
    SegmentedLinear,
    make_head_parameter,
    require_silu,
)
from vllm.v1.kv_cache.state_shapes import MambaStateShapeCalculator

__all__ = ["MambaMixer"]


class MambaMixer(nn.Module, MambaBase):
    """Mamba 1 (Gu and Dao 2023), with the variants of the models that use it.

    Args:
        intermediate_size: channels (I), each with a state of ``state_size`` (N).
        time_step_rank: width of the step's low-rank projection.
        norm_eps: where given, step, B and C are normed before use.
        norm_weights: those norms have weights in the checkpoint.

    Raises:
        ConfigError: --tensor-parallel-size does not divide the channels.
        UnsupportedError: another activation than SiLU.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        *,
        hidden_size: int,
        intermediate_size: int,
        state_size: int,
        conv_kernel: int,
        time_step_rank: int,
        use_conv_bias: bool,
        use_bias: bool,
        prefix: str,
        activation: str = "silu",
        norm_eps: float | None = None,
        norm_weights: bool = False,
    ) -> None:
        super().__init__()
        require_silu(activation, "a Mamba layer")
        shapes = MambaStateShapeCalculator.mamba1(
            tp_size=get_tp_group().world_size,
            intermediate_size=intermediate_size,
            state_size=state_size,
            conv_kernel=conv_kernel,
        )
        ((channels,), (states,)) = shapes.segments
        inner = channels.rows_per_rank
        self.split_sizes = [inner, inner]
        self.parameter_sizes = [time_step_rank, state_size, state_size]
        self.in_proj = SegmentedLinear(
            hidden_size,
            (channels, replace(channels, name="z")),
            bias=use_bias,
            prefix=f"{prefix}.in_proj",
        )
        self.conv1d = CausalConv1d((channels,), conv_kernel, bias=use_conv_bias)
        self.x_proj = RowParallelLinear(
            intermediate_size,
            sum(self.parameter_sizes),
            bias=False,
            prefix=f"{prefix}.x_proj",
            return_bias=False,
        )
        self.dt_proj = ColumnParallelLinear(
            time_step_rank,
            intermediate_size,
            bias=True,
            prefix=f"{prefix}.dt_proj",
            return_bias=False,
        )
        self.dt_layernorm: RMSNorm | None = None
        self.b_layernorm: RMSNorm | None = None
        self.c_layernorm: RMSNorm | None = None
        if norm_eps is not None:
            self.dt_layernorm = RMSNorm(time_step_rank, norm_eps, has_weight=norm_weights)
            self.b_layernorm = RMSNorm(state_size, norm_eps, has_weight=norm_weights)
            self.c_layernorm = RMSNorm(state_size, norm_eps, has_weight=norm_weights)
        self.A_log = make_head_parameter(states, state_size)
        self.D = make_head_parameter(states)
        self.out_proj = RowParallelLinear(
            intermediate_size,
            hidden_size,
            bias=use_bias,
            prefix=f"{prefix}.out_proj",
            return_bias=False,
        )
        self.declare_states(vllm_config, prefix, shapes)

    def process_weights_after_loading(self) -> None:
        self.decay = -torch.exp(self.A_log.data)
        self.skip = self.D.data

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, hidden) -> (T, hidden)."""
        projected = self.in_proj.forward(hidden_states)
        x, gate = torch.split_with_sizes(projected, self.split_sizes, dim=-1)
        metadata = self.state_metadata()
        if metadata is None:
            return self.out_proj.forward(torch.zeros_like(gate))
        segments = metadata.segments
        x = self.conv1d.forward(x, self.conv_state, segments)
        parameters = self.x_proj.forward(x)
        dt, b, c = torch.split_with_sizes(parameters, self.parameter_sizes, dim=-1)
        if self.dt_layernorm is not None:
            assert self.b_layernorm is not None and self.c_layernorm is not None
            dt = self.dt_layernorm.forward(dt)
            b, c = self.b_layernorm.forward(b), self.c_layernorm.forward(c)
        mixed = ops.selective_scan(
            x,
            self.dt_proj.forward(dt),
            self.decay,
            b,
            c,
            self.skip,
            gate,
            None,
            self.ssm_state,
            segments,
        )
        return self.out_proj.forward(mixed)
