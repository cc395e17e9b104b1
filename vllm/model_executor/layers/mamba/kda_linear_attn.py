"""Kimi delta attention: a gated delta net that forgets each number of a key at a rate of its own.

Owns the layer's parameters and its two states, sharded by heads. The recurrence itself is
``vllm._linear_attention_ops.gated_delta_rule``.
"""

from __future__ import annotations

import torch
from torch import nn

from vllm import _custom_ops as ops
from vllm import _linear_attention_ops as linear_ops
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.parts import (
    CausalConv1d,
    load_rows,
    make_head_parameter,
    require_silu,
    row_shards,
)
from vllm.model_executor.layers.weight_loading import ShardId, make_parameter, set_weight_attrs
from vllm.v1.kv_cache.content import Segment
from vllm.v1.kv_cache.state_shapes import MambaStateShapeCalculator

__all__ = ["KimiDeltaAttention"]


class SeparateConv1d(CausalConv1d):
    """A convolution of several parts, for each of which checkpoints have a tensor of its own."""

    def __init__(self, segments: tuple[Segment, ...], kernel_size: int) -> None:
        super().__init__(segments, kernel_size, bias=False)
        set_weight_attrs(self.weight, {"shard_ids": tuple(range(len(segments)))})
        self.segments = segments

    def weight_loader(
        self, param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        """Take (channels, 1, taps) or (channels, taps) of one part, by its number."""
        assert isinstance(shard_id, int), "each part has a tensor of its own"
        mine = self.shards[shard_id]
        part = param.data.narrow(0, mine.start, mine.size)
        rows = loaded.squeeze(1) if loaded.dim() == 3 else loaded
        load_rows(part, rows, row_shards((self.segments[shard_id],)))


class KimiDeltaAttention(nn.Module, MambaBase):
    """Kimi delta attention (arXiv:2510.26692).

    Raises:
        ConfigError: --tensor-parallel-size does not divide the heads.
        UnsupportedError: another activation than SiLU.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        *,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        conv_kernel: int,
        rms_norm_eps: float,
        activation: str,
        prefix: str,
    ) -> None:
        super().__init__()
        require_silu(activation, "Kimi delta attention")
        shapes = MambaStateShapeCalculator.kda(
            tp_size=get_tp_group().world_size,
            num_heads=num_heads,
            head_dim=head_dim,
            num_k_heads=num_heads,
            head_k_dim=head_dim,
            conv_kernel=conv_kernel,
        )
        channels, (heads,) = shapes.segments
        inner = num_heads * head_dim
        self.head_shape = (heads.units_per_rank, head_dim)
        self.eps = rms_norm_eps
        self.qkv_proj = MergedColumnParallelLinear(
            hidden_size, [inner] * 3, bias=False, prefix=f"{prefix}.qkv_proj", return_bias=False
        )
        self.conv1d = SeparateConv1d(channels, conv_kernel)
        self.b_proj = _column(hidden_size, num_heads, f"{prefix}.b_proj")
        # The gate of the state, and that of the output, each by way of few dimensions.
        self.f_a_proj = _replicated(hidden_size, head_dim, f"{prefix}.f_a_proj")
        self.f_b_proj = _column(head_dim, inner, f"{prefix}.f_b_proj")
        self.g_a_proj = _replicated(hidden_size, head_dim, f"{prefix}.g_a_proj")
        self.g_b_proj = _column(head_dim, inner, f"{prefix}.g_b_proj")
        self.A_log = make_head_parameter(heads)
        set_weight_attrs(self.A_log, {"weight_loader": self._load_rates})
        self.rate_shards = row_shards((heads,))
        self.dt_bias = make_head_parameter(channels[0])
        self.o_norm = nn.Module()
        self.o_norm.weight = make_parameter(head_dim)
        self.norm_weight = self.o_norm.weight.data
        self.o_proj = RowParallelLinear(
            inner, hidden_size, bias=False, prefix=f"{prefix}.o_proj", return_bias=False
        )
        self.declare_states(vllm_config, prefix, shapes)

    def _load_rates(
        self, param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        """Take (1, 1, heads, 1), as checkpoints have it."""
        load_rows(param.data, loaded.flatten(), self.rate_shards)

    def process_weights_after_loading(self) -> None:
        self.rates = torch.exp(self.A_log.data)
        self.gate_biases = self.dt_bias.data.view(self.head_shape)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, hidden) -> (T, hidden)."""
        output_gate = self.g_b_proj.forward(self.g_a_proj.forward(hidden_states))
        metadata = self.state_metadata()
        if metadata is None:
            return self.o_proj.forward(torch.zeros_like(output_gate))
        channels = self.conv1d.forward(
            self.qkv_proj.forward(hidden_states), self.conv_state, metadata.segments
        )
        query, key, value = channels.unflatten(-1, (3, *self.head_shape)).unbind(1)
        gate = self.f_b_proj.forward(self.f_a_proj.forward(hidden_states))
        mixed = linear_ops.gated_delta_rule(
            query,
            key,
            value,
            gate.unflatten(-1, self.head_shape),
            self.b_proj.forward(hidden_states),
            self.rates,
            self.gate_biases,
            self.ssm_state,
            metadata.segments,
        )
        mixed = ops.rms_norm(mixed, self.norm_weight, self.eps).flatten(1)
        return self.o_proj.forward(mixed.mul_(output_gate.sigmoid_()))


def _column(inputs: int, outputs: int, prefix: str) -> ColumnParallelLinear:
    return ColumnParallelLinear(inputs, outputs, bias=False, prefix=prefix, return_bias=False)


def _replicated(inputs: int, outputs: int, prefix: str) -> ReplicatedLinear:
    return ReplicatedLinear(inputs, outputs, bias=False, prefix=prefix, return_bias=False)
