"""Qwen2 and Qwen2.5 (dense): Llama with biases on query, key and value."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM

__all__ = ["Qwen2Attention", "Qwen2DecoderLayer", "Qwen2ForCausalLM"]


class Qwen2Attention(LlamaAttention):
    @staticmethod
    def has_qkv_bias(config: Any) -> bool:
        return True

    @staticmethod
    def has_output_bias(config: Any) -> bool:
        return False


class Qwen2DecoderLayer(LlamaDecoderLayer):
    attention_cls = Qwen2Attention


class Qwen2ForCausalLM(LlamaForCausalLM):
    layer_cls = Qwen2DecoderLayer
