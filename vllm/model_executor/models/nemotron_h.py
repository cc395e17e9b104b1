"""Nemotron-H: one mixer a layer: Mamba 2, attention without RoPE, or an MLP with squared ReLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.errors import UnsupportedError
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.models.hybrid import (
    AttentionWithoutRope,
    HybridForCausalLM,
    MixerDecoderLayer,
)
from vllm.model_executor.models.llama import HotModule

__all__ = ["NemotronHForCausalLM", "NemotronHMLP"]


class NemotronHMLP(HotModule):
    """``down(relu(up(x))^2)``."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        if config.mlp_hidden_act != "relu2":
            raise UnsupportedError(
                f"config.json: mlp_hidden_act {config.mlp_hidden_act!r} is not supported; 'relu2' "
                "is",
                parameter="model",
            )
        self.up_proj = ColumnParallelLinear(
            config.hidden_size,
            config.intermediate_size,
            bias=config.mlp_bias,
            prefix=f"{prefix}.up_proj",
            return_bias=False,
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=config.mlp_bias,
            prefix=f"{prefix}.down_proj",
            return_bias=False,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj.forward(self.up_proj.forward(x).relu_().square_())


class NemotronHAttention(AttentionWithoutRope):
    @staticmethod
    def has_qkv_bias(config: Any) -> bool:
        return False

    @staticmethod
    def has_output_bias(config: Any) -> bool:
        return False


class NemotronHForCausalLM(HybridForCausalLM):
    body_name = "backbone"
    embedding_name = "embeddings"
    norm_name = "norm_f"
    renamed_parts = {"embedding": "embeddings", "model": "backbone"}

    def make_layer(
        self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str
    ) -> nn.Module:
        kind, name = config.layer_types[layer_index], f"{prefix}.mixer"
        mixer: nn.Module
        if kind == "full_attention":
            mixer = NemotronHAttention(vllm_config, config, layer_index, prefix=name)
        elif kind == "linear_attention":
            mixer = self.make_mamba(vllm_config, config, name)
        elif kind == "mlp":
            mixer = NemotronHMLP(config, name)
        else:
            raise UnsupportedError(
                f"config.json: layers of kind {kind!r} are not supported in NemotronH; "
                "'full_attention', 'linear_attention' and 'mlp' are",
                parameter="model",
            )
        return MixerDecoderLayer(
            config, mixer, config.rms_norm_eps, takes_positions=kind == "full_attention"
        )

    @staticmethod
    def make_mamba(vllm_config: VllmConfig, config: Any, prefix: str) -> MambaMixer2:
        return MambaMixer2(
            vllm_config,
            hidden_size=config.hidden_size,
            intermediate_size=config.mamba_num_heads * config.mamba_head_dim,
            num_heads=config.mamba_num_heads,
            head_dim=config.mamba_head_dim,
            n_groups=config.n_groups,
            state_size=config.ssm_state_size,
            conv_kernel=config.conv_kernel,
            use_conv_bias=config.use_conv_bias,
            use_bias=config.use_bias,
            activation=config.mamba_hidden_act,
            rms_norm_eps=config.rms_norm_eps,
            time_step_limit=(config.time_step_min, float("inf")),
            prefix=prefix,
        )
