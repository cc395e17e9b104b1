"""Lightning attention as in MiniMax-Text-01: a matrix a head that forgets at a fixed rate.

Owns the layer's parameters and its state, sharded by heads. The recurrence itself is
``vllm._linear_attention_ops.lightning_attention``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vllm import _custom_ops as ops
from vllm import _linear_attention_ops as linear_ops
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.parts import load_rows, require_silu, row_shards
from vllm.model_executor.layers.weight_loading import ShardId, make_parameter
from vllm.v1.kv_cache.content import Segment
from vllm.v1.kv_cache.state_shapes import MambaStateShapeCalculator

__all__ = ["LightningAttention", "lightning_rates"]


def lightning_rates(num_heads: int, layer_index: int, num_layers: int) -> torch.Tensor:
    """Rates (heads,) at which the heads of a layer forget, float32.

    ``2^(-8 (h + 1) / heads)``, times a factor that falls to nearly nothing in the last layer
    (arXiv:2501.08313, section 2.2).
    """
    base = 2.0 ** (-8.0 / num_heads)
    rates = base ** torch.arange(1, num_heads + 1, dtype=torch.float32)
    return rates * (1 - layer_index / (num_layers - 1 + 1e-5) + 1e-5)


class NormOverHeads(nn.Module):
    """RMSNorm over the heads of all ranks."""

    def __init__(self, part: Segment, eps: float) -> None:
        super().__init__()
        self.shards = row_shards((part,))
        self.weight = make_parameter(part.rows_per_rank, weight_loader=self.weight_loader)
        self.size = part.units * part.rows
        self.eps = eps
        self.tp = get_tp_group()

    def weight_loader(
        self, param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        load_rows(param.data, loaded, self.shards)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, channels of this rank) -> the same."""
        if self.tp.world_size == 1:
            return ops.rms_norm(x, self.weight.data, self.eps)
        wide = x.float()
        total = self.tp.all_reduce(wide.square().sum(-1, keepdim=True))
        wide = wide * torch.rsqrt(total / self.size + self.eps) * self.weight.data.float()
        return wide.to(x.dtype)


class LightningAttention(nn.Module, MambaBase):
    """``out_proj(norm(attention(silu(qkv_proj(x)))) * sigmoid(output_gate(x)))``.

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
        layer_index: int,
        num_layers: int,
        activation: str,
        prefix: str,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        require_silu(activation, "lightning attention")
        tp = get_tp_group()
        shapes = MambaStateShapeCalculator.linear_attention(
            tp_size=tp.world_size, num_heads=num_heads, head_dim=head_dim
        )
        ((heads,),) = shapes.segments
        self.num_heads, self.head_dim = heads.units_per_rank, head_dim
        channels = Segment(
            name="out", units=num_heads, rows=head_dim, units_per_rank=heads.units_per_rank
        )
        inner = num_heads * head_dim
        # A head's rows of query, key and value are together: they need no parts of their own.
        self.qkv_proj = ColumnParallelLinear(
            hidden_size, 3 * inner, bias=False, prefix=f"{prefix}.qkv_proj", return_bias=False
        )
        self.output_gate = ColumnParallelLinear(
            hidden_size, inner, bias=False, prefix=f"{prefix}.output_gate", return_bias=False
        )
        self.norm = NormOverHeads(channels, norm_eps)
        self.out_proj = RowParallelLinear(
            inner, hidden_size, bias=False, prefix=f"{prefix}.out_proj", return_bias=False
        )
        rates = lightning_rates(num_heads, layer_index, num_layers)
        first = tp.rank_in_group * self.num_heads
        self.rates = rates[first : first + self.num_heads].contiguous()
        self.declare_states(vllm_config, prefix, shapes)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, hidden) -> (T, hidden)."""
        metadata = self.state_metadata()
        gate = self.output_gate.forward(hidden_states)
        if metadata is None:
            mixed = torch.zeros_like(gate)
        else:
            qkv = F.silu(self.qkv_proj.forward(hidden_states), inplace=True)
            query, key, value = qkv.unflatten(-1, (self.num_heads, 3, self.head_dim)).unbind(2)
            mixed = linear_ops.lightning_attention(
                query, key, value, self.rates, self.ssm_state, metadata.segments
            ).flatten(1)
        return self.out_proj.forward(self.norm.forward(mixed).mul_(gate.sigmoid_()))
