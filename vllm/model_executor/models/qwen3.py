"""Qwen3 (dense): Llama with an RMSNorm over each head of query and key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM

__all__ = ["Qwen3Attention", "Qwen3DecoderLayer", "Qwen3ForCausalLM"]


class Qwen3Attention(LlamaAttention):
    def __init__(self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str) -> None:
        super().__init__(vllm_config, config, layer_index, prefix)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv_proj.forward(hidden_states)
        query, key, value = torch.split_with_sizes(qkv, self.split_sizes, dim=-1)
        norms = self.q_norm, self.k_norm
        output = self.attn.forward(query, key, value, None, positions, self.rotary_emb, norms)
        return self.o_proj.forward(output)

    fused_forward: ClassVar[Callable[..., torch.Tensor]] = staticmethod(forward)


class Qwen3DecoderLayer(LlamaDecoderLayer):
    attention_cls = Qwen3Attention


class Qwen3ForCausalLM(LlamaForCausalLM):
    layer_cls = Qwen3DecoderLayer
