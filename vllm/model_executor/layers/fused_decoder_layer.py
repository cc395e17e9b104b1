"""Whole pre-norm decoder layers as one kernel call on the CPU.

At one token a layer's weights are read in 0.4 ms; a dozen operators called one by one add 0.1 ms
of interpreter to that. The kernel runs the same operators in the same order with the same
roundings, so results are equal to the last bit. Models offer their layers; a layer that the kernel
does not know (another device, tensor parallelism, another attention backend) is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from vllm._decoder_layer_op import DecoderLayerKernel, run_decoder_layers
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.v1.attention.backends.cpu_attn import CPUAttentionImpl

__all__ = ["FusedDecoderLayer", "FusedDecoderStack"]


class FusedDecoderLayer:
    """Holds the addresses of one layer's weights; made by ``of`` once they are loaded."""

    def __init__(self, attn: Attention, kernel: DecoderLayerKernel) -> None:
        self.attn = attn
        self.layer_name = attn.layer_name
        self.kernel = kernel

    @classmethod
    def of(
        cls,
        *,
        input_norm: RMSNorm,
        qkv_proj: QKVParallelLinear,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        rotary_emb: RotaryEmbedding,
        attn: Attention,
        o_proj: RowParallelLinear,
        post_norm: RMSNorm,
        gate_up_proj: MergedColumnParallelLinear,
        down_proj: RowParallelLinear,
        branch_norms: tuple[RMSNorm | None, RMSNorm | None] = (None, None),
        gate: str = "silu",
    ) -> FusedDecoderLayer | None:
        """The kernel of a layer made of these modules, or None where there is none.

        Args:
            branch_norms: of what attention and the MLP give, before it is added.
            gate: "silu" or "gelu_tanh".
        """
        norms = [
            norm
            for norm in (input_norm, post_norm, q_norm, k_norm, *branch_norms)
            if norm is not None
        ]
        kind_of_norm = GemmaRMSNorm if type(input_norm) is GemmaRMSNorm else RMSNorm
        expected: dict[type, list[Any]] = {
            kind_of_norm: norms,
            QKVParallelLinear: [qkv_proj],
            MergedColumnParallelLinear: [gate_up_proj],
            RowParallelLinear: [o_proj, down_proj],
            RotaryEmbedding: [rotary_emb],
            Attention: [attn],
        }
        if any(type(part) is not kind for kind, parts in expected.items() for part in parts):
            return None
        impl = attn.impl
        if (
            type(impl) is not CPUAttentionImpl
            or attn.kv_sharing_target_layer_name is not None
            or o_proj.tp_size > 1
            or down_proj.tp_size > 1
            or any(norm.variance_epsilon != input_norm.variance_epsilon for norm in norms)
        ):
            return None
        kernel = DecoderLayerKernel.make(
            num_heads=attn.num_heads,
            num_kv_heads=attn.num_kv_heads,
            head_size=attn.head_size,
            eps=input_norm.variance_epsilon,
            norms=(input_norm.weight_data, post_norm.weight_data),
            head_norms=(
                None if q_norm is None else q_norm.weight_data,
                None if k_norm is None else k_norm.weight_data,
            ),
            weights=(
                qkv_proj.packed_weight,
                o_proj.packed_weight,
                gate_up_proj.packed_weight,
                down_proj.packed_weight,
            ),
            biases=(
                qkv_proj.bias_data,
                o_proj.bias_data,
                gate_up_proj.bias_data,
                down_proj.bias_data,
            ),
            cos_sin_cache=rotary_emb.cos_sin_cache,
            is_neox=rotary_emb.is_neox_style,
            alibi_slopes=impl.alibi_slopes,
            sinks=impl.sinks,
            scale=impl.scale,
            logits_soft_cap=impl.logits_soft_cap,
            sliding_window=impl.sliding_window,
            branch_norms=(
                None if branch_norms[0] is None else branch_norms[0].weight_data,
                None if branch_norms[1] is None else branch_norms[1].weight_data,
            ),
            gate=gate,
        )
        return None if kernel is None else cls(attn, kernel)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As the layer's own ``forward``; None in a profiling run, which has no cache."""
        return _run([self], positions, hidden_states, residual)


class FusedDecoderStack:
    """All layers of a model as few kernel calls: one for each run of layers of equal metadata."""

    def __init__(self, layers: Sequence[FusedDecoderLayer]) -> None:
        self.layers = layers

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The last layer's branch and the residual stream; None where layers must run singly."""
        context = get_forward_context()
        metadata, slot_mapping = context.attn_metadata, context.slot_mapping
        if metadata is None:
            return None

        def kind(layer: FusedDecoderLayer) -> tuple[int, int]:
            return id(metadata[layer.layer_name]), id(slot_mapping.get(layer.layer_name))

        residual: torch.Tensor | None = None
        for _, run in groupby(self.layers, kind):
            done = _run(list(run), positions, hidden_states, residual)
            if done is None:
                # The context forbids the first as it would the others: nothing is done yet.
                return None
            hidden_states, residual = done
        assert residual is not None, "a model has layers"
        return hidden_states, residual


def _run(
    layers: Sequence[FusedDecoderLayer],
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    context = get_forward_context()
    # Who works layer by layer (a connector, calibration) is called by each layer's own attention.
    if (
        context.attn_metadata is None
        or context.kv_layer_hook is not None
        or context.kv_scale_finder is not None
    ):
        return None
    metadata: Any = context.attn_metadata[layers[0].layer_name]
    slot_mapping = context.slot_mapping.get(layers[0].layer_name)
    for layer in layers:
        # Groups of layers with caches of their own have metadata of their own.
        if (
            context.attn_metadata[layer.layer_name] is not metadata
            or context.slot_mapping.get(layer.layer_name) is not slot_mapping
        ):
            return None
        if layer.attn.kv_cache is not layer.kernel.cache:
            impl = layer.attn.impl
            layer.kernel.bind(layer.attn.kv_cache, impl.format, impl.side_scales(layer.attn))
    has_branch = residual is not None
    if residual is None:
        residual, hidden_states = hidden_states, torch.empty_like(hidden_states)
    run_decoder_layers(
        [layer.kernel for layer in layers],
        hidden_states,
        has_branch,
        residual,
        positions,
        metadata.slot_mapping if slot_mapping is None else slot_mapping,
        metadata.query_start_loc,
        metadata.seq_lens,
        metadata.block_table,
        metadata.causal,
    )
    return hidden_states, residual
