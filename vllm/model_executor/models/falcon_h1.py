"""Falcon-H1: attention and Mamba 2 side by side in every layer, multipliers nearly everywhere."""

from __future__ import annotations

from typing import Any

import torch

from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.models.hybrid import HybridForCausalLM, add_and_norm
from vllm.model_executor.models.llama import HotModule, LlamaAttention, LlamaMLP

__all__ = ["FalconH1Attention", "FalconH1DecoderLayer", "FalconH1ForCausalLM", "FalconH1MLP"]


def _scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x if factor == 1.0 else x * factor


class FalconH1Attention(LlamaAttention):
    """Keys are scaled before they are turned."""

    def __init__(self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str) -> None:
        super().__init__(vllm_config, config, layer_index, prefix)
        self.key_multiplier = config.key_multiplier

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv_proj.forward(hidden_states)
        query, key, value = torch.split_with_sizes(qkv, self.split_sizes, dim=-1)
        if self.key_multiplier != 1.0:
            key *= self.key_multiplier
        output = self.attn.forward(query, key, value, None, positions, self.rotary_emb)
        return self.o_proj.forward(output)


class FalconH1MLP(LlamaMLP):
    """``down(silu(gate(x) * m) * up(x)) * n``."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__(config, prefix)
        self.gate_multiplier, self.down_multiplier = config.mlp_multipliers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate_multiplier == 1.0:
            inner = self.gate_up_proj.forward_silu_and_mul(x)
        else:
            gate_up, _ = self.gate_up_proj.forward(x)
            gate_up[..., : gate_up.shape[-1] // 2] *= self.gate_multiplier
            inner = ops.silu_and_mul(gate_up)
        return _scaled(self.down_proj.forward(inner), self.down_multiplier)


class FalconH1DecoderLayer(HotModule):
    def __init__(self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = FalconH1Attention(
            vllm_config, config, layer_index, prefix=f"{prefix}.self_attn"
        )
        self.mamba = MambaMixer2(
            vllm_config,
            hidden_size=config.hidden_size,
            intermediate_size=config.mamba_d_ssm,
            num_heads=config.mamba_n_heads,
            head_dim=config.mamba_d_head,
            n_groups=config.mamba_n_groups,
            state_size=config.mamba_d_state,
            conv_kernel=config.mamba_d_conv,
            use_conv_bias=config.mamba_conv_bias,
            use_bias=config.mamba_proj_bias,
            use_out_bias=config.projectors_bias,
            activation=config.hidden_act,
            rms_norm_eps=config.rms_norm_eps,
            use_rms_norm=config.mamba_rms_norm,
            norm_before_gate=config.mamba_norm_before_gate,
            time_step_limit=config.time_step_limit,
            multipliers=config.ssm_multipliers,
            prefix=f"{prefix}.mamba",
        )
        self.pre_ff_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = FalconH1MLP(config, f"{prefix}.feed_forward")
        self.ssm_in_multiplier = config.ssm_in_multiplier
        self.ssm_out_multiplier = config.ssm_out_multiplier
        self.attention_in_multiplier = config.attention_in_multiplier
        self.attention_out_multiplier = config.attention_out_multiplier

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The branch's output and the stream that it is still to be added to."""
        hidden_states, residual = add_and_norm(self.input_layernorm, hidden_states, residual)
        mixed = self.mamba.forward(_scaled(hidden_states, self.ssm_in_multiplier))
        attended = self.self_attn.forward(
            positions, _scaled(hidden_states, self.attention_in_multiplier)
        )
        hidden_states = _scaled(mixed, self.ssm_out_multiplier)
        hidden_states = hidden_states + _scaled(attended, self.attention_out_multiplier)
        hidden_states, residual = self.pre_ff_layernorm.forward(hidden_states, residual)
        return self.feed_forward.forward(hidden_states), residual


class FalconH1ForCausalLM(HybridForCausalLM):
    layer_cls = FalconH1DecoderLayer

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.logits_processor = LogitsProcessor(
            self.config.vocab_size, scale=self.config.lm_head_multiplier
        )
