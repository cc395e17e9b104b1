"""Zamba 2: Mamba 2 layers; some of them look through one of a few attention blocks that they share.

A shared block has one set of weights, low-rank adapters of its own for each layer that uses it,
and sees the layer's input beside the embedding. Each such layer has a cache of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.errors import UnsupportedError
from vllm.model_executor.layers.activation import get_gated_activation
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding, get_rope
from vllm.model_executor.models.hybrid import HybridForCausalLM, HybridModel, add_and_norm
from vllm.model_executor.models.llama import HotModule

__all__ = ["Zamba2ForCausalLM", "Zamba2Model", "Zamba2SharedBlock"]

_MIXER_NORM_EPS = 1e-5
"""Of the gated norm; config.json has no field for it."""


class Adapters(nn.ModuleDict):
    """Low-rank additions to a projection, one for each layer that uses a shared block."""

    def __init__(
        self, layers: Iterable[int], sizes: tuple[int, int, list[int]], prefix: str
    ) -> None:
        hidden, rank, outputs = sizes
        super().__init__()
        for number in layers:
            name = f"{prefix}.{number}"
            down = ReplicatedLinear(hidden, rank, bias=False, prefix=f"{name}.0", return_bias=False)
            up: ColumnParallelLinear
            if len(outputs) == 1:
                up = ColumnParallelLinear(
                    rank, outputs[0], bias=False, prefix=f"{name}.1", return_bias=False
                )
            else:
                up = MergedColumnParallelLinear(
                    rank, outputs, bias=False, prefix=f"{name}.1", return_bias=False
                )
            self[str(number)] = nn.Sequential(down, up)

    def add(self, number: int, output: torch.Tensor, x: torch.Tensor) -> None:
        """Add the adapter's product to ``output``."""
        adapter = self[str(number)]
        assert isinstance(adapter, nn.Sequential)
        output += adapter.forward(x)


class Zamba2Attention(HotModule):
    """The projections of a shared block; the caller brings the layer with the cache."""

    def __init__(
        self, vllm_config: VllmConfig, config: Any, numbers: list[int], prefix: str
    ) -> None:
        super().__init__()
        width = 2 * config.hidden_size
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            width,
            self.head_dim,
            heads,
            kv_heads,
            bias=False,
            prefix=f"{prefix}.qkv_proj",
            return_bias=False,
        )
        self.num_heads = self.qkv_proj.num_heads
        self.num_kv_heads = self.qkv_proj.num_kv_heads
        kv_size = self.num_kv_heads * self.head_dim
        self.split_sizes = [self.num_heads * self.head_dim, kv_size, kv_size]
        self.o_proj = RowParallelLinear(
            heads * self.head_dim,
            config.hidden_size,
            bias=False,
            prefix=f"{prefix}.o_proj",
            return_bias=False,
        )
        self.has_adapters = config.use_shared_attention_adapter
        if self.has_adapters:
            if heads != kv_heads:
                raise UnsupportedError(
                    f"config.json: use_shared_attention_adapter needs as many key as query heads, "
                    f"not {kv_heads} and {heads}",
                    parameter="model",
                )
            sizes = (width, config.adapter_rank, [width])
            for part in "qkv":
                name = f"linear_{part}_adapter_list"
                self.add_module(name, Adapters(numbers, sizes, f"{prefix}.{name}"))
        self.rotary_emb: RotaryEmbedding | None = None
        if config.use_mem_rope:
            self.rotary_emb = get_rope(
                self.head_dim,
                max_position=vllm_config.model_config.max_model_len,
                rope_parameters=config.rope_parameters,
                trained_max_position=config.max_position_embeddings,
            )

    def forward(
        self, positions: torch.Tensor, x: torch.Tensor, number: int, attn: Attention
    ) -> torch.Tensor:
        qkv = self.qkv_proj.forward(x)
        query, key, value = torch.split_with_sizes(qkv, self.split_sizes, dim=-1)
        if self.has_adapters:
            for name, part in zip("qkv", (query, key, value), strict=True):
                adapters = self._modules[f"linear_{name}_adapter_list"]
                assert isinstance(adapters, Adapters)
                adapters.add(number, part, x)
        output = attn.forward(query, key, value, None, positions, self.rotary_emb)
        return self.o_proj.forward(output)


class Zamba2MLP(HotModule):
    def __init__(self, config: Any, numbers: list[int], prefix: str) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        bias = config.add_bias_linear
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [inner, inner], bias=bias, prefix=f"{prefix}.gate_up_proj", return_bias=False
        )
        self.gate_up_proj_adapter_list = Adapters(
            numbers,
            (hidden, config.adapter_rank, [inner, inner]),
            f"{prefix}.gate_up_proj_adapter_list",
        )
        self.down_proj = RowParallelLinear(
            inner, hidden, bias=bias, prefix=f"{prefix}.down_proj", return_bias=False
        )
        self.activation = get_gated_activation(config.hidden_act)

    def forward(self, x: torch.Tensor, number: int) -> torch.Tensor:
        gate_up = self.gate_up_proj.forward(x)
        self.gate_up_proj_adapter_list.add(number, gate_up, x)
        return self.down_proj.forward(self.activation.forward(gate_up))


class Zamba2SharedBlock(HotModule):
    """Attention and MLP, each behind a norm, without residual sums.

    Args:
        numbers: which of the layers with attention, counted among themselves, use this block.
    """

    def __init__(
        self, vllm_config: VllmConfig, config: Any, numbers: list[int], prefix: str
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(2 * config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Zamba2Attention(vllm_config, config, numbers, f"{prefix}.self_attn")
        self.pre_ff_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = Zamba2MLP(config, numbers, f"{prefix}.feed_forward")

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        embedded: torch.Tensor,
        number: int,
        attn: Attention,
    ) -> torch.Tensor:
        both = torch.cat([hidden_states, embedded], dim=-1)
        attended = self.self_attn.forward(
            positions, self.input_layernorm.forward(both), number, attn
        )
        return self.feed_forward.forward(self.pre_ff_layernorm.forward(attended), number)


class Zamba2MambaLayer(HotModule):
    def __init__(self, vllm_config: VllmConfig, config: Any, prefix: str) -> None:
        super().__init__()
        inner = config.mamba_expand * config.hidden_size
        self.mamba = MambaMixer2(
            vllm_config,
            hidden_size=config.hidden_size,
            intermediate_size=inner,
            num_heads=config.n_mamba_heads,
            head_dim=inner // config.n_mamba_heads,
            n_groups=config.mamba_ngroups,
            state_size=config.mamba_d_state,
            conv_kernel=config.mamba_d_conv,
            use_conv_bias=True,
            use_bias=config.add_bias_linear,
            rms_norm_eps=_MIXER_NORM_EPS,
            time_step_limit=(config.time_step_min, float("inf")),
            prefix=f"{prefix}.mamba",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        embedded: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, residual = add_and_norm(self.input_layernorm, hidden_states, residual)
        return self.mamba.forward(hidden_states), residual


class Zamba2HybridLayer(HotModule):
    """A Mamba layer whose mixer also sees what a shared block makes of the stream.

    Args:
        number: of this layer among those with attention.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        config: Any,
        shared: Zamba2SharedBlock,
        number: int,
        prefix: str,
    ) -> None:
        super().__init__()
        self.shared_transformer = shared
        self.linear = ReplicatedLinear(
            config.hidden_size,
            config.hidden_size,
            bias=False,
            prefix=f"{prefix}.linear",
            return_bias=False,
        )
        self.mamba_decoder = Zamba2MambaLayer(vllm_config, config, prefix)
        attention = shared.self_attn
        self.attn = Attention(
            attention.num_heads,
            attention.head_dim,
            (attention.head_dim / 2) ** -0.5,
            num_kv_heads=attention.num_kv_heads,
            prefix=f"{prefix}.self_attn.attn",
        )
        self.number = number

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        embedded: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is not None:
            residual += hidden_states
        else:
            residual = hidden_states
        seen = self.shared_transformer.forward(
            positions, residual, embedded, self.number, self.attn
        )
        decoder = self.mamba_decoder
        normed = decoder.input_layernorm.forward(residual + self.linear.forward(seen))
        return decoder.mamba.forward(normed), residual


class Zamba2Model(HybridModel):
    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            assert input_ids is not None, "a step has token ids or embeddings"
            inputs_embeds = self.embed_input_ids(input_ids)
        hidden_states = inputs_embeds.clone()  # the residual stream is added to in place
        residual: torch.Tensor | None = None
        for layer in self.layers:
            hidden_states, residual = layer.forward(
                positions, hidden_states, residual, inputs_embeds
            )
        return add_and_norm(self.norm, hidden_states, residual)[0]


class Zamba2ForCausalLM(HybridForCausalLM):
    body_cls = Zamba2Model

    def make_layer(
        self, vllm_config: VllmConfig, config: Any, layer_index: int, prefix: str
    ) -> nn.Module:
        hybrid = [i for i, kind in enumerate(config.layer_types) if kind == "hybrid"]
        if layer_index not in hybrid:
            return Zamba2MambaLayer(vllm_config, config, prefix)
        number = hybrid.index(layer_index)
        block = number % config.num_mem_blocks
        blocks: list[Zamba2SharedBlock] = self.__dict__.setdefault("shared_blocks", [])
        if block == len(blocks):
            numbers = list(range(block, len(hybrid), config.num_mem_blocks))
            blocks.append(
                Zamba2SharedBlock(vllm_config, config, numbers, f"{prefix}.shared_transformer")
            )
        return Zamba2HybridLayer(vllm_config, config, blocks[block], number, prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """A checkpoint may hold a shared block once for each layer that uses it: one counts."""
        hybrid = [i for i, kind in enumerate(self.config.layer_types) if kind == "hybrid"]
        first = {
            str(layer): str(hybrid[number % self.config.num_mem_blocks])
            for number, layer in enumerate(hybrid)
        }

        def once() -> Iterator[tuple[str, torch.Tensor]]:
            seen: set[str] = set()
            for name, tensor in weights:
                parts = name.split(".")
                if len(parts) > 3 and parts[3] == "shared_transformer":
                    parts[2] = first.get(parts[2], parts[2])
                    name = ".".join(parts)
                    if name in seen:
                        continue
                    seen.add(name)
                yield name, tensor

        return super().load_weights(once())
