"""Kimi Linear (arXiv:2510.26692): Kimi delta attention, with latent attention without RoPE in every
fourth layer; experts as in DeepSeek V3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.mamba.kda_linear_attn import KimiDeltaAttention
from vllm.model_executor.models.deepseek_v2 import DeepseekMoE, DeepseekV2Attention
from vllm.model_executor.models.llama import HotModule, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.mixtral import MixtralForCausalLM

__all__ = ["KimiLatentAttention", "KimiLinearDecoderLayer", "KimiLinearForCausalLM"]


class KimiLatentAttention(DeepseekV2Attention):
    """Positions are told by the state layers around it."""

    def make_rotary_emb(self, vllm_config: VllmConfig, config: Any) -> None:
        return None


class KimiLinearDecoderLayer(HotModule):
    """Both kinds of attention are called ``self_attn``, as in checkpoints."""

    def __init__(self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn: KimiLatentAttention | KimiDeltaAttention
        if config.layer_types[layer_index] == "full_attention":
            self.self_attn = KimiLatentAttention(
                vllm_config, config, layer_index, prefix=f"{prefix}.self_attn"
            )
        else:
            self.self_attn = KimiDeltaAttention(
                vllm_config,
                hidden_size=config.hidden_size,
                num_heads=config.linear_num_heads,
                head_dim=config.linear_head_dim,
                conv_kernel=config.linear_conv_kernel_dim,
                rms_norm_eps=config.rms_norm_eps,
                activation=config.hidden_act,
                prefix=f"{prefix}.self_attn",
            )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: nn.Module
        if config.mlp_layer_types[layer_index] == "sparse":
            self.mlp = DeepseekMoE(config, f"{prefix}.mlp")
        else:
            self.mlp = LlamaMLP(config, f"{prefix}.mlp")

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The branch's output and the stream that it is still to be added to."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm.forward(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm.forward(hidden_states, residual)
        attention = self.self_attn
        if isinstance(attention, KimiLatentAttention):
            hidden_states = attention.forward(positions, hidden_states)
        else:
            hidden_states = attention.forward(hidden_states)
        hidden_states, residual = self.post_attention_layernorm.forward(hidden_states, residual)
        return self.mlp.forward(hidden_states), residual


class KimiLinearForCausalLM(LlamaForCausalLM):
    layer_cls = KimiLinearDecoderLayer
    checkpoint_names = {
        **MixtralForCausalLM.checkpoint_names,
        **{f"{part}_proj": ("qkv_proj", index) for index, part in enumerate("qkv")},
        **{f"{part}_conv1d": ("conv1d", index) for index, part in enumerate("qkv")},
        "gate_proj": ("gate_up_proj", 0),
        "up_proj": ("gate_up_proj", 1),
    }
    expert_names = MixtralForCausalLM.expert_names
    renamed_parts = MixtralForCausalLM.renamed_parts
