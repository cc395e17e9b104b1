"""What models with state layers share: the residual stream, the stack of layers, the head.

A model names its parts as its checkpoints do and says what its layers are. Like every model it
knows layers; it must not know the engine, the scheduler or how a cache is laid out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.llama import HotModule, LlamaAttention, LlamaForCausalLM
from vllm.model_executor.models.weights import maybe_prefix

__all__ = [
    "AttentionWithoutRope",
    "HybridDecoderLayer",
    "HybridForCausalLM",
    "HybridModel",
    "MixerDecoderLayer",
    "add_and_norm",
]


def add_and_norm(
    norm: RMSNorm, branch: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a branch to the residual stream: (the stream's norm, the stream).

    The stream may be in float32 while branches and norms have the model's dtype. Without a stream
    the branch, an embedding, begins it.
    """
    if residual is None:
        return norm.forward(branch), branch
    if residual.dtype is branch.dtype:
        return norm.forward(branch, residual)
    residual += branch
    return norm.forward(residual.to(branch.dtype)), residual


class AttentionWithoutRope(LlamaAttention):
    """Positions are told by the state layers around it."""

    def make_rotary_emb(self, vllm_config: VllmConfig, config: Any, layer_index: int) -> None:
        return None


class MixerDecoderLayer(HotModule):
    """A norm and one mixer: ``mixer.forward(hidden)`` or ``mixer.forward(positions, hidden)``."""

    def __init__(
        self, config: Any, mixer: nn.Module, eps: float, takes_positions: bool = False
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=eps)
        self.mixer = mixer
        self.takes_positions = takes_positions

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The branch's output and the stream that it is still to be added to."""
        hidden_states, residual = add_and_norm(self.norm, hidden_states, residual)
        if self.takes_positions:
            return self.mixer.forward(positions, hidden_states), residual
        return self.mixer.forward(hidden_states), residual


class HybridDecoderLayer(HotModule, ABC):
    """Attention or a mixer that keeps a state, then an MLP or experts, each behind a norm.

    Subclasses make the parts. Where checkpoints call the norms or the MLP otherwise, their model
    says so in ``renamed_parts``.
    """

    attention_cls: ClassVar[Callable[..., nn.Module]]
    norm_cls: ClassVar[type[RMSNorm]] = RMSNorm
    mixer_name: ClassVar[str] = "mamba"
    """What checkpoints call the mixer."""

    def __init__(self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = self.norm_cls(config.hidden_size, eps=config.rms_norm_eps)
        self.attends = self.has_attention(config, layer_index)
        if self.attends:
            self.self_attn = self.attention_cls(
                vllm_config, config, layer_index, prefix=f"{prefix}.self_attn"
            )
        else:
            setattr(self, self.mixer_name, self.make_mixer(vllm_config, config, prefix))
        self.post_attention_layernorm = self.norm_cls(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = self.make_mlp(config, layer_index, f"{prefix}.mlp")

    @staticmethod
    def has_attention(config: Any, layer_index: int) -> bool:
        return config.layer_types[layer_index] == "full_attention"

    @abstractmethod
    def make_mixer(self, vllm_config: VllmConfig, config: Any, prefix: str) -> nn.Module:
        """The mixer of a layer without attention; ``prefix`` is the layer's."""

    @abstractmethod
    def make_mlp(self, config: Any, layer_index: int, prefix: str) -> nn.Module: ...

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The branch's output and the stream that it is still to be added to."""
        hidden_states, residual = add_and_norm(self.input_layernorm, hidden_states, residual)
        if self.attends:
            hidden_states = self.self_attn.forward(positions, hidden_states)
        else:
            hidden_states = getattr(self, self.mixer_name).forward(hidden_states)
        hidden_states, residual = self.post_attention_layernorm.forward(hidden_states, residual)
        return self.mlp.forward(hidden_states), residual


LayerFactory = Callable[[VllmConfig, Any, int, str], nn.Module]


class HybridModel(HotModule):
    """Embedding, layers and the last norm.

    Args:
        make_layer: (settings, configuration, number, prefix) -> a layer that takes positions, the
            last branch and the stream, and returns a branch and the stream.
        embedding_name, norm_name: what checkpoints call the embedding and the last norm.
    """

    embedding: VocabParallelEmbedding
    norm: RMSNorm

    def __init__(
        self,
        vllm_config: VllmConfig,
        prefix: str,
        make_layer: LayerFactory,
        embedding_name: str,
        norm_name: str,
    ) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_text_config
        embedding = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, embedding_name)
        )
        norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.add_module(embedding_name, embedding)
        self.add_module(norm_name, norm)
        # Aliases beside the names of the checkpoint, which the module tree does not see.
        self.__dict__["embedding"], self.__dict__["norm"] = embedding, norm
        self.layers = nn.ModuleList(
            make_layer(vllm_config, config, index, maybe_prefix(prefix, f"layers.{index}"))
            for index in range(config.num_hidden_layers)
        )
        self.embedding_multiplier = getattr(config, "embedding_multiplier", None) or 1.0
        self.residual_dtype: torch.dtype | None = None
        if getattr(config, "residual_in_fp32", False):
            self.residual_dtype = torch.float32

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids (T,) -> what the first layer takes, (T, hidden)."""
        hidden_states = self.embedding(input_ids)
        if self.embedding_multiplier != 1.0:
            hidden_states = hidden_states * self.embedding_multiplier
        return hidden_states

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
        residual: torch.Tensor | None = None
        if self.residual_dtype not in (None, hidden_states.dtype):
            residual = torch.zeros_like(hidden_states, dtype=self.residual_dtype)
        for layer in self.layers:
            hidden_states, residual = layer.forward(positions, hidden_states, residual)
        return add_and_norm(self.norm, hidden_states, residual)[0]


class HybridForCausalLM(LlamaForCausalLM):
    """A ``HybridModel`` with its output head. Subclasses say what their layers are."""

    body_name: ClassVar[str] = "model"
    embedding_name: ClassVar[str] = "embed_tokens"
    norm_name: ClassVar[str] = "final_layernorm"
    body_cls: ClassVar[type[HybridModel]] = HybridModel
    body: HybridModel

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        HotModule.__init__(self)
        config = vllm_config.model_config.hf_text_config
        self.config = config
        body = self.body_cls(
            vllm_config,
            maybe_prefix(prefix, self.body_name),
            self.make_layer,
            self.embedding_name,
            self.norm_name,
        )
        self.add_module(self.body_name, body)
        self.__dict__["body"] = body
        if config.tie_word_embeddings:
            self.lm_head = body.embedding
        else:
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
            )
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def make_layer(
        self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str
    ) -> nn.Module:
        """Layer ``layer_index``; its parts are named as in checkpoints."""
        return self.layer_cls(vllm_config, config, layer_index, prefix)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.body.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.body.forward(input_ids, positions, inputs_embeds)
