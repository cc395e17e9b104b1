"""Kimi Linear (arXiv:2510.26692): Kimi delta attention, with latent attention without RoPE in every
fourth layer; experts as in DeepSeek V3.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.kda_linear_attn import KimiDeltaAttention
from vllm.model_executor.models.deepseek_v2 import DeepseekMoE, DeepseekV2Attention
from vllm.model_executor.models.hybrid import HybridDecoderLayer
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.mixtral import MixtralForCausalLM

__all__ = ["KimiLatentAttention", "KimiLinearDecoderLayer", "KimiLinearForCausalLM"]


class KimiLatentAttention(DeepseekV2Attention):
    """Positions are told by the state layers around it."""

    def make_rotary_emb(self, vllm_config: VllmConfig, config: Any) -> None:
        return None


class KimiLinearDecoderLayer(HybridDecoderLayer):
    """Both kinds of attention are called ``self_attn``, as in checkpoints."""

    attention_cls = KimiLatentAttention
    mixer_name = "self_attn"

    def make_mixer(self, vllm_config: VllmConfig, config: Any, prefix: str) -> KimiDeltaAttention:
        return KimiDeltaAttention(
            vllm_config,
            hidden_size=config.hidden_size,
            num_heads=config.linear_num_heads,
            head_dim=config.linear_head_dim,
            conv_kernel=config.linear_conv_kernel_dim,
            rms_norm_eps=config.rms_norm_eps,
            activation=config.hidden_act,
            prefix=f"{prefix}.self_attn",
        )

    def make_mlp(self, config: Any, layer_index: int, prefix: str) -> nn.Module:
        if config.mlp_layer_types[layer_index] == "sparse":
            return DeepseekMoE(config, prefix)
        return LlamaMLP(config, prefix)


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
