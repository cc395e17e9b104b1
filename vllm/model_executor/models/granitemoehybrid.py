"""Granite 4: Mamba 2 and attention layers, experts beside a shared MLP, a few multipliers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.distributed.communication_op import tensor_model_parallel_all_reduce
from vllm.errors import UnsupportedError
from vllm.model_executor.layers.fused_moe import FusedMoE, Routing
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.models.bamba import make_bamba_mixer
from vllm.model_executor.models.hybrid import HybridForCausalLM, add_and_norm
from vllm.model_executor.models.llama import HotModule, LlamaAttention
from vllm.model_executor.models.qwen2_moe import QWEN_MOE_CHECKPOINT_NAMES

__all__ = [
    "GraniteMoeHybridAttention",
    "GraniteMoeHybridDecoderLayer",
    "GraniteMoeHybridForCausalLM",
]


class GraniteMoeHybridAttention(LlamaAttention):
    """RoPE only where the configuration says so."""

    def make_rotary_emb(
        self, vllm_config: VllmConfig, config: Any, layer_index: int
    ) -> RotaryEmbedding | None:
        if config.position_embedding_type != "rope":
            return None
        return super().make_rotary_emb(vllm_config, config, layer_index)

    def scale(self, config: Any) -> float:
        return config.attention_multiplier


class GraniteSharedMLP(HotModule):
    """``output_linear(silu(gate) * up)``, gate and up one projection; ranks' sums are left open."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        inner = config.shared_intermediate_size
        self.input_linear = MergedColumnParallelLinear(
            config.hidden_size, [inner, inner], bias=False, prefix=f"{prefix}.input_linear"
        )
        self.output_linear = RowParallelLinear(
            inner,
            config.hidden_size,
            bias=False,
            reduce_results=False,
            prefix=f"{prefix}.output_linear",
            return_bias=False,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output_linear.forward(self.input_linear.forward_silu_and_mul(x))


class GraniteMoE(HotModule):
    """Experts weighted by a softmax over those that are chosen; ranks' sums are left open."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        self.router = ReplicatedLinear(
            config.hidden_size,
            config.num_local_experts,
            bias=False,
            prefix=f"{prefix}.router",
            return_bias=False,
        )
        self.experts = FusedMoE(
            Routing(num_experts=config.num_local_experts, top_k=config.num_experts_per_tok),
            config.hidden_size,
            config.intermediate_size,
            reduce_results=False,
            prefix=f"{prefix}.experts",
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts.forward(x, self.router.forward(x))


class GraniteMoeHybridDecoderLayer(HotModule):
    def __init__(self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str) -> None:
        super().__init__()
        if config.hidden_act != "silu":
            raise UnsupportedError(
                f"config.json: hidden_act {config.hidden_act!r} is not supported; 'silu' is",
                parameter="model",
            )
        self.self_attn: GraniteMoeHybridAttention | None = None
        self.mamba: nn.Module | None = None
        if config.layer_types[layer_index] == "full_attention":
            self.self_attn = GraniteMoeHybridAttention(
                vllm_config, config, layer_index, prefix=f"{prefix}.self_attn"
            )
        else:
            self.mamba = make_bamba_mixer(vllm_config, config, f"{prefix}.mamba")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.shared_mlp = GraniteSharedMLP(config, f"{prefix}.shared_mlp")
        self.block_sparse_moe: GraniteMoE | None = None
        if config.num_local_experts > 0:
            self.block_sparse_moe = GraniteMoE(config, f"{prefix}.block_sparse_moe")
        self.residual_multiplier = config.residual_multiplier

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The branch's output and the stream that it is still to be added to."""
        hidden_states, residual = add_and_norm(self.input_layernorm, hidden_states, residual)
        if self.mamba is not None:
            hidden_states = self.mamba.forward(hidden_states)
        else:
            assert self.self_attn is not None
            hidden_states = self.self_attn.forward(positions, hidden_states)
        hidden_states = hidden_states * self.residual_multiplier
        hidden_states, residual = self.post_attention_layernorm.forward(hidden_states, residual)
        output = self.shared_mlp.forward(hidden_states)
        if self.block_sparse_moe is not None:
            output += self.block_sparse_moe.forward(hidden_states)
        output = tensor_model_parallel_all_reduce(output)
        return output * self.residual_multiplier, residual


_STACKED = {
    "block_sparse_moe.input_linear.weight": "block_sparse_moe.experts.w13_weight",
    "block_sparse_moe.output_linear.weight": "block_sparse_moe.experts.w2_weight",
    "block_sparse_moe.router.layer.weight": "block_sparse_moe.router.weight",
}
"""Ends of names in released checkpoints -> what they are called here."""


class GraniteMoeHybridForCausalLM(HybridForCausalLM):
    layer_cls = GraniteMoeHybridDecoderLayer
    norm_name = "norm"
    checkpoint_names = QWEN_MOE_CHECKPOINT_NAMES

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.logits_processor = LogitsProcessor(
            self.config.vocab_size, scale=1 / self.config.logits_scaling
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        def renamed() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                for theirs, ours in _STACKED.items():
                    if name.endswith(theirs):
                        name = name.removesuffix(theirs) + ours
                yield name, tensor

        return super().load_weights(renamed())
