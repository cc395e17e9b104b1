"""LFM2: short convolutions with attention in some layers; LFM2-MoE has experts in most of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import FusedMoE, Routing
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.mamba.short_conv import ShortConv
from vllm.model_executor.layers.weight_loading import make_parameter
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


class Lfm2DecoderLayer(HotModule):
    """A short convolution or attention, then an MLP or experts; names are the checkpoints'."""

    def __init__(self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str) -> None:
        super().__init__()
        self.operator_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attends = config.layer_types[layer_index] == "full_attention"
        if self.attends:
            self.self_attn = Qwen3Attention(
                vllm_config, config, layer_index, prefix=f"{prefix}.self_attn"
            )
        else:
            self.conv = ShortConv(
                vllm_config,
                hidden_size=config.hidden_size,
                intermediate_size=config.hidden_size,
                conv_kernel=config.conv_L_cache,
                bias=config.conv_bias,
                prefix=f"{prefix}.short_conv",
            )
        self.ffn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.feed_forward = self.make_feed_forward(config, layer_index, f"{prefix}.feed_forward")

    def make_feed_forward(self, config: Any, layer_index: int, prefix: str) -> nn.Module:
        return LlamaMLP(config, prefix, inner_size(config))

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The branch's output and the stream that it is still to be added to."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.operator_norm.forward(hidden_states)
        else:
            hidden_states, residual = self.operator_norm.forward(hidden_states, residual)
        if self.attends:
            hidden_states = self.self_attn.forward(positions, hidden_states)
        else:
            hidden_states = self.conv.forward(hidden_states)
        hidden_states, residual = self.ffn_norm.forward(hidden_states, residual)
        return self.feed_forward.forward(hidden_states), residual


class Lfm2MoeDecoderLayer(Lfm2DecoderLayer):
    """The first layers are dense."""

    def make_feed_forward(self, config: Any, layer_index: int, prefix: str) -> nn.Module:
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
        "k_layernorm": "k_norm",
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
