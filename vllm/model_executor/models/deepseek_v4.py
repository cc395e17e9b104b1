"""DeepSeek V4: attention over windows and compressed latents, several residual streams, experts.

Names of modules are those of released checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm import _custom_ops as ops
from vllm._streams_op import join_streams, take_from_streams, unit_mean_square
from vllm.config import VllmConfig
from vllm.distributed.communication_op import tensor_model_parallel_all_reduce
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.activation import ClampedSiluAndMul
from vllm.model_executor.layers.attention.compressed_attention import CompressedAttention
from vllm.model_executor.layers.fused_moe import FusedMoE, Routing
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    divide,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.layers.weight_loading import (
    ShardId,
    copy_weight,
    make_parameter,
    set_weight_attrs,
    take_shard,
)
from vllm.model_executor.models.llama import HotModule
from vllm.model_executor.models.weights import load_checkpoint, maybe_prefix

__all__ = ["DeepseekV4ForCausalLM"]


def _replicated(inputs: int, outputs: int, prefix: str) -> ReplicatedLinear:
    return ReplicatedLinear(inputs, outputs, bias=False, prefix=prefix, return_bias=False)


class _Attention(HotModule):
    """A rank computes some groups of heads; the latents that all heads share, every rank keeps."""

    def __init__(self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str) -> None:
        super().__init__()
        tp = get_tp_group()
        hidden, width, heads = config.hidden_size, config.head_dim, config.num_attention_heads
        groups = divide(config.o_groups, tp.world_size, "the number of groups of heads (o_groups)")
        self.num_heads = heads // config.o_groups * groups
        self.head_dim, self.eps = width, config.rms_norm_eps
        self.wq_a = _replicated(hidden, config.q_lora_rank, f"{prefix}.wq_a")
        self.q_norm = RMSNorm(config.q_lora_rank, eps=self.eps)
        self.wq_b = ColumnParallelLinear(
            config.q_lora_rank,
            heads * width,
            bias=False,
            prefix=f"{prefix}.wq_b",
            return_bias=False,
        )
        self.head_norm = RMSNorm(width, eps=self.eps, has_weight=False)
        self.wkv = _replicated(hidden, width, f"{prefix}.wkv")
        self.norm = RMSNorm(width, eps=self.eps)
        self.attn_sink = _rows_of_rank(heads, self.num_heads, dtype=torch.float32)
        inner = config.o_groups * config.o_lora_rank
        self.wo_a = _GroupedLinear(heads * width // config.o_groups, inner, groups)
        self.wo_b = RowParallelLinear(
            inner, hidden, bias=False, prefix=f"{prefix}.wo_b", return_bias=False
        )
        ratio = config.compress_ratios[layer_index]
        rope = config.rope_parameters["compress" if ratio else "main"]
        self.rotary_emb = get_rope(
            config.qk_rope_head_dim,
            max_position=vllm_config.model_config.max_model_len,
            is_neox_style=False,
            rope_parameters={k: v for k, v in rope.items() if k != "partial_rotary_factor"},
            trained_max_position=config.max_position_embeddings,
        )
        self.rotary_dim = self.rotary_emb.rotary_dim
        cosines, sines = self.rotary_emb.cos_sin_cache.chunk(2, dim=-1)
        self.turns_back = torch.cat((cosines, -sines), dim=-1)
        self.core = CompressedAttention(
            vllm_config, config, ratio, self.rotary_emb, self.attn_sink.data, prefix
        )

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        query_latent = self.q_norm.forward(self.wq_a.forward(hidden))
        query = self.wq_b.forward(query_latent).unflatten(-1, (self.num_heads, self.head_dim))
        self.head_norm.forward_in_place(query)
        latents = self.norm.forward(self.wkv.forward(hidden))
        rotated = slice(-self.rotary_dim, None)
        self.rotary_emb.forward(positions, query[..., rotated], latents[:, None, rotated])
        output = self.core.forward(query, latents, hidden, query_latent, positions)
        # Values are rotated as keys are: each output is turned back by its own position.
        turned = output[..., rotated]
        ops.rotary_embedding(positions, turned, None, self.rotary_dim, self.turns_back, False)
        return self.wo_b.forward(self.wo_a.forward(output.flatten(1)))


def _rows_of_rank(rows: int, local: int, *inner: int, **attrs: Any) -> nn.Parameter:
    """A parameter of which each rank holds a run of ``local`` rows."""
    rank = get_tp_group().rank_in_group

    def load(param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        copy_weight(param.data, take_shard(loaded, 0, rank, local, (rows, *inner)))

    return make_parameter(local, *inner, weight_loader=load, **attrs)


class _GroupedLinear(nn.Module):
    """A product for each group of inputs of this rank: (T, G * in) -> (T, G * out).

    Args:
        outputs: of all groups of all ranks.
        num_groups: G.
    """

    weight: nn.Parameter

    def __init__(self, inputs: int, outputs: int, num_groups: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.weight = _rows_of_rank(outputs, outputs // get_tp_group().world_size, inputs)

        self.parts: list[ops.PackedWeight | torch.Tensor] = list(self._split())

    def _split(self) -> tuple[torch.Tensor, ...]:
        return self.weight.data.chunk(self.num_groups)

    def process_weights_after_loading(self) -> None:
        """Pack each group's; from here on there is no ``weight`` parameter."""
        if "weight" in self._parameters:
            self.parts = [ops.pack_weight(part) for part in self._split()]
            del self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = x.chunk(self.num_groups, dim=1)
        output = x.new_empty((x.shape[0], sum(part.shape[0] for part in self.parts)))
        outputs = output.chunk(self.num_groups, dim=1)
        for part, weight, out in zip(inputs, self.parts, outputs, strict=True):
            ops.linear_into(part, weight, out)
        return output


class _SharedExpert(HotModule):
    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.gate_up = MergedColumnParallelLinear(
            hidden, [inner, inner], bias=False, prefix=f"{prefix}.gate_up", return_bias=False
        )
        self.w2 = RowParallelLinear(
            inner,
            hidden,
            bias=False,
            reduce_results=False,
            prefix=f"{prefix}.w2",
            return_bias=False,
        )
        self.activation = ClampedSiluAndMul(config.swiglu_limit)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2.forward(self.activation.forward(self.gate_up.forward(x)))


class _Router(nn.Module):
    """Scores of experts; a correction of the choice, or a table that makes it by token."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    tid2eid: nn.Parameter | None

    def __init__(self, config: Any, by_token: bool) -> None:
        super().__init__()
        experts, chosen = config.n_routed_experts, config.num_experts_per_tok
        self.weight = make_parameter(experts, config.hidden_size)
        self.packed: ops.PackedWeight | torch.Tensor = self.weight.data
        table = make_parameter(config.vocab_size, chosen, dtype=torch.int64) if by_token else None
        if table is not None:
            set_weight_attrs(table, {"num_values": experts})
        bias = None if by_token else make_parameter(experts, dtype=torch.float32)
        self.register_parameter("tid2eid", table)
        self.register_parameter("bias", bias)

    def process_weights_after_loading(self) -> None:
        """Pack the weight; from here on there is no such parameter."""
        if "weight" in self._parameters:
            self.packed = ops.pack_weight(self.weight.data)
            del self.weight

    def forward(self, x: torch.Tensor, input_ids: torch.Tensor) -> Any:
        """Logits (T, E), and the chosen experts (T, k) or None."""
        chosen = None if self.tid2eid is None else self.tid2eid[input_ids]
        return ops.linear(x, self.packed), chosen


class _MoE(HotModule):
    def __init__(self, config: Any, layer_index: int, prefix: str) -> None:
        super().__init__()
        self.gate = _Router(config, config.mlp_layer_types[layer_index] == "hash_moe")
        self.experts = FusedMoE(
            Routing(
                num_experts=config.n_routed_experts,
                top_k=config.num_experts_per_tok,
                renormalize=config.norm_topk_prob,
                scoring_func=config.scoring_func,
                routed_scaling_factor=config.routed_scaling_factor,
            ),
            config.hidden_size,
            config.moe_intermediate_size,
            activation=ClampedSiluAndMul(config.swiglu_limit),
            correction_bias=None if self.gate.bias is None else self.gate.bias.data,
            reduce_results=False,
            prefix=f"{prefix}.experts",
        )
        self.shared_experts = _SharedExpert(config, f"{prefix}.shared_experts")

    def forward(self, x: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        output = self.experts.forward(x, *self.gate.forward(x, input_ids))
        return tensor_model_parallel_all_reduce(output.add_(self.shared_experts.forward(x)))


class _Streams(HotModule):
    """How N residual streams meet a branch (manifold-constrained hyper-connections).

    From the streams themselves come the weights of their sum that the branch takes, of the branch's
    output in each stream, and of the streams among each other; these last are brought near to a
    doubly stochastic matrix (Sinkhorn and Knopp), so that the streams' size is kept.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        count, self.num_iterations = config.hc_mult, config.hc_sinkhorn_iters
        self.eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        rows = (2 + count) * count
        self.fn = make_parameter(rows, count * config.hidden_size, dtype=torch.float32)
        self.base = make_parameter(rows, dtype=torch.float32)
        self.scale = make_parameter(3, dtype=torch.float32)

    def forward(self, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Streams (T, N, hidden) -> what the branch takes (T, hidden); its weights in the streams
        (T, N); the mix of the streams (T, N, N), from the first N to the second.
        """
        return take_from_streams(
            streams,
            self.fn.data,
            self.base.data,
            self.scale.data,
            self.num_iterations,
            self.eps,
            self.norm_eps,
        )


class _DecoderLayer(HotModule):
    def __init__(self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str) -> None:
        super().__init__()
        self.attn = _Attention(vllm_config, config, layer_index, prefix=f"{prefix}.attn")
        self.ffn = _MoE(config, layer_index, prefix=f"{prefix}.ffn")
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hc_attn = _Streams(config)
        self.hc_ffn = _Streams(config)

    def forward(
        self, positions: torch.Tensor, streams: torch.Tensor, input_ids: torch.Tensor
    ) -> torch.Tensor:
        branch, given, mix = self.hc_attn.forward(streams)
        branch = self.attn.forward(positions, self.attn_norm.forward(branch))
        streams = join_streams(branch, streams, given, mix)
        branch, given, mix = self.hc_ffn.forward(streams)
        branch = self.ffn.forward(self.ffn_norm.forward(branch), input_ids)
        return join_streams(branch, streams, given, mix)


class _StreamsHead(nn.Module):
    """The sum of the streams that the last norm takes."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.eps, self.norm_eps = config.hc_eps, config.rms_norm_eps
        count = config.hc_mult
        self.hc_fn = make_parameter(count, count * config.hidden_size, dtype=torch.float32)
        self.hc_base = make_parameter(count, dtype=torch.float32)
        self.hc_scale = make_parameter(1, dtype=torch.float32)

    def forward(self, streams: torch.Tensor) -> torch.Tensor:
        weights = F.linear(unit_mean_square(streams.flatten(1), self.norm_eps), self.hc_fn)
        taken = (weights * self.hc_scale + self.hc_base).sigmoid() + self.eps
        return (taken.unsqueeze(-1) * streams).sum(1).to(streams.dtype)


class _Model(nn.Module):
    def __init__(self, vllm_config: VllmConfig, config: Any, prefix: str) -> None:
        super().__init__()
        self.num_streams = config.hc_mult
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        self.layers = nn.ModuleList(
            _DecoderLayer(vllm_config, config, i, prefix=maybe_prefix(prefix, f"layers.{i}"))
            for i in range(config.num_hidden_layers)
        )
        self.hc_head = _StreamsHead(config)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        streams = hidden.unsqueeze(1).expand(-1, self.num_streams, -1)
        for layer in self.layers:
            streams = layer.forward(positions, streams, input_ids)
        return self.norm(self.hc_head(streams))


class DeepseekV4ForCausalLM(nn.Module):
    """With its output head. Token ids are needed beside embeddings: some choose experts."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_text_config
        self.config = config
        self.model = _Model(vllm_config, config, maybe_prefix(prefix, "model"))
        self.lm_head: VocabParallelEmbedding
        if config.tie_word_embeddings:
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
            )
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids (T,) -> embeddings (T, hidden)."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert input_ids is not None, "experts are chosen by token ids"
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take a checkpoint with the names of releases; see ``load_checkpoint``."""
        named = ((_module_name(name), tensor) for name, tensor in weights)
        kept = (item for item in named if not item[0].startswith("model.mtp."))
        return load_checkpoint(
            self,
            kept,
            fused=_FUSED,
            experts={"w1": ("w13", "gate"), "w3": ("w13", "up"), "w2": ("w2", "down")},
            ignored=("lm_head.weight",) if self.config.tie_word_embeddings else (),
        )


_FUSED: dict[str, tuple[str, ShardId]] = {"w1": ("gate_up", 0), "w3": ("gate_up", 1)}
_STREAM_PARTS = ("fn", "base", "scale")


def _module_name(name: str) -> str:
    """A checkpoint's name -> this module's, where it is not the same."""
    parts = name.removeprefix("model.").split(".")
    if parts[0] == "head":
        return ".".join(("lm_head", *parts[1:]))
    if parts[0] == "lm_head":
        return name
    if parts[0] == "embed":
        parts[0] = "embed_tokens"
    if parts[0].startswith("hc_head_"):
        parts[0] = f"hc_head.hc_{parts[0].removeprefix('hc_head_')}"
    names = []
    for index, part in enumerate(parts):
        head, _, tail = part.rpartition("_")
        if head in ("hc_attn", "hc_ffn") and tail in _STREAM_PARTS:
            names += [head, tail]
        elif part == "kv_norm":
            names.append("norm")
        elif part in ("compressor", "indexer") and parts[index - 1] == "attn":
            names += ["core", part]
        else:
            names.append(part)
    return ".".join(("model", *names))
