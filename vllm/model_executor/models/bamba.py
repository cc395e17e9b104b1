"""Bamba: Mamba 2 layers with a few attention layers among them, an MLP in each."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.models.hybrid import HybridDecoderLayer, HybridForCausalLM
from vllm.model_executor.models.llama import LlamaAttention, LlamaMLP

__all__ = ["BambaDecoderLayer", "BambaForCausalLM", "make_bamba_mixer"]


def make_bamba_mixer(vllm_config: VllmConfig, config: Any, prefix: str) -> MambaMixer2:
    """The Mamba 2 mixer of a configuration that prefixes its fields with ``mamba_``."""
    return MambaMixer2(
        vllm_config,
        hidden_size=config.hidden_size,
        intermediate_size=config.mamba_n_heads * config.mamba_d_head,
        num_heads=config.mamba_n_heads,
        head_dim=config.mamba_d_head,
        n_groups=config.mamba_n_groups,
        state_size=config.mamba_d_state,
        conv_kernel=config.mamba_d_conv,
        use_conv_bias=config.mamba_conv_bias,
        use_bias=config.mamba_proj_bias,
        activation=config.hidden_act,
        rms_norm_eps=config.rms_norm_eps,
        time_step_limit=config.time_step_limit,
        prefix=prefix,
    )


class BambaDecoderLayer(HybridDecoderLayer):
    attention_cls = LlamaAttention

    def make_mixer(self, vllm_config: VllmConfig, config: Any, prefix: str) -> MambaMixer2:
        return make_bamba_mixer(vllm_config, config, f"{prefix}.mamba")

    def make_mlp(self, config: Any, layer_index: int, prefix: str) -> LlamaMLP:
        return LlamaMLP(config, prefix)


class BambaForCausalLM(HybridForCausalLM):
    layer_cls = BambaDecoderLayer
    renamed_parts = {"pre_ff_layernorm": "post_attention_layernorm", "feed_forward": "mlp"}
