"""Mixtral: Llama whose MLPs are mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch

from vllm.model_executor.layers.fused_moe import FusedMoE, Routing
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.llama import HotModule, LlamaDecoderLayer, LlamaForCausalLM

__all__ = ["MixtralDecoderLayer", "MixtralForCausalLM", "MixtralMoE"]


class MixtralMoE(HotModule):
    """Experts chosen by a softmax over all of them, their weights brought to a sum of one."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        self.gate = ReplicatedLinear(
            config.hidden_size,
            config.num_local_experts,
            bias=False,
            prefix=f"{prefix}.gate",
            return_bias=False,
        )
        self.experts = FusedMoE(
            Routing(num_experts=config.num_local_experts, top_k=config.num_experts_per_tok),
            config.hidden_size,
            config.intermediate_size,
            activation=config.hidden_act,
            prefix=f"{prefix}.experts",
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts.forward(x, self.gate.forward(x))


class MixtralDecoderLayer(LlamaDecoderLayer):
    def make_mlp(self, config: Any, layer_index: int, prefix: str) -> MixtralMoE:
        return MixtralMoE(config, prefix)


class MixtralForCausalLM(LlamaForCausalLM):
    layer_cls = MixtralDecoderLayer
    checkpoint_names = {
        **LlamaForCausalLM.checkpoint_names,
        "gate_up_proj": ("w13_weight", None),
        "down_proj": ("w2_weight", None),
    }
    expert_names = {"w1": ("w13", "gate"), "w3": ("w13", "up"), "w2": ("w2", "down")}
    renamed_parts = {"block_sparse_moe": "mlp"}
