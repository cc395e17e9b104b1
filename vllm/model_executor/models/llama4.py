"""Llama 4, its language model: attention within chunks, with layers between that have no RoPE and
see everything; experts beside a shared one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.distributed.communication_op import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention
from vllm.model_executor.layers.fused_moe import FusedMoE, Routing
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.models.llama import (
    HotModule,
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
)
from vllm.model_executor.models.weights import language_model_weights

__all__ = [
    "Llama4Attention",
    "Llama4DecoderLayer",
    "Llama4ForCausalLM",
    "Llama4ForConditionalGeneration",
    "Llama4MoE",
]


class Llama4Attention(LlamaAttention):
    """With RoPE, then each head brought to unit mean square; or without, and queries that grow
    with their position: by ``1 + attn_scale * log(1 + floor((position + 1) / floor_scale))``.
    """

    is_neox_style = False

    def __init__(self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str) -> None:
        super().__init__(vllm_config, config, layer_index, prefix)
        self.normalizes_heads = self.rotary_emb is not None and config.use_qk_norm
        self.head_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps, has_weight=False)
        self.tunes_temperature = self.rotary_emb is None and config.attn_temperature_tuning
        self.attn_scale, self.floor_scale = config.attn_scale, config.floor_scale

    def make_rotary_emb(
        self, vllm_config: VllmConfig, config: Any, layer_index: int
    ) -> RotaryEmbedding | None:
        if not config.no_rope_layers[layer_index]:
            return None
        return super().make_rotary_emb(vllm_config, config, layer_index)

    @staticmethod
    def attention_layer(config: Any, layer_index: int) -> Callable[..., Attention]:
        chunk_size = config.attention_chunk_size
        if config.layer_types[layer_index] != "chunked_attention" or chunk_size is None:
            return Attention
        return functools.partial(ChunkedLocalAttention, attention_chunk_size=chunk_size)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv_proj.forward(hidden_states)
        query, key, value = torch.split_with_sizes(qkv, self.split_sizes, dim=-1)
        # Views of qkv: all of this writes into it.
        if self.rotary_emb is not None:
            self.rotary_emb.forward(positions, query, key)
        if self.normalizes_heads:
            self.head_norm.forward_in_place(query.unflatten(-1, (self.num_heads, self.head_dim)))
            self.head_norm.forward_in_place(key.unflatten(-1, (self.num_kv_heads, self.head_dim)))
        if self.tunes_temperature:
            steps = ((positions + 1) / self.floor_scale).floor_()
            query.mul_(steps.log1p_().mul_(self.attn_scale).add_(1).unsqueeze(-1))
        output = self.attn.forward(query, key, value)
        return self.o_proj.forward(output)


class Llama4MoE(HotModule):
    """Experts that take their token times the sigmoid of its score, and one that takes them all."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        self.router = ReplicatedLinear(
            config.hidden_size,
            config.num_local_experts,
            bias=False,
            prefix=f"{prefix}.router",
            return_bias=False,
        )
        self.experts = FusedMoE(
            Routing(
                num_experts=config.num_local_experts,
                top_k=config.num_experts_per_tok,
                renormalize=False,
                scoring_func="sigmoid",
            ),
            config.hidden_size,
            config.intermediate_size,
            activation=config.hidden_act,
            apply_router_weight_on_input=True,
            reduce_results=False,
            transposed=True,
            prefix=f"{prefix}.experts",
        )
        self.shared_expert = LlamaMLP(config, f"{prefix}.shared_expert", reduce_results=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.experts.forward(x, self.router.forward(x))
        return tensor_model_parallel_all_reduce(output.add_(self.shared_expert.forward(x)))


class Llama4DecoderLayer(LlamaDecoderLayer):
    attention_cls = Llama4Attention

    def make_mlp(self, config: Any, layer_index: int, prefix: str) -> nn.Module:
        if layer_index in config.moe_layers:
            return Llama4MoE(config, prefix)
        return LlamaMLP(config, prefix, config.intermediate_size_mlp)


class Llama4ForCausalLM(LlamaForCausalLM):
    layer_cls = Llama4DecoderLayer
    checkpoint_names = {
        **LlamaForCausalLM.checkpoint_names,
        "gate_up_proj": ("w13_weight", None),
        "down_proj": ("w2_weight", None),
    }
    renamed_parts = {"feed_forward": "mlp"}


class Llama4ForConditionalGeneration(Llama4ForCausalLM):
    """The language model out of a checkpoint that can see; its vision model is left out."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        left_out = ("vision_model", "multi_modal_projector")
        return super().load_weights(language_model_weights(weights, left_out))
