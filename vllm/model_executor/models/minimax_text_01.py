"""MiniMax-Text-01: lightning attention with softmax attention between, experts in every layer.

What goes on beside a branch is the layer's normed input, not the sum of what came before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.mamba.linear_attn import LightningAttention
from vllm.model_executor.models.llama import HotModule, LlamaAttention, LlamaForCausalLM
from vllm.model_executor.models.mixtral import MixtralForCausalLM, MixtralMoE

__all__ = ["MiniMaxDecoderLayer", "MiniMaxForCausalLM", "MiniMaxText01ForCausalLM"]

_DERIVED = (".slope_rate", ".query_decay", ".key_decay", ".diagonal_decay")
"""Endings of buffers in a checkpoint that follow from the configuration."""


class MiniMaxDecoderLayer(HotModule):
    """Both kinds of attention are called ``self_attn``, as in checkpoints."""

    def __init__(self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn: LlamaAttention | LightningAttention
        if config.layer_types[layer_index] == "full_attention":
            self.self_attn = LlamaAttention(
                vllm_config, config, layer_index, prefix=f"{prefix}.self_attn"
            )
            factors = config.full_attn_alpha_factor, config.full_attn_beta_factor
        else:
            self.self_attn = LightningAttention(
                vllm_config,
                hidden_size=config.hidden_size,
                num_heads=config.num_attention_heads,
                head_dim=config.head_dim,
                layer_index=layer_index,
                num_layers=config.num_hidden_layers,
                activation=config.hidden_act,
                prefix=f"{prefix}.self_attn",
            )
            factors = config.linear_attn_alpha_factor, config.linear_attn_beta_factor
        self.attn_alpha, self.attn_beta = factors
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MixtralMoE(config, f"{prefix}.mlp")
        self.mlp_alpha, self.mlp_beta = config.mlp_alpha_factor, config.mlp_beta_factor

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The branch's output and what it is still to be added to, each times its factor."""
        if residual is None:
            normed = self.input_layernorm.forward(hidden_states)
        else:
            normed, _ = self.input_layernorm.forward(hidden_states, residual)
        attention = self.self_attn
        if isinstance(attention, LlamaAttention):
            branch = attention.forward(positions, normed)
        else:
            branch = attention.forward(normed)
        normed, _ = self.post_attention_layernorm.forward(
            branch.mul_(self.attn_beta), normed.mul_(self.attn_alpha)
        )
        branch = self.mlp.forward(normed)
        return branch.mul_(self.mlp_beta), normed.mul_(self.mlp_alpha)


class MiniMaxForCausalLM(LlamaForCausalLM):
    layer_cls = MiniMaxDecoderLayer
    checkpoint_names = MixtralForCausalLM.checkpoint_names
    expert_names = MixtralForCausalLM.expert_names
    renamed_parts = MixtralForCausalLM.renamed_parts

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights(item for item in weights if not item[0].endswith(_DERIVED))


class MiniMaxText01ForCausalLM(MiniMaxForCausalLM):
    """As the first release called it; its fields are brought to the later names when read."""
