"""Attention of a decoder to an encoder's output, and the encoder's to itself.

The encoder's output is kept as keys and values of each decoder layer, written once a request; it
has the encoder's length, and every token of the decoder sees all of it. The encoder itself keeps
nothing.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache.declare import cross_attention_spec
from vllm.v1.kv_cache_interface import KVCacheSpec

__all__ = ["CrossAttention", "encoder_self_attention"]


class CrossAttention(Attention):
    """``Attention`` whose keys and values are an encoder's; arguments as there."""

    def __init__(self, num_heads: int, head_size: int, scale: float, **options: Any) -> None:
        super().__init__(
            num_heads, head_size, scale, attn_type=AttentionType.ENCODER_DECODER, **options
        )

    def store(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep keys and values (E, K * D) of the encoder's tokens of this step."""
        metadata = get_forward_context().attn_metadata
        assert metadata is not None, "a run without caches reads no source"
        heads = (-1, self.head_size)
        self.impl.do_kv_cache_update(
            self,
            key.unflatten(-1, heads),
            value.unflatten(-1, heads),
            self.kv_cache,
            metadata[self.layer_name].slot_mapping,
        )

    def forward(  # type: ignore[override]
        self, query: torch.Tensor
    ) -> torch.Tensor:
        """(T, Q * D) -> (T, Q * D); zeros in a run without caches."""
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return output.zero_()
        heads = (-1, self.head_size)
        self.impl.forward(
            self,
            query.unflatten(-1, heads),
            None,
            None,
            self.kv_cache,
            metadata[self.layer_name],
            output.unflatten(-1, heads),
        )
        return output

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        return cross_attention_spec(
            vllm_config,
            self.layer_name,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
        )


def encoder_self_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: list[int],
    scale: float,
) -> torch.Tensor:
    """Every token of a source sees all of it.

    Args:
        query, key, value: (E, Q, D).
        starts: source s has tokens ``[starts[s], starts[s + 1])``.

    Returns:
        (E, Q, D).
    """
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    table = torch.zeros((1, 1), dtype=torch.int32, device=query.device)
    for first, last in itertools.pairwise(starts):
        tokens = slice(first, last)
        # One block of all tokens, as the kernel for caches reads it.
        block = torch.cat((key[tokens], value[tokens]), dim=-1).transpose(0, 1).unsqueeze(0)
        count = torch.tensor([0, last - first], dtype=torch.int32, device=query.device)
        ops.paged_attention(
            query[tokens], block, output[tokens], count, count[1:], table, scale, causal=False
        )
    return output
