"""Jamba: Mamba 1 layers with an attention layer in each period, experts in every other one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import FusedMoE, Routing
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer
from vllm.model_executor.models.hybrid import (
    AttentionWithoutRope,
    HybridDecoderLayer,
    HybridForCausalLM,
)
from vllm.model_executor.models.llama import HotModule, LlamaMLP
from vllm.model_executor.models.qwen2_moe import QWEN_EXPERT_NAMES, QWEN_MOE_CHECKPOINT_NAMES

__all__ = ["JambaDecoderLayer", "JambaForCausalLM", "JambaMoE"]


class JambaMoE(HotModule):
    """Experts chosen by a softmax over all of them, their weights left as they are."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        self.router = ReplicatedLinear(
            config.hidden_size,
            config.num_experts,
            bias=False,
            prefix=f"{prefix}.router",
            return_bias=False,
        )
        self.experts = FusedMoE(
            Routing(
                num_experts=config.num_experts,
                top_k=config.num_experts_per_tok,
                renormalize=False,
            ),
            config.hidden_size,
            config.intermediate_size,
            activation=config.hidden_act,
            prefix=f"{prefix}.experts",
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts.forward(x, self.router.forward(x))


class JambaDecoderLayer(HybridDecoderLayer):
    attention_cls = AttentionWithoutRope

    @staticmethod
    def has_attention(config: Any, layer_index: int) -> bool:
        return layer_index % config.attn_layer_period == config.attn_layer_offset

    def make_mixer(self, vllm_config: VllmConfig, config: Any, prefix: str) -> MambaMixer:
        return MambaMixer(
            vllm_config,
            hidden_size=config.hidden_size,
            intermediate_size=config.mamba_expand * config.hidden_size,
            state_size=config.mamba_d_state,
            conv_kernel=config.mamba_d_conv,
            time_step_rank=config.mamba_dt_rank,
            use_conv_bias=config.mamba_conv_bias,
            use_bias=config.mamba_proj_bias,
            activation=config.hidden_act,
            norm_eps=config.rms_norm_eps,
            norm_weights=True,
            prefix=f"{prefix}.mamba",
        )

    def make_mlp(self, config: Any, layer_index: int, prefix: str) -> nn.Module:
        has_experts = layer_index % config.expert_layer_period == config.expert_layer_offset
        if has_experts and config.num_experts > 1:
            return JambaMoE(config, prefix)
        return LlamaMLP(config, prefix)


class JambaForCausalLM(HybridForCausalLM):
    layer_cls = JambaDecoderLayer
    checkpoint_names = QWEN_MOE_CHECKPOINT_NAMES
    expert_names = QWEN_EXPERT_NAMES
    renamed_parts = {"pre_ff_layernorm": "post_attention_layernorm", "feed_forward": "mlp"}
