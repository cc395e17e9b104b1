"""Gemma 3, its language model: Gemma 2 with norms over heads instead of soft caps, and a RoPE for
windowed layers and another for full ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.models.gemma2 import (
    Gemma2Attention,
    Gemma2DecoderLayer,
    Gemma2ForCausalLM,
)
from vllm.model_executor.models.weights import language_model_weights

__all__ = [
    "Gemma3Attention",
    "Gemma3DecoderLayer",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
]


class Gemma3Attention(Gemma2Attention):
    def __init__(self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str) -> None:
        super().__init__(vllm_config, config, layer_index, prefix)
        self.q_norm = GemmaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = GemmaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def make_attention(
        self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str, **options: Any
    ) -> Attention:
        return super().make_attention(
            vllm_config, config, layer_index, prefix, logits_soft_cap=None, **options
        )

    @staticmethod
    def rope_parameters(config: Any, layer_index: int) -> Mapping[str, Any]:
        return config.rope_parameters[config.layer_types[layer_index]]

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv_proj.forward(hidden_states)
        query, key, value = torch.split_with_sizes(qkv, self.split_sizes, dim=-1)
        # Views of qkv: the norms write into it.
        self.q_norm.forward_in_place(query.unflatten(-1, (self.num_heads, self.head_dim)))
        self.k_norm.forward_in_place(key.unflatten(-1, (self.num_kv_heads, self.head_dim)))
        output = self.attn.forward(query, key, value, None, positions, self.rotary_emb)
        return self.o_proj.forward(output)

    fused_forward: ClassVar[Callable[..., torch.Tensor]] = staticmethod(forward)


class Gemma3DecoderLayer(Gemma2DecoderLayer):
    attention_cls = Gemma3Attention


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    layer_cls = Gemma3DecoderLayer


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """The language model out of a checkpoint that can see; its vision tower is left out."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        left_out = ("vision_tower", "multi_modal_projector")
        return super().load_weights(language_model_weights(weights, left_out))
