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

__all__ = ["JambaForCausalLM", "JambaMoE"]


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


class JambaForCausalLM(HybridForCausalLM):
    checkpoint_names = QWEN_MOE_CHECKPOINT_NAMES
    expert_names = QWEN_EXPERT_NAMES

    def make_layer(
        self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str
    ) -> nn.Module:
        mixers: dict[str, nn.Module] = {}
        if layer_index % config.attn_layer_period == config.attn_layer_offset:
            mixers["self_attn"] = AttentionWithoutRope(
                vllm_config, config, layer_index, prefix=f"{prefix}.self_attn"
            )
        else:
            mixers["mamba"] = MambaMixer(
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
        name = f"{prefix}.feed_forward"
        has_experts = layer_index % config.expert_layer_period == config.expert_layer_offset
        feed_forward: nn.Module
        if has_experts and config.num_experts > 1:
            feed_forward = JambaMoE(config, name)
        else:
            feed_forward = LlamaMLP(config, name)
        return HybridDecoderLayer(config, feed_forward=feed_forward, **mixers)
