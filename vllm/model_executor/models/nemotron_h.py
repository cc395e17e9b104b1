"""Nemotron-H: one mixer a layer: Mamba 2, attention without RoPE, an MLP with squared ReLU, or
experts that are such MLPs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.distributed.communication_op import tensor_model_parallel_all_reduce
from vllm.errors import UnsupportedError
from vllm.model_executor.layers.activation import get_activation
from vllm.model_executor.layers.fused_moe import FusedMoE, Routing
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.models.deepseek_v2 import ExpertRouter
from vllm.model_executor.models.hybrid import (
    AttentionWithoutRope,
    HybridForCausalLM,
    MixerDecoderLayer,
)
from vllm.model_executor.models.llama import HotModule

__all__ = ["NemotronHForCausalLM", "NemotronHMLP", "NemotronHMoE"]


class NemotronHMLP(HotModule):
    """``down(relu(up(x))^2)``, summed over the ranks."""

    def __init__(self, config: Any, prefix: str, intermediate_size: int | None = None) -> None:
        super().__init__()
        inner = intermediate_size or config.intermediate_size
        self.activation = get_activation(config.mlp_hidden_act)
        self.up_proj = ColumnParallelLinear(
            config.hidden_size,
            inner,
            bias=config.mlp_bias,
            prefix=f"{prefix}.up_proj",
            return_bias=False,
        )
        self.down_proj = RowParallelLinear(
            inner,
            config.hidden_size,
            bias=config.mlp_bias,
            prefix=f"{prefix}.down_proj",
            return_bias=False,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj.forward(self.activation.forward(self.up_proj.forward(x)))


class NemotronHMoE(HotModule):
    """Experts of the hidden states, or of a narrower latent of them, and one that sees each token.

    Experts are chosen as in DeepSeek V3.
    """

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        hidden, latent = config.hidden_size, config.moe_latent_size
        self.gate = ExpertRouter(config, f"{prefix}.gate", is_corrected=True)
        bias = self.gate.e_score_correction_bias
        assert bias is not None
        self.experts = FusedMoE(
            Routing(
                num_experts=config.n_routed_experts,
                top_k=config.num_experts_per_tok,
                renormalize=config.norm_topk_prob,
                scoring_func="sigmoid",
                num_expert_group=config.n_group,
                topk_group=config.topk_group,
                routed_scaling_factor=config.routed_scaling_factor,
            ),
            latent or hidden,
            config.moe_intermediate_size,
            activation=config.mlp_hidden_act,
            is_gated=False,
            correction_bias=bias.data,
            reduce_results=False,
            prefix=f"{prefix}.experts",
        )
        self.has_latent = latent is not None
        if self.has_latent:
            names: dict[str, Any] = {"bias": config.mlp_bias, "return_bias": False}
            self.fc1_latent_proj = ReplicatedLinear(
                hidden, latent, prefix=f"{prefix}.fc1_latent_proj", **names
            )
            self.fc2_latent_proj = ReplicatedLinear(
                latent, hidden, prefix=f"{prefix}.fc2_latent_proj", **names
            )
        self.shared_experts = NemotronHMLP(
            config, f"{prefix}.shared_experts", config.moe_shared_expert_intermediate_size
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        taken = self.fc1_latent_proj.forward(x) if self.has_latent else x
        routed = self.experts.forward(taken, self.gate.forward(x))
        routed = tensor_model_parallel_all_reduce(routed)
        if self.has_latent:
            routed = self.fc2_latent_proj.forward(routed)
        return routed.add_(self.shared_experts.forward(x))


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
    expert_names = {"up_proj": ("w13", "up"), "down_proj": ("w2", "down")}

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
        elif kind == "moe":
            mixer = NemotronHMoE(config, name)
        else:
            raise UnsupportedError(
                f"config.json: layers of kind {kind!r} are not known in NemotronH; "
                "'full_attention', 'linear_attention', 'mlp' and 'moe' are",
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

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As every model's; layers that predict several tokens are left out."""
        return super().load_weights(
            (name, tensor) for name, tensor in weights if not name.startswith("mtp.")
        )
