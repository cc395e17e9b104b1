"""DeepSeek V2, V2-Lite (arXiv:2405.04434) and V3 (arXiv:2412.19437): latent attention, and experts
in groups beside shared ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.distributed.communication_op import tensor_model_parallel_all_reduce
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.attention import LatentUpProjection, MLAAttention
from vllm.model_executor.layers.fused_decoder_layer import FusedDecoderLayer
from vllm.model_executor.layers.fused_moe import FusedMoE, Routing
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    divide,
)
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding, get_rope
from vllm.model_executor.layers.weight_loading import make_parameter
from vllm.model_executor.models.llama import (
    HotModule,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
)
from vllm.model_executor.models.qwen2_moe import QWEN_EXPERT_NAMES, QWEN_MOE_CHECKPOINT_NAMES

__all__ = [
    "DeepseekMoE",
    "DeepseekV2Attention",
    "DeepseekV2DecoderLayer",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
]

_LATENT_NORM_EPS = 1e-6
"""Of the norms in low-rank projections, whatever the configuration says of the others."""


class DeepseekV2Attention(HotModule):
    """Queries from a projection or a low-rank pair of them; keys and values from one latent."""

    def __init__(self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.attention_bias
        heads = config.num_attention_heads
        self.num_heads = divide(heads, get_tp_group().world_size, "the number of attention heads")
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.kv_lora_rank = config.kv_lora_rank
        head_dim = self.nope + self.rope
        if config.q_lora_rank is None:
            self.q_proj = _column(hidden, heads * head_dim, f"{prefix}.q_proj")
        else:
            self.q_a_proj = _replicated(hidden, config.q_lora_rank, f"{prefix}.q_a_proj", bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=_LATENT_NORM_EPS)
            self.q_b_proj = _column(config.q_lora_rank, heads * head_dim, f"{prefix}.q_b_proj")
        self.has_low_rank_query = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = _replicated(
            hidden, self.kv_lora_rank + self.rope, f"{prefix}.kv_a_proj_with_mqa", bias
        )
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, eps=_LATENT_NORM_EPS)
        self.kv_b_proj = LatentUpProjection(self.kv_lora_rank, heads, self.nope, config.v_head_dim)
        self.o_proj = RowParallelLinear(
            heads * config.v_head_dim,
            hidden,
            bias=bias,
            prefix=f"{prefix}.o_proj",
            return_bias=False,
        )
        self.rotary_emb = self.make_rotary_emb(vllm_config, config)
        self.attn = MLAAttention(
            self.num_heads,
            head_dim**-0.5 * _yarn_temperature(config.rope_parameters),
            self.nope,
            self.rope,
            config.v_head_dim,
            config.q_lora_rank,
            self.kv_lora_rank,
            self.kv_b_proj,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def make_rotary_emb(self, vllm_config: VllmConfig, config: Any) -> RotaryEmbedding | None:
        return get_rope(
            self.rope,
            max_position=vllm_config.model_config.max_model_len,
            is_neox_style=not config.rope_interleave,
            rope_parameters=config.rope_parameters,
            trained_max_position=config.max_position_embeddings,
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.has_low_rank_query:
            latent = self.q_a_layernorm.forward(self.q_a_proj.forward(hidden_states))
            query = self.q_b_proj.forward(latent)
        else:
            query = self.q_proj.forward(hidden_states)
        query = query.unflatten(-1, (self.num_heads, self.nope + self.rope))
        kv = self.kv_a_proj_with_mqa.forward(hidden_states)
        kv_c, k_pe = kv.split([self.kv_lora_rank, self.rope], dim=-1)
        self.kv_a_layernorm.forward_in_place(kv_c)
        if self.rotary_emb is not None:
            self.rotary_emb.forward(positions, query[..., self.nope :], k_pe.unsqueeze(1))
        return self.o_proj.forward(self.attn.forward(query, kv_c, k_pe))


def _column(inputs: int, outputs: int, prefix: str) -> ColumnParallelLinear:
    return ColumnParallelLinear(inputs, outputs, bias=False, prefix=prefix, return_bias=False)


def _replicated(inputs: int, outputs: int, prefix: str, bias: bool = False) -> ReplicatedLinear:
    return ReplicatedLinear(inputs, outputs, bias=bias, prefix=prefix, return_bias=False)


def _yarn_temperature(rope: Any) -> float:
    """Factor of the scores of a model whose RoPE is scaled by YaRN with ``mscale_all_dim``."""
    weight, factor = rope.get("mscale_all_dim"), rope.get("factor") or 1.0
    if rope.get("rope_type", "default") == "default" or not weight or factor <= 1:
        return 1.0
    return (0.1 * weight * math.log(factor) + 1.0) ** 2


class ExpertRouter(ReplicatedLinear):
    """Scores of experts, with V3's correction of the choice, which balances their load."""

    def __init__(self, config: Any, prefix: str, is_corrected: bool) -> None:
        super().__init__(
            config.hidden_size,
            config.n_routed_experts,
            bias=False,
            prefix=prefix,
            return_bias=False,
        )
        if is_corrected:
            self.e_score_correction_bias: nn.Parameter | None = make_parameter(
                config.n_routed_experts, dtype=torch.float32
            )
        else:
            self.register_parameter("e_score_correction_bias", None)


class DeepseekMoE(HotModule):
    """Routed experts, and shared ones that see every token."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        is_sigmoid = config.scoring_func == "sigmoid"
        is_grouped = config.topk_method != "greedy"
        self.gate = ExpertRouter(config, f"{prefix}.gate", config.topk_method == "noaux_tc")
        bias = self.gate.e_score_correction_bias
        self.experts = FusedMoE(
            Routing(
                num_experts=config.n_routed_experts,
                top_k=config.num_experts_per_tok,
                renormalize=config.norm_topk_prob,
                scoring_func="sigmoid" if is_sigmoid else "softmax",
                num_expert_group=(config.n_group or 1) if is_grouped else 1,
                topk_group=(config.topk_group or 1) if is_grouped else 1,
                routed_scaling_factor=config.routed_scaling_factor,
            ),
            config.hidden_size,
            config.moe_intermediate_size,
            activation=config.hidden_act,
            correction_bias=None if bias is None else bias.data,
            reduce_results=False,
            prefix=f"{prefix}.experts",
        )
        self.has_shared_experts = bool(config.n_shared_experts)
        if self.has_shared_experts:
            self.shared_experts = LlamaMLP(
                config,
                f"{prefix}.shared_experts",
                config.moe_intermediate_size * config.n_shared_experts,
                reduce_results=False,
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.experts.forward(x, self.gate.forward(x))
        if self.has_shared_experts:
            output.add_(self.shared_experts.forward(x))
        return tensor_model_parallel_all_reduce(output)


class DeepseekV2DecoderLayer(LlamaDecoderLayer):
    attention_cls = DeepseekV2Attention  # type: ignore[assignment]

    def make_mlp(self, config: Any, layer_index: int, prefix: str) -> nn.Module:
        has_experts = (
            config.n_routed_experts
            and layer_index >= config.first_k_dense_replace
            and layer_index % config.moe_layer_freq == 0
        )
        return DeepseekMoE(config, prefix) if has_experts else LlamaMLP(config, prefix)

    def fuse(self) -> FusedDecoderLayer | None:
        return None


class DeepseekV2ForCausalLM(LlamaForCausalLM):
    layer_cls = DeepseekV2DecoderLayer
    checkpoint_names = {
        name: target
        for name, target in QWEN_MOE_CHECKPOINT_NAMES.items()
        if name not in ("q_proj", "k_proj", "v_proj")
    }
    expert_names = QWEN_EXPERT_NAMES

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights(self._without_predictors(weights))

    def _without_predictors(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Layers behind the last one guess further tokens; generation does without them."""
        first = self.config.num_hidden_layers
        count = getattr(self.config, "num_nextn_predict_layers", None) or 0
        extra = tuple(f"model.layers.{layer}." for layer in range(first, first + count))
        for name, tensor in weights:
            if not name.startswith(extra):
                yield name, tensor


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """V2 with sigmoid scores, whose choice is corrected by a bias."""
