"""Mamba and Falcon-Mamba: nothing but selective state spaces, one in each layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer
from vllm.model_executor.models.hybrid import HybridForCausalLM, MixerDecoderLayer

__all__ = ["FalconMambaForCausalLM", "MambaForCausalLM"]


class MambaForCausalLM(HybridForCausalLM):
    body_name = "backbone"
    embedding_name = "embeddings"
    norm_name = "norm_f"
    renamed_parts = {"embedding": "embeddings"}

    def make_layer(
        self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str
    ) -> nn.Module:
        mixer = MambaMixer(
            vllm_config,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            state_size=config.state_size,
            conv_kernel=config.conv_kernel,
            time_step_rank=config.time_step_rank,
            use_conv_bias=config.use_conv_bias,
            use_bias=config.use_bias,
            activation=config.hidden_act,
            norm_eps=self.mixer_norm_eps(config),
            prefix=f"{prefix}.mixer",
        )
        return MixerDecoderLayer(config, mixer, config.rms_norm_eps)

    @staticmethod
    def mixer_norm_eps(config: Any) -> float | None:
        """Of the norms of step, B and C; None where there are none."""
        return None


class FalconMambaForCausalLM(MambaForCausalLM):
    """Mamba that norms step, B and C, without weights."""

    @staticmethod
    def mixer_norm_eps(config: Any) -> float | None:
        return config.mixer_rms_eps
