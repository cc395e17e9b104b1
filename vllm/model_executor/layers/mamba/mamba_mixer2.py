"""The Mamba 2 mixer: projection, convolution, state space duality, gated norm, projection.

Owns the layer's parameters and its two states, sharded by heads. The recurrence itself is
``vllm._state_ops.ssd_scan``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vllm import _state_ops as ops
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.parts import (
    CausalConv1d,
    GatedRMSNorm,
    SegmentedLinear,
    make_head_parameter,
    require_silu,
)
from vllm.v1.kv_cache.content import Segment
from vllm.v1.kv_cache.state_shapes import MambaStateShapeCalculator

__all__ = ["MambaMixer2"]


class MambaMixer2(nn.Module, MambaBase):
    """Mamba 2 (Dao and Gu 2024), with the variants of the models that use it.

    Args:
        intermediate_size: ``num_heads * head_dim``.
        n_groups: groups of heads that share B and C.
        use_bias, use_out_bias: of the projections in and out.
        use_rms_norm: norm the gated output; else it is only gated.
        norm_groups: groups that are normed by themselves; None for ``n_groups``.
        time_step_limit: bounds of the step after softplus.
        multipliers: factors of z, x, B, C and dt after the projection; None for none.

    Raises:
        ConfigError: --tensor-parallel-size does not fit the heads or the groups.
        UnsupportedError: another activation than SiLU.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        head_dim: int,
        n_groups: int,
        state_size: int,
        conv_kernel: int,
        use_conv_bias: bool,
        use_bias: bool,
        prefix: str,
        use_out_bias: bool | None = None,
        activation: str = "silu",
        rms_norm_eps: float = 1e-5,
        use_rms_norm: bool = True,
        norm_before_gate: bool = False,
        norm_groups: int | None = None,
        time_step_limit: Sequence[float] = (0.0, float("inf")),
        multipliers: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        require_silu(activation, "a Mamba layer", names=("silu", "swish"))
        shapes = MambaStateShapeCalculator.mamba2(
            tp_size=get_tp_group().world_size,
            intermediate_size=intermediate_size,
            n_groups=n_groups,
            num_heads=num_heads,
            head_dim=head_dim,
            state_size=state_size,
            conv_kernel=conv_kernel,
        )
        channels, (heads,) = shapes.segments
        self.head_dim, self.state_size = head_dim, state_size
        self.num_heads = heads.units_per_rank
        self.num_groups = channels[1].units_per_rank
        inner = channels[0].rows_per_rank
        self.inner_size = inner
        group = self.num_groups * state_size
        self.channel_sizes = [inner, group, group]
        self.split_sizes = [inner, inner + 2 * group, self.num_heads]
        gate = Segment(
            name="z",
            units=channels[0].units,
            rows=channels[0].rows,
            units_per_rank=channels[0].units_per_rank,
        )
        self.in_proj = SegmentedLinear(
            hidden_size, (gate, *channels, heads), bias=use_bias, prefix=f"{prefix}.in_proj"
        )
        self.conv1d = CausalConv1d(channels, conv_kernel, bias=use_conv_bias)
        self.A_log = make_head_parameter(heads)
        self.D = make_head_parameter(heads)
        self.dt_bias = make_head_parameter(heads)
        self.time_step_limit = (float(time_step_limit[0]), float(time_step_limit[1]))
        self.norm: GatedRMSNorm | None = None
        if use_rms_norm:
            self.norm = GatedRMSNorm(
                gate, norm_groups or n_groups, rms_norm_eps, norm_before_gate=norm_before_gate
            )
        self.out_proj = RowParallelLinear(
            intermediate_size,
            hidden_size,
            bias=use_bias if use_out_bias is None else use_out_bias,
            prefix=f"{prefix}.out_proj",
            return_bias=False,
        )
        self.multipliers: torch.Tensor | None = None
        if multipliers is not None and any(factor != 1.0 for factor in multipliers):
            sizes = (inner, inner, group, group, self.num_heads)
            self.multipliers = torch.cat(
                [
                    torch.full((size,), factor, dtype=torch.float32)
                    for size, factor in zip(sizes, multipliers, strict=True)
                ]
            )
        self.declare_states(vllm_config, prefix, shapes)

    def process_weights_after_loading(self) -> None:
        self.decay = -torch.exp(self.A_log.data)
        self.skip, self.step_bias = self.D.data, self.dt_bias.data

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, hidden) -> (T, hidden)."""
        projected = self.in_proj.forward(hidden_states)
        if self.multipliers is not None:
            projected *= self.multipliers
        gate, channels, dt = torch.split_with_sizes(projected, self.split_sizes, dim=-1)
        metadata = self.state_metadata()
        if metadata is None:
            mixed = torch.zeros_like(gate)
        else:
            segments = metadata.segments
            channels = self.conv1d.forward(channels, self.conv_state, segments)
            x, b, c = torch.split_with_sizes(channels, self.channel_sizes, dim=-1)
            mixed = ops.ssd_scan(
                x.unflatten(-1, (self.num_heads, self.head_dim)),
                dt,
                self.decay,
                b.unflatten(-1, (self.num_groups, self.state_size)),
                c.unflatten(-1, (self.num_groups, self.state_size)),
                self.skip,
                self.step_bias,
                self.time_step_limit,
                self.ssm_state,
                segments,
            ).flatten(1)
        if self.norm is not None:
            mixed = self.norm.forward(mixed, gate)
        else:
            mixed = mixed * nn.functional.silu(gate)
        return self.out_proj.forward(mixed)
