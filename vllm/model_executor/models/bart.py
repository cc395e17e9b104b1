"""BART (arXiv:1910.13461): an encoder that reads the prompt, a decoder that attends to it.

Post-norm layers, learned positions. The encoder runs once a request, in the step that begins it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.errors import UnsupportedError
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.cross_attention import (
    CrossAttention,
    encoder_self_attention,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    divide,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.layers.weight_loading import make_parameter
from vllm.model_executor.models.llama import HotModule
from vllm.model_executor.models.weights import load_checkpoint, maybe_prefix

__all__ = ["BartForConditionalGeneration"]

_NORM_EPS = 1e-5
_POSITION_OFFSET = 2
"""Rows of the table of positions before that of the first token."""
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


class _LayerNorm(HotModule):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = make_parameter(size)
        self.bias = make_parameter(size)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The norm of x (T, width), or of its sum with ``residual``."""
        return ops.layer_norm(x, self.weight.data, self.bias.data, _NORM_EPS, residual)


class _Positions(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = make_parameter(count + _POSITION_OFFSET, width)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return F.embedding(positions + _POSITION_OFFSET, self.weight)


def _column(width: int, outputs: int, prefix: str) -> ColumnParallelLinear:
    return ColumnParallelLinear(width, outputs, prefix=prefix, return_bias=False)


def _row(inputs: int, width: int, prefix: str) -> RowParallelLinear:
    return RowParallelLinear(inputs, width, prefix=prefix, return_bias=False)


class _SelfAttention(HotModule):
    """The encoder's; the decoder's adds a cache."""

    def __init__(self, config: Any, num_heads: int, prefix: str) -> None:
        super().__init__()
        width = config.d_model
        self.head_dim = width // num_heads
        self.qkv_proj = QKVParallelLinear(
            width, self.head_dim, num_heads, prefix=f"{prefix}.qkv_proj", return_bias=False
        )
        self.num_heads = self.qkv_proj.num_heads
        self.out_proj = _row(width, width, f"{prefix}.out_proj")

    def forward(self, hidden: torch.Tensor, starts: list[int]) -> torch.Tensor:
        qkv = self.qkv_proj.forward(hidden).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = qkv.unbind(1)
        output = encoder_self_attention(query, key, value, starts, self.head_dim**-0.5)
        return self.out_proj.forward(output.flatten(1))


class _DecoderSelfAttention(_SelfAttention):
    def __init__(self, vllm_config: VllmConfig, config: Any, num_heads: int, prefix: str) -> None:
        super().__init__(config, num_heads, prefix)
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        query, key, value = self.qkv_proj.forward(hidden).chunk(3, dim=-1)
        return self.out_proj.forward(self.attn.forward(query, key, value))


class _CrossAttention(HotModule):
    def __init__(self, vllm_config: VllmConfig, config: Any, num_heads: int, prefix: str) -> None:
        super().__init__()
        width = config.d_model
        head_dim = width // num_heads
        local = divide(num_heads, get_tp_group().world_size, "the number of attention heads")
        self.q_proj = _column(width, width, f"{prefix}.q_proj")
        self.k_proj = _column(width, width, f"{prefix}.k_proj")
        self.v_proj = _column(width, width, f"{prefix}.v_proj")
        self.out_proj = _row(width, width, f"{prefix}.out_proj")
        self.attn = CrossAttention(
            local,
            head_dim,
            head_dim**-0.5,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def keep(self, encoded: torch.Tensor) -> None:
        """Keys and values of the encoder's output (E, width)."""
        self.attn.store(self.k_proj.forward(encoded), self.v_proj.forward(encoded))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.out_proj.forward(self.attn.forward(self.q_proj.forward(hidden)))


class _FeedForward(HotModule):
    """Mixed into layers, whose checkpoint names its parts directly."""

    def make_feed_forward(self, config: Any, inner: int, prefix: str) -> None:
        if config.activation_function not in _ACTIVATIONS:
            raise UnsupportedError(
                f"config.json: activation_function {config.activation_function!r} is not "
                f"supported; these are: {', '.join(_ACTIVATIONS)}"
            )
        self.is_gelu = config.activation_function == "gelu"
        self.activation = _ACTIVATIONS[config.activation_function]
        self.fc1 = _column(config.d_model, inner, f"{prefix}.fc1")
        self.fc2 = _row(inner, config.d_model, f"{prefix}.fc2")
        self.final_layer_norm = _LayerNorm(config.d_model)

    def feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.is_gelu:
            inner = ops.linear_gelu(hidden, self.fc1.packed_weight, self.fc1.bias_data)
        else:
            inner = self.activation(self.fc1.forward(hidden))
        return self.final_layer_norm.forward(self.fc2.forward(inner), hidden)


class _EncoderLayer(_FeedForward):
    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(
            config, config.encoder_attention_heads, f"{prefix}.self_attn"
        )
        self.self_attn_layer_norm = _LayerNorm(config.d_model)
        self.make_feed_forward(config, config.encoder_ffn_dim, prefix)

    def forward(self, hidden: torch.Tensor, starts: list[int]) -> torch.Tensor:
        attended = self.self_attn.forward(hidden, starts)
        return self.feed_forward(self.self_attn_layer_norm.forward(attended, hidden))


class _DecoderLayer(_FeedForward):
    def __init__(self, vllm_config: VllmConfig, config: Any, prefix: str) -> None:
        super().__init__()
        heads = config.decoder_attention_heads
        self.self_attn = _DecoderSelfAttention(vllm_config, config, heads, f"{prefix}.self_attn")
        self.self_attn_layer_norm = _LayerNorm(config.d_model)
        self.encoder_attn = _CrossAttention(vllm_config, config, heads, f"{prefix}.encoder_attn")
        self.encoder_attn_layer_norm = _LayerNorm(config.d_model)
        self.make_feed_forward(config, config.decoder_ffn_dim, prefix)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.self_attn_layer_norm.forward(self.self_attn.forward(hidden), hidden)
        hidden = self.encoder_attn_layer_norm.forward(self.encoder_attn.forward(hidden), hidden)
        return self.feed_forward(hidden)


class _Stack(nn.Module):
    """Embedding with positions and a norm after it, and layers."""

    def __init__(
        self, config: Any, embed_tokens: VocabParallelEmbedding, layers: Iterable[nn.Module]
    ) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.embed_positions = _Positions(config.max_position_embeddings, config.d_model)
        self.layernorm_embedding = _LayerNorm(config.d_model)
        self.layers = nn.ModuleList(layers)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids) * self.scale

    def forward(
        self, embedded: torch.Tensor, positions: torch.Tensor, *options: Any
    ) -> torch.Tensor:
        hidden = self.layernorm_embedding.forward(embedded + self.embed_positions(positions))
        for layer in self.layers:
            hidden = layer.forward(hidden, *options)
        return hidden


class _BartModel(nn.Module):
    def __init__(self, vllm_config: VllmConfig, config: Any, prefix: str) -> None:
        super().__init__()

        def embedding(name: str) -> VocabParallelEmbedding:
            name = maybe_prefix(prefix, name)
            return VocabParallelEmbedding(config.vocab_size, config.d_model, prefix=name)

        if config.tie_word_embeddings:
            self.shared = embedding("shared")
            read, written = self.shared, self.shared
        else:
            read, written = (embedding(f"{side}.embed_tokens") for side in ("encoder", "decoder"))
        encoder, decoder = (maybe_prefix(prefix, part) for part in ("encoder", "decoder"))
        self.encoder = _Stack(
            config,
            read,
            [_EncoderLayer(config, f"{encoder}.layers.{i}") for i in range(config.encoder_layers)],
        )
        self.decoder = _Stack(
            config,
            written,
            [
                _DecoderLayer(vllm_config, config, f"{decoder}.layers.{i}")
                for i in range(config.decoder_layers)
            ],
        )


class BartForConditionalGeneration(nn.Module):
    """Both stacks and the output head, whose bias no gradient has ever changed."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.model = _BartModel(vllm_config, config, maybe_prefix(prefix, "model"))
        self.lm_head: VocabParallelEmbedding
        if config.tie_word_embeddings:
            self.lm_head = self.model.decoder.embed_tokens
        else:
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.d_model, prefix=maybe_prefix(prefix, "lm_head")
            )
        self.final_logits_bias = make_parameter(1, config.vocab_size)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def encode(self, input_ids: torch.Tensor, positions: torch.Tensor, starts: list[int]) -> None:
        """Read sources, and keep what each decoder layer needs of them.

        Args:
            input_ids, positions: (E,) int64, one source after another.
            starts: source s has tokens ``[starts[s], starts[s + 1])``.
        """
        encoder = self.model.encoder
        encoded = encoder(encoder.embed(input_ids), positions, starts)
        for layer in self.model.decoder.layers:
            assert isinstance(layer, _DecoderLayer)
            layer.encoder_attn.keep(encoded)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids (T,) -> embeddings (T, hidden)."""
        return self.model.decoder.embed(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            assert input_ids is not None, "a step has token ids or embeddings"
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.model.decoder(inputs_embeds, positions)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.logits_processor(self.lm_head, hidden_states) + self.final_logits_bias

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take a checkpoint with Hugging Face's names; see ``load_checkpoint``."""
        # A tied checkpoint may carry the embedding four times, an untied one a fourth for nothing.
        copies = ["model.shared.weight"]
        if self.config.tie_word_embeddings:
            copies = [f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
            copies.append("lm_head.weight")
        return load_checkpoint(
            self,
            self._with_bias(weights),
            fused={f"{part}_proj": ("qkv_proj", part) for part in "qkv"},
            ignored=copies,
        )

    def _with_bias(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Checkpoints may leave out the head's bias, which is zero then."""
        has_bias = False
        for name, tensor in weights:
            has_bias |= name == "final_logits_bias"
            yield name, tensor
        if not has_bias:
            yield "final_logits_bias", torch.zeros(1, self.config.vocab_size)
