"""Gemma 2: norms before and after each branch, soft-capped scores, every other layer windowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import get_gated_activation
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_decoder_layer import FusedDecoderLayer
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import (
    HotModule,
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)

__all__ = [
    "Gemma2Attention",
    "Gemma2DecoderLayer",
    "Gemma2ForCausalLM",
    "Gemma2Model",
    "GemmaMLP",
]


class GemmaMLP(HotModule):
    """``down(act(gate(x)) * up(x))``, with the configuration's activation."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden,
            [inner, inner],
            bias=False,
            prefix=f"{prefix}.gate_up_proj",
            return_bias=False,
        )
        self.act_fn = get_gated_activation(config.hidden_activation)
        self.down_proj = RowParallelLinear(
            inner, hidden, bias=False, prefix=f"{prefix}.down_proj", return_bias=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.act_fn.kernel == "gelu_tanh":
            inner = ops.gate_up_gelu_tanh(x, self.gate_up_proj.packed_weight)
            return self.down_proj.forward(inner)
        return self.down_proj.forward(self.act_fn.forward(self.gate_up_proj.forward(x)))


class Gemma2Attention(LlamaAttention):
    def scale(self, config: Any) -> float:
        return config.query_pre_attn_scalar**-0.5

    def make_attention(
        self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str, **options: Any
    ) -> Attention:
        options.setdefault("logits_soft_cap", config.attn_logit_softcapping)
        return super().make_attention(vllm_config, config, layer_index, prefix, **options)


class Gemma2DecoderLayer(LlamaDecoderLayer):
    """A norm before and after attention, a norm before and after the MLP."""

    attention_cls = Gemma2Attention
    norm_cls = GemmaRMSNorm

    def __init__(self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str) -> None:
        super().__init__(vllm_config, config, layer_index, prefix)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.pre_feedforward_layernorm = self.norm_cls(size, eps=eps)
        self.post_feedforward_layernorm = self.norm_cls(size, eps=eps)

    def make_mlp(self, config: Any, layer_index: int, prefix: str) -> GemmaMLP:
        return GemmaMLP(config, prefix)

    def fuse(self) -> FusedDecoderLayer | None:
        attention, mlp = self.self_attn, self.mlp
        if type(mlp) is not GemmaMLP or type(attention).forward is not attention.fused_forward:
            return None
        if mlp.act_fn.kernel is None or attention.rotary_emb is None:
            return None
        return FusedDecoderLayer.of(
            input_norm=self.input_layernorm,
            qkv_proj=attention.qkv_proj,
            q_norm=getattr(attention, "q_norm", None),
            k_norm=getattr(attention, "k_norm", None),
            rotary_emb=attention.rotary_emb,
            attn=attention.attn,
            o_proj=attention.o_proj,
            post_norm=self.pre_feedforward_layernorm,
            gate_up_proj=mlp.gate_up_proj,
            down_proj=mlp.down_proj,
            branch_norms=(self.post_attention_layernorm, self.post_feedforward_layernorm),
            gate=mlp.act_fn.kernel,
        )

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
        hidden_states = self.self_attn.forward(positions, hidden_states)
        hidden_states = self.post_attention_layernorm.forward(hidden_states)
        hidden_states, residual = self.pre_feedforward_layernorm.forward(hidden_states, residual)
        hidden_states = self.mlp.forward(hidden_states)
        return self.post_feedforward_layernorm.forward(hidden_states), residual

    fused_forward: ClassVar[Callable[..., Any]] = staticmethod(forward)


class Gemma2Model(LlamaModel):
    norm_cls = GemmaRMSNorm

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings times the root of their width, which is rounded to the model's dtype."""
        hidden_states = self.embed_tokens(input_ids)
        scale = torch.tensor(hidden_states.shape[-1] ** 0.5, dtype=hidden_states.dtype)
        return hidden_states * scale


class Gemma2ForCausalLM(LlamaForCausalLM):
    model_cls = Gemma2Model
    layer_cls = Gemma2DecoderLayer
