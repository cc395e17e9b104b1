"""Qwen3-Next: gated delta nets, with gated attention in every fourth layer; experts everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.gdn_linear_attn import GatedDeltaNetAttention
from vllm.model_executor.models.hybrid import HybridDecoderLayer
from vllm.model_executor.models.llama import (
    HotModule,
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
)
from vllm.model_executor.models.qwen2_moe import (
    QWEN_EXPERT_NAMES,
    QWEN_MOE_CHECKPOINT_NAMES,
    QwenSparseMoE,
    is_sparse_layer,
)

__all__ = ["Qwen3NextAttention", "Qwen3NextDecoderLayer", "Qwen3NextForCausalLM"]


class Qwen3NextAttention(LlamaAttention):
    """Attention whose output is gated: the query's projection holds a gate after each head.

    Norms of heads are stored less one, and only a part of a head is rotated.
    """

    def __init__(self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str) -> None:
        HotModule.__init__(self)
        self.head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            2 * config.num_attention_heads,
            config.num_key_value_heads,
            bias=self.has_qkv_bias(config),
            prefix=f"{prefix}.qkv_proj",
            return_bias=False,
        )
        self.num_heads = self.qkv_proj.num_heads // 2
        self.num_kv_heads = self.qkv_proj.num_kv_heads
        key_size = self.num_kv_heads * self.head_dim
        self.split_sizes = [2 * self.num_heads * self.head_dim, key_size, key_size]
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=self.has_output_bias(config),
            prefix=f"{prefix}.o_proj",
            return_bias=False,
        )
        self.q_norm = GemmaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = GemmaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = self.make_rotary_emb(vllm_config, config, layer_index)
        self.attn = self.make_attention(vllm_config, config, layer_index, prefix=f"{prefix}.attn")

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv_proj.forward(hidden_states)
        query, key, value = torch.split_with_sizes(qkv, self.split_sizes, dim=-1)
        query, gate = query.unflatten(-1, (self.num_heads, 2, self.head_dim)).unbind(2)
        # Views of qkv: the norms write into it.
        self.q_norm.forward_in_place(query)
        self.k_norm.forward_in_place(key.unflatten(-1, (self.num_kv_heads, self.head_dim)))
        output = self.attn.forward(query, key, value, None, positions, self.rotary_emb)
        output.unflatten(-1, (self.num_heads, self.head_dim)).mul_(gate.sigmoid())
        return self.o_proj.forward(output)


class Qwen3NextDecoderLayer(HybridDecoderLayer):
    attention_cls = Qwen3NextAttention
    norm_cls = GemmaRMSNorm
    mixer_name = "linear_attn"

    def make_mixer(
        self, vllm_config: VllmConfig, config: Any, prefix: str
    ) -> GatedDeltaNetAttention:
        return GatedDeltaNetAttention(
            vllm_config,
            hidden_size=config.hidden_size,
            num_k_heads=config.linear_num_key_heads,
            num_v_heads=config.linear_num_value_heads,
            head_k_dim=config.linear_key_head_dim,
            head_v_dim=config.linear_value_head_dim,
            conv_kernel=config.linear_conv_kernel_dim,
            rms_norm_eps=config.rms_norm_eps,
            activation=config.hidden_act,
            prefix=f"{prefix}.linear_attn",
        )

    def make_mlp(self, config: Any, layer_index: int, prefix: str) -> nn.Module:
        if is_sparse_layer(config, layer_index):
            return QwenSparseMoE(config, prefix, config.shared_expert_intermediate_size)
        return LlamaMLP(config, prefix)


class Qwen3NextModel(LlamaModel):
    norm_cls = GemmaRMSNorm


class Qwen3NextForCausalLM(LlamaForCausalLM):
    model_cls = Qwen3NextModel
    layer_cls = Qwen3NextDecoderLayer
    checkpoint_names = {
        **QWEN_MOE_CHECKPOINT_NAMES,
        "in_proj_qkvz": ("in_proj", "qkvz"),
        "in_proj_ba": ("in_proj", "ba"),
    }
    expert_names = QWEN_EXPERT_NAMES

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """All but the layers that predict several tokens, which checkpoints bring along."""
        return super().load_weights(item for item in weights if not item[0].startswith("mtp."))
