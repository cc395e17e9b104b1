"""gpt-oss: attention sinks, every other layer windowed, experts with biases and a clamped gate.

Checkpoints hold the experts in MXFP4 or plain; either way all of a layer's are one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.activation import SwigluOAI
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoE, Routing
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.mxfp4 import dequantize_mxfp4
from vllm.model_executor.layers.weight_loading import (
    ShardId,
    copy_weight,
    make_parameter,
    take_shard,
)
from vllm.model_executor.models.llama import (
    HotModule,
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
)

__all__ = [
    "GptOssAttention",
    "GptOssDecoderLayer",
    "GptOssForCausalLM",
    "GptOssMoE",
    "dequantized_experts",
]

_BLOCKS, _SCALES = "_blocks", "_scales"


class GptOssAttention(LlamaAttention):
    def make_attention(
        self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str, **options: Any
    ) -> Attention:
        # Float32 holds every 16-bit sink, and is what the kernels read.
        self.sinks = make_parameter(
            self.num_heads, dtype=torch.float32, weight_loader=self._load_sinks
        )
        return super().make_attention(
            vllm_config, config, layer_index, prefix, sinks=self.sinks.data, **options
        )

    @staticmethod
    def _load_sinks(
        param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        tp, size = get_tp_group(), param.shape[0]
        full = (size * tp.world_size,)
        copy_weight(param.data, take_shard(loaded_weight, 0, tp.rank_in_group, size, full))


class GptOssMoE(HotModule):
    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        self.router = ReplicatedLinear(
            config.hidden_size,
            config.num_local_experts,
            bias=True,
            prefix=f"{prefix}.router",
            return_bias=False,
        )
        self.experts = FusedMoE(
            Routing(num_experts=config.num_local_experts, top_k=config.num_experts_per_tok),
            config.hidden_size,
            config.intermediate_size,
            activation=SwigluOAI(config.swiglu_alpha, config.swiglu_limit),
            has_bias=True,
            transposed=True,
            interleaved=True,
            prefix=f"{prefix}.experts",
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts.forward(x, self.router.forward(x))


class GptOssDecoderLayer(LlamaDecoderLayer):
    attention_cls = GptOssAttention

    def make_mlp(self, config: Any, layer_index: int, prefix: str) -> GptOssMoE:
        return GptOssMoE(config, prefix)


class GptOssForCausalLM(LlamaForCausalLM):
    layer_cls = GptOssDecoderLayer
    checkpoint_names = {
        **LlamaForCausalLM.checkpoint_names,
        "gate_up_proj": ("w13_weight", None),
        "gate_up_proj_bias": ("w13_bias", None),
        "down_proj": ("w2_weight", None),
        "down_proj_bias": ("w2_bias", None),
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.dtype = vllm_config.model_config.dtype

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights(dequantized_experts(weights, self.dtype))


def dequantized_experts(
    weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """``weights`` with each pair of MXFP4 blocks and scales as the one plain tensor they stand for.

    Plain ones are (E, in, out), MXFP4's are (E, out, in). A half without the other is handed on
    under its own name.
    """
    halves: dict[str, tuple[str, torch.Tensor]] = {}
    for name, tensor in weights:
        stem = name.removesuffix(_BLOCKS).removesuffix(_SCALES)
        if stem == name:
            yield name, tensor
        elif stem not in halves:
            halves[stem] = (name, tensor)
        else:
            parts = dict([halves.pop(stem), (name, tensor)])
            weight = dequantize_mxfp4(parts[stem + _BLOCKS], parts[stem + _SCALES], dtype)
            yield stem, weight.transpose(1, 2)
    yield from halves.values()
