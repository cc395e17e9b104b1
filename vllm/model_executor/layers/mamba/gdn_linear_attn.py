"""Gated delta net: projection, convolution, gated delta rule, gated norm, projection.

Owns the layer's parameters and its two states, sharded by key heads with the value heads that they
serve. The recurrence itself is ``vllm._linear_attention_ops.gated_delta_rule``.
"""

from __future__ import annotations

import torch
from torch import nn

from vllm import _linear_attention_ops as linear_ops
from vllm import _state_ops as state_ops
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.parts import (
    CausalConv1d,
    make_head_parameter,
    require_silu,
    row_shards,
)
from vllm.model_executor.layers.weight_loading import (
    ShardId,
    WeightShapeError,
    copy_weight,
    make_parameter,
    set_weight_attrs,
)
from vllm.v1.kv_cache.content import Segment
from vllm.v1.kv_cache.state_shapes import MambaStateShapeCalculator

__all__ = ["GatedDeltaNetAttention"]


class GatedDeltaProjection(ColumnParallelLinear):
    """Q, K, V, Z, beta and the gate as one product, each part's heads side by side.

    Shards are those of checkpoints: "qkvz" and "ba", in which a key head's rows of all parts are
    together.
    """

    def __init__(
        self,
        hidden_size: int,
        conv_segments: tuple[Segment, ...],
        value_heads: Segment,
        prefix: str,
    ) -> None:
        query, _, value = conv_segments
        shards = row_shards((*conv_segments, value, value_heads, value_heads))
        super().__init__(
            hidden_size,
            sum(shard.full_size for shard in shards),
            bias=False,
            prefix=prefix,
            return_bias=False,
            shards=shards,
        )
        set_weight_attrs(self.weight, {"shard_ids": ("qkvz", "ba")})
        self.num_key_heads = query.units
        self.split_sizes = [
            sum(shard.size for shard in shards[:3]),
            *(shard.size for shard in shards[3:]),
        ]

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        shards = self.shards[:4] if shard_id == "qkvz" else self.shards[4:]
        whole = (sum(shard.full_size for shard in shards), self.input_size)
        if tuple(loaded_weight.shape) != whole:
            raise WeightShapeError(loaded_weight.shape, whole)
        tp = get_tp_group()
        local = self.num_key_heads // tp.world_size
        heads = loaded_weight.unflatten(0, (self.num_key_heads, -1))
        mine = heads.narrow(0, tp.rank_in_group * local, local)
        parts = mine.split([shard.full_size // self.num_key_heads for shard in shards], dim=1)
        for shard, part in zip(shards, parts, strict=True):
            copy_weight(param.data.narrow(0, shard.start, shard.size), part.flatten(0, 1))


class GatedHeadNorm(nn.Module):
    """``rms_norm(x) * weight * silu(gate)`` of each head; heads share the weight."""

    def __init__(self, head_size: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.weight = make_parameter(head_size, dtype=torch.float32)
        self.num_heads = num_heads
        self.eps = eps

    def process_weights_after_loading(self) -> None:
        self.weight_data = self.weight.data.repeat(self.num_heads)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """(T, heads * size) and its gate -> the same."""
        return state_ops.gated_rms_norm(
            x, gate, self.weight_data, self.eps, self.num_heads, norm_before_gate=True
        )


class GatedDeltaNetAttention(nn.Module, MambaBase):
    """Gated delta net (Yang, Kautz and Hatamizadeh 2024) as in Qwen3-Next.

    Args:
        num_k_heads: heads of queries and keys; a multiple of them are heads of values.

    Raises:
        ConfigError: --tensor-parallel-size does not divide the heads.
        UnsupportedError: another activation than SiLU.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        *,
        hidden_size: int,
        num_k_heads: int,
        num_v_heads: int,
        head_k_dim: int,
        head_v_dim: int,
        conv_kernel: int,
        rms_norm_eps: float,
        activation: str,
        prefix: str,
    ) -> None:
        super().__init__()
        require_silu(activation, "a gated delta net")
        shapes = MambaStateShapeCalculator.gdn_attention(
            tp_size=get_tp_group().world_size,
            num_k_heads=num_k_heads,
            num_v_heads=num_v_heads,
            head_k_dim=head_k_dim,
            head_v_dim=head_v_dim,
            conv_kernel=conv_kernel,
        )
        channels, (heads,) = shapes.segments
        self.key_shape = (channels[0].units_per_rank, head_k_dim)
        self.value_shape = (heads.units_per_rank, head_v_dim)
        self.in_proj = GatedDeltaProjection(hidden_size, channels, heads, f"{prefix}.in_proj")
        self.split_sizes = self.in_proj.split_sizes
        self.channel_sizes = [part.rows_per_rank for part in channels]
        self.conv1d = CausalConv1d(channels, conv_kernel, bias=False)
        self.A_log = make_head_parameter(heads)
        self.dt_bias = make_head_parameter(heads)
        self.norm = GatedHeadNorm(head_v_dim, heads.units_per_rank, rms_norm_eps)
        self.out_proj = RowParallelLinear(
            num_v_heads * head_v_dim,
            hidden_size,
            bias=False,
            prefix=f"{prefix}.out_proj",
            return_bias=False,
        )
        self.declare_states(vllm_config, prefix, shapes)

    def process_weights_after_loading(self) -> None:
        self.rates = torch.exp(self.A_log.data)
        self.gate_bias = self.dt_bias.data

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, hidden) -> (T, hidden)."""
        projected = self.in_proj.forward(hidden_states)
        channels, z, beta, gate = torch.split_with_sizes(projected, self.split_sizes, dim=-1)
        metadata = self.state_metadata()
        if metadata is None:
            mixed = torch.zeros_like(z)
        else:
            channels = self.conv1d.forward(channels, self.conv_state, metadata.segments)
            query, key, value = torch.split_with_sizes(channels, self.channel_sizes, dim=-1)
            mixed = linear_ops.gated_delta_rule(
                query.unflatten(-1, self.key_shape),
                key.unflatten(-1, self.key_shape),
                value.unflatten(-1, self.value_shape),
                gate,
                beta,
                self.rates,
                self.gate_bias,
                self.ssm_state,
                metadata.segments,
            ).flatten(1)
        return self.out_proj.forward(self.norm.forward(mixed, z))
