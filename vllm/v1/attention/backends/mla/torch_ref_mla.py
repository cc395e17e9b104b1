"""TORCH_REF_MLA: attention to latents themselves, in plain PyTorch, on any device and for any size.

The reference of the other backends, and what runs where they cannot. Owns no cache and no weight;
takes every address from the cache tensor's strides.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from vllm import _torch_ops
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl
from vllm.v1.attention.backends.mla.common import MLAImpl
from vllm.v1.attention.backends.torch_ref import (
    PagedAttentionMetadata,
    PagedAttentionMetadataBuilder,
)

__all__ = ["TorchRefMLABackend", "TorchRefMLAImpl"]


class TorchRefMLAImpl(MLAImpl[PagedAttentionMetadata]):
    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: PagedAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Query (T, Q, nope + rope) and latents (B, N, R + rope) -> output (T, Q, v)."""
        nope, rotated = query.split([layer.qk_nope_head_dim, layer.qk_rope_head_dim], dim=-1)
        absorbed = layer.kv_b_proj.absorb_queries(nope).transpose(0, 1)
        sums = absorbed.new_empty(absorbed.shape)
        _torch_ops.paged_attention(
            torch.cat((absorbed, rotated), dim=-1),
            kv_cache.unsqueeze(1),
            sums,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            self.scale,
            value_offset=0,
        )
        return output.copy_(layer.kv_b_proj.expand_values(sums.transpose(0, 1)).transpose(0, 1))


class TorchRefMLABackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
    ]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "bfloat16", "float16", "float32"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "TORCH_REF_MLA"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return TorchRefMLAImpl

    @staticmethod
    def get_builder_cls() -> type[PagedAttentionMetadataBuilder]:
        return PagedAttentionMetadataBuilder

    @classmethod
    def is_mla(cls) -> bool:
        return True
