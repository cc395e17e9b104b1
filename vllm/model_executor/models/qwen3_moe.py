"""Qwen3-MoE: Qwen3 with experts, none of them shared."""

from __future__ import annotations

from typing import Any

from torch import nn

from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2_moe import (
    QWEN_EXPERT_NAMES,
    QWEN_MOE_CHECKPOINT_NAMES,
    QwenSparseMoE,
    is_sparse_layer,
)
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer

__all__ = ["Qwen3MoeDecoderLayer", "Qwen3MoeForCausalLM"]


class Qwen3MoeDecoderLayer(Qwen3DecoderLayer):
    def make_mlp(self, config: Any, layer_index: int, prefix: str) -> nn.Module:
        if not is_sparse_layer(config, layer_index):
            return super().make_mlp(config, layer_index, prefix)
        return QwenSparseMoE(config, prefix)


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    layer_cls = Qwen3MoeDecoderLayer
    checkpoint_names = QWEN_MOE_CHECKPOINT_NAMES
    expert_names = QWEN_EXPERT_NAMES
