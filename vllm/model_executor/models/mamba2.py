"""Mamba 2: nothing but state spaces with one decay a head, one mixer in each layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.models.hybrid import HybridForCausalLM, MixerDecoderLayer

__all__ = ["Mamba2ForCausalLM"]


class Mamba2ForCausalLM(HybridForCausalLM):
    body_name = "backbone"
    embedding_name = "embeddings"
    norm_name = "norm_f"
    renamed_parts = {"embedding": "embeddings"}

    def make_layer(
        self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str
    ) -> nn.Module:
        mixer = MambaMixer2(
            vllm_config,
            hidden_size=config.hidden_size,
            intermediate_size=config.num_heads * config.head_dim,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            n_groups=config.n_groups,
            state_size=config.state_size,
            conv_kernel=config.conv_kernel,
            use_conv_bias=config.use_conv_bias,
            use_bias=config.use_bias,
            activation=config.hidden_act,
            rms_norm_eps=config.rms_norm_eps,
            time_step_limit=config.time_step_limit,
            prefix=f"{prefix}.mixer",
        )
        return MixerDecoderLayer(config, mixer, config.rms_norm_eps)
