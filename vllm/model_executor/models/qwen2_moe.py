"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): Qwen2 with experts, one of which sees every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm.distributed.communication_op import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.fused_moe import FusedMoE, Routing
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.llama import (
    HotModule,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
)
from vllm.model_executor.models.qwen2 import Qwen2Attention

__all__ = [
    "QWEN_EXPERT_NAMES",
    "QWEN_MOE_CHECKPOINT_NAMES",
    "Qwen2MoeAttention",
    "Qwen2MoeDecoderLayer",
    "Qwen2MoeForCausalLM",
    "QwenSparseMoE",
    "is_sparse_layer",
]

QWEN_EXPERT_NAMES = {
    "gate_proj": ("w13", "gate"),
    "up_proj": ("w13", "up"),
    "down_proj": ("w2", "down"),
}
QWEN_MOE_CHECKPOINT_NAMES = {
    **LlamaForCausalLM.checkpoint_names,
    "gate_up_proj": ("w13_weight", None),
    "down_proj": ("w2_weight", None),
}


def is_sparse_layer(config: Any, layer_index: int) -> bool:
    """The layer has experts; else it has a dense MLP."""
    if layer_index in config.mlp_only_layers or config.num_experts == 0:
        return False
    return (layer_index + 1) % config.decoder_sparse_step == 0


class QwenSparseMoE(HotModule):
    """Routed experts, and a shared one behind a gate where ``shared_size`` is not 0."""

    def __init__(self, config: Any, prefix: str, shared_size: int = 0) -> None:
        super().__init__()
        self.gate = ReplicatedLinear(
            config.hidden_size,
            config.num_experts,
            bias=False,
            prefix=f"{prefix}.gate",
            return_bias=False,
        )
        self.experts = FusedMoE(
            Routing(
                num_experts=config.num_experts,
                top_k=config.num_experts_per_tok,
                renormalize=config.norm_topk_prob,
            ),
            config.hidden_size,
            config.moe_intermediate_size,
            activation=config.hidden_act,
            reduce_results=False,
            prefix=f"{prefix}.experts",
        )
        self.has_shared_expert = shared_size > 0
        if self.has_shared_expert:
            self.shared_expert = LlamaMLP(
                config, f"{prefix}.shared_expert", shared_size, reduce_results=False
            )
            self.shared_expert_gate = ReplicatedLinear(
                config.hidden_size,
                1,
                bias=False,
                prefix=f"{prefix}.shared_expert_gate",
                return_bias=False,
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.experts.forward(x, self.gate.forward(x))
        if self.has_shared_expert:
            shared = self.shared_expert.forward(x)
            output.add_(shared.mul_(self.shared_expert_gate.forward(x).sigmoid_()))
        return tensor_model_parallel_all_reduce(output)


class Qwen2MoeAttention(Qwen2Attention):
    @staticmethod
    def has_qkv_bias(config: Any) -> bool:
        return config.qkv_bias


class Qwen2MoeDecoderLayer(LlamaDecoderLayer):
    attention_cls = Qwen2MoeAttention

    def make_mlp(self, config: Any, layer_index: int, prefix: str) -> nn.Module:
        if not is_sparse_layer(config, layer_index):
            return super().make_mlp(config, layer_index, prefix)
        return QwenSparseMoE(config, prefix, config.shared_expert_intermediate_size)


class Qwen2MoeForCausalLM(LlamaForCausalLM):
    layer_cls = Qwen2MoeDecoderLayer
    checkpoint_names = QWEN_MOE_CHECKPOINT_NAMES
    expert_names = QWEN_EXPERT_NAMES
