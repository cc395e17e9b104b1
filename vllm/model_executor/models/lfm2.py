"""LFM2: short convolutions with attention in some layers; LFM2-MoE has experts in most of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import FusedMoE, Routing
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.mamba.short_conv import ShortConv
from vllm.model_executor.layers.weight_loading import make_parameter
from vllm.model_executor.models.hybrid import HybridDecoderLayer
from vllm.model_executor.models.llama import HotModule, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.qwen3 import Qwen3Attention

__all__ = ["Lfm2DecoderLayer", "Lfm2ForCausalLM", "Lfm2MoeForCausalLM", "inner_size"]


def inner_size(config: Any) -> int:
    """Inner size of the MLPs: as configured, or two thirds of it, rounded up to a multiple."""
    size: int = config.intermediate_size
    if not config.block_auto_adjust_ff_dim:
        return size
    size = 2 * size // 3
    if config.block_ffn_dim_multiplier is None:
        return size
    size = int(config.block_ffn_dim_multiplier * size)
    multiple = config.block_multiple_of
    return -(-size // multiple) * multiple


class Lfm2MoE(HotModule):
    """Experts chosen by sigmoid scores, to which a bias is added for the choice alone."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        self.gate = ReplicatedLinear(
            config.hidden_size,
            config.num_experts,
            bias=False,
            prefix=f"{prefix}.gate",
            return_bias=False,
        )
        if config.use_expert_bias:
            self.expert_bias = make_parameter(config.num_experts, dtype=torch.float32)
        self.experts = FusedMoE(
            Routing(
                num_experts=config.num_experts,
                top_k=config.num_experts_per_tok,
                renormalize=config.norm_topk_prob,
                scoring_func="sigmoid",
                routed_scaling_factor=config.routed_scaling_factor,
            ),
            config.hidden_size,
            config.moe_intermediate_size,
            correction_bias=self.expert_bias.data if config.use_expert_bias else None,
            prefix=f"{prefix}.experts",
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts.forward(x, self.gate.forward(x))


class Lfm2DecoderLayer(HybridDecoderLayer):
    attention_cls = Qwen3Attention
    mixer_name = "conv"

    def make_mixer(self, vllm_config: VllmConfig, config: Any, prefix: str) -> ShortConv:
        return ShortConv(
            vllm_config,
            hidden_size=config.hidden_size,
            intermediate_size=config.hidden_size,
            conv_kernel=config.conv_L_cache,
            bias=config.conv_bias,
            prefix=f"{prefix}.short_conv",
        )

    def make_mlp(self, config: Any, layer_index: int, prefix: str) -> nn.Module:
        return LlamaMLP(config, prefix, inner_size(config))


class Lfm2MoeDecoderLayer(Lfm2DecoderLayer):
    """The first layers are dense."""

    def make_mlp(self, config: Any, layer_index: int, prefix: str) -> nn.Module:
        if layer_index < config.num_dense_layers:
            return LlamaMLP(config, prefix)
        return Lfm2MoE(config, prefix)


class Lfm2ForCausalLM(LlamaForCausalLM):
    layer_cls = Lfm2DecoderLayer
    checkpoint_names = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "w1": ("gate_up_proj", 0),
        "w3": ("gate_up_proj", 1),
        "w2": ("down_proj", None),
    }
    renamed_parts = {
        "embedding_norm": "norm",
        "feed_forward": "mlp",
        "ffn_norm": "post_attention_layernorm",
        "k_layernorm": "k_norm",
        "operator_norm": "input_layernorm",
        "out_proj": "o_proj",
        "q_layernorm": "q_norm",
    }


class Lfm2MoeForCausalLM(Lfm2ForCausalLM):
    layer_cls = Lfm2MoeDecoderLayer
    checkpoint_names = {
        **Lfm2ForCausalLM.checkpoint_names,
        "gate_up_proj": ("w13_weight", None),
        "down_proj": ("w2_weight", None),
    }
    expert_names = {"w1": ("w13", "gate"), "w3": ("w13", "up"), "w2": ("w2", "down")}
