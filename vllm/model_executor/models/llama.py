"""Llama and Mistral: pre-norm decoder, rotary grouped-query attention, SiLU-gated MLP.

Other models of this shape (Qwen) derive from it. A model knows layers; it must not know the
engine, the scheduler or how a cache is laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tensor_model_parallel_world_size
from vllm.errors import UnsupportedError
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_decoder_layer import FusedDecoderLayer, FusedDecoderStack
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding, get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.layers.weight_loading import ShardId
from vllm.model_executor.models.weights import load_checkpoint, maybe_prefix

__all__ = [
    "HotModule",
    "LlamaAttention",
    "LlamaDecoderLayer",
    "LlamaForCausalLM",
    "LlamaMLP",
    "LlamaModel",
    "MistralForCausalLM",
]


class HotModule(nn.Module):
    """A module on the path of every token, whose children are looked up as plain attributes.

    ``nn.Module`` finds a child only after the ordinary lookup has failed, and calls it through a
    check for hooks: 1.5 us each, about 300 times a step. Here children are in ``__dict__`` too,
    and the hot path calls ``forward`` of leaf layers.
    """

    changes = 0
    """How often a child of any such module was set: what was made of children is out of date."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__[name] = value
            HotModule.changes += 1

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.__dict__.pop(name, None)


class LlamaMLP(HotModule):
    """``down(silu(gate(x)) * up(x))``.

    Args:
        intermediate_size: inner size; the configuration's if None.
        reduce_results: sum over the tensor-parallel ranks; else the caller does.
    """

    def __init__(
        self,
        config: Any,
        prefix: str,
        intermediate_size: int | None = None,
        reduce_results: bool = True,
    ) -> None:
        super().__init__()
        if config.hidden_act != "silu":
            raise UnsupportedError(
                f"config.json: hidden_act {config.hidden_act!r} is not supported; 'silu' is"
            )
        bias = getattr(config, "mlp_bias", False)
        hidden, inner = config.hidden_size, intermediate_size or config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [inner, inner], bias=bias, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            inner,
            hidden,
            bias=bias,
            reduce_results=reduce_results,
            prefix=f"{prefix}.down_proj",
            return_bias=False,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj.forward(self.gate_up_proj.forward_silu_and_mul(x))


class LlamaAttention(HotModule):
    """Self-attention of one layer; what subclasses change is said by the methods after the first.

    Those that make modules are called from the constructor, when the projections are there.
    """

    is_neox_style = True
    """RoPE turns the halves of a head; else neighbours."""
    rotary_emb: RotaryEmbedding | None

    def __init__(self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=self.has_qkv_bias(config),
            prefix=f"{prefix}.qkv_proj",
            return_bias=False,
        )
        self.num_heads = self.qkv_proj.num_heads
        self.num_kv_heads = self.qkv_proj.num_kv_heads
        self.split_sizes = [
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        ]
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=self.has_output_bias(config),
            prefix=f"{prefix}.o_proj",
            return_bias=False,
        )
        self.rotary_emb = self.make_rotary_emb(vllm_config, config, layer_index)
        self.attn = self.make_attention(vllm_config, config, layer_index, prefix=f"{prefix}.attn")

    def make_rotary_emb(
        self, vllm_config: VllmConfig, config: Any, layer_index: int
    ) -> RotaryEmbedding | None:
        return get_rope(
            self.head_dim,
            max_position=vllm_config.model_config.max_model_len,
            is_neox_style=self.is_neox_style,
            rope_parameters=self.rope_parameters(config, layer_index),
            trained_max_position=config.max_position_embeddings,
        )

    def make_attention(
        self,
        vllm_config: VllmConfig,
        config: Any,
        layer_index: int,
        prefix: str,
        **options: Any,
    ) -> Attention:
        """``options`` go to the attention layer as they are."""
        window = self.sliding_window(config, layer_index)
        if vllm_config.model_config.disable_sliding_window:
            window = None
        return self.attention_layer(config, layer_index)(
            self.num_heads,
            self.head_dim,
            self.scale(config),
            num_kv_heads=self.num_kv_heads,
            # The window is each layer's own: a default for all would reach the full ones.
            cache_config=replace(vllm_config.cache_config, sliding_window=None),
            per_layer_sliding_window=window,
            prefix=prefix,
            **options,
        )

    @staticmethod
    def attention_layer(config: Any, layer_index: int) -> Callable[..., Attention]:
        return Attention

    def scale(self, config: Any) -> float:
        """Factor of the scores."""
        return self.head_dim**-0.5

    @staticmethod
    def rope_parameters(config: Any, layer_index: int) -> Mapping[str, Any]:
        return config.rope_parameters

    @staticmethod
    def has_qkv_bias(config: Any) -> bool:
        return getattr(config, "attention_bias", False)

    @staticmethod
    def has_output_bias(config: Any) -> bool:
        return getattr(config, "attention_bias", False)

    @staticmethod
    def sliding_window(config: Any, layer_index: int) -> int | None:
        """Keys that a token of this layer sees, itself included; None for all."""
        layer_types = getattr(config, "layer_types", None)
        if layer_types is not None and layer_types[layer_index] != "sliding_attention":
            return None
        return getattr(config, "sliding_window", None)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv_proj.forward(hidden_states)
        query, key, value = torch.split_with_sizes(qkv, self.split_sizes, dim=-1)
        output = self.attn.forward(query, key, value, None, positions, self.rotary_emb)
        return self.o_proj.forward(output)

    fused_forward: ClassVar[Callable[..., torch.Tensor]] = staticmethod(forward)
    """The ``forward`` that the fused layer stands for; one that differs from it is not fused."""


class LlamaDecoderLayer(HotModule):
    attention_cls: type[LlamaAttention] = LlamaAttention
    norm_cls: type[RMSNorm] = RMSNorm

    def __init__(self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = self.norm_cls(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = self.attention_cls(
            vllm_config, config, layer_index, prefix=f"{prefix}.self_attn"
        )
        self.post_attention_layernorm = self.norm_cls(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = self.make_mlp(config, layer_index, prefix=f"{prefix}.mlp")
        # Made in the first step, when the weights are there, and again after a change of modules.
        self.fused: FusedDecoderLayer | None = None
        self.fused_at = -1

    def make_mlp(self, config: Any, layer_index: int, prefix: str) -> nn.Module:
        return LlamaMLP(config, prefix)

    def fuse(self) -> FusedDecoderLayer | None:
        """This layer as one kernel; None where there is none that does what its modules do."""
        attention, mlp = self.self_attn, self.mlp
        if type(mlp) is not LlamaMLP or type(attention).forward is not attention.fused_forward:
            return None
        assert attention.rotary_emb is not None, "this forward is the one with RoPE"
        return FusedDecoderLayer.of(
            input_norm=self.input_layernorm,
            qkv_proj=attention.qkv_proj,
            q_norm=getattr(attention, "q_norm", None),
            k_norm=getattr(attention, "k_norm", None),
            rotary_emb=attention.rotary_emb,
            attn=attention.attn,
            o_proj=attention.o_proj,
            post_norm=self.post_attention_layernorm,
            gate_up_proj=mlp.gate_up_proj,
            down_proj=mlp.down_proj,
        )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The branch's output and the stream that it is still to be added to."""
        if self.fused_at != HotModule.changes:
            self.fused, self.fused_at = self.fuse(), HotModule.changes
        if self.fused is not None:
            results = self.fused.forward(positions, hidden_states, residual)
            if results is not None:
                return results
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm.forward(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm.forward(hidden_states, residual)
        hidden_states = self.self_attn.forward(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm.forward(hidden_states, residual)
        return self.mlp.forward(hidden_states), residual

    fused_forward: ClassVar[Callable[..., Any]] = staticmethod(forward)
    """The ``forward`` that ``fuse`` stands for; one that differs from it is not fused."""


class LlamaModel(HotModule):
    """Embedding, decoder layers and the last norm."""

    norm_cls: type[RMSNorm] = RMSNorm

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        layer_cls: type[nn.Module] = LlamaDecoderLayer,
    ) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_text_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        self.layers = nn.ModuleList(
            layer_cls(vllm_config, config, index, prefix=maybe_prefix(prefix, f"layers.{index}"))
            for index in range(config.num_hidden_layers)
        )
        self.norm = self.norm_cls(config.hidden_size, eps=config.rms_norm_eps)
        self.fused: FusedDecoderStack | None = None
        self.fused_at = -1
        if get_tensor_model_parallel_world_size() > 1 and type(self).forward is LlamaModel.forward:
            self.leave_sums_to_norms()

    def leave_sums_to_norms(self) -> None:
        """Have branches summed over the ranks by the norms behind them, where one kernel does both.

        Only in layers of the plain form: nothing else reads a branch before its norm.
        """
        following = [*(getattr(layer, "input_layernorm", None) for layer in self.layers), self.norm]
        for layer, next_norm in zip(self.layers, following[1:], strict=True):
            if (
                not isinstance(layer, LlamaDecoderLayer)
                or type(layer).forward is not LlamaDecoderLayer.forward
            ):
                continue
            attention, mlp = layer.self_attn, layer.mlp
            branches: list[tuple[RowParallelLinear, Any]] = []
            if type(attention).forward is getattr(attention, "fused_forward", None):
                branches.append((attention.o_proj, layer.post_attention_layernorm))
            if type(mlp) is LlamaMLP:
                branches.append((mlp.down_proj, next_norm))
            for projection, norm in branches:
                if type(norm) is RMSNorm and projection.reduce_results:
                    projection.reduce_results, norm.sums_ranks = False, True

    def fuse(self) -> FusedDecoderStack | None:
        """The layers as one kernel; None unless every one of them is what the kernel knows."""
        fused: list[FusedDecoderLayer] = []
        for layer in self.layers:
            if not isinstance(layer, LlamaDecoderLayer):
                return None
            same = type(layer).forward is layer.fused_forward
            kernel = layer.fuse() if same else None
            if kernel is None:
                return None
            fused.append(kernel)
        return FusedDecoderStack(fused)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids (T,) -> what the first layer takes, (T, hidden)."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            assert input_ids is not None, "a step has token ids or embeddings"
            hidden_states = self.embed_input_ids(input_ids)
        else:
            hidden_states = inputs_embeds.clone()  # the residual stream is added to in place
        if self.fused_at != HotModule.changes:
            self.fused, self.fused_at = self.fuse(), HotModule.changes
        done = None if self.fused is None else self.fused.forward(positions, hidden_states)
        if done is not None:
            hidden_states, residual = done
        else:
            residual = None
            for layer in self.layers:
                hidden_states, residual = layer(positions, hidden_states, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class LlamaForCausalLM(HotModule):
    """A ``LlamaModel`` with its output head."""

    model_cls: type[LlamaModel] = LlamaModel
    layer_cls: type[nn.Module] = LlamaDecoderLayer
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    checkpoint_names: dict[str, tuple[str, ShardId]] = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", 0),
        "up_proj": ("gate_up_proj", 1),
    }
    """Projections of a checkpoint -> the fused parameter here, and which part of it."""
    expert_names: dict[str, tuple[str, str]] = {}
    """Projections of one expert; see ``CheckpointNames.experts``."""
    renamed_parts: dict[str, str] = {}
    """Parts of a checkpoint's names -> what they are called here."""

    lm_head: VocabParallelEmbedding

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_text_config
        self.config = config
        self.model = self.model_cls(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            layer_cls=self.layer_cls,
        )
        if config.tie_word_embeddings:
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
            )
        self.logits_processor = LogitsProcessor(
            config.vocab_size, soft_cap=getattr(config, "final_logit_softcapping", None)
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids (T,) -> embeddings (T, hidden)."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take a checkpoint with Hugging Face's names; see ``load_checkpoint``."""
        # A tied checkpoint may carry the head a second time.
        ignored = ("lm_head.weight",) if self.config.tie_word_embeddings else ()
        return load_checkpoint(
            self,
            weights,
            fused=self.checkpoint_names,
            experts=self.expert_names,
            renamed=self.renamed_parts,
            ignored=ignored,
        )


class MistralForCausalLM(LlamaForCausalLM):
    """Llama with a sliding window in every layer, where the configuration sets one."""
