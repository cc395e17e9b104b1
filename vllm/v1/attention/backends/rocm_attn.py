"""ROCM_ATTN: portable Triton kernels over K and V as two strided views of the packed cache.

Prefix prefill and paged decode take 4-D strides; there is no tiling of the head size, so the cache
lies as it does for every other backend. The kernels use nothing of one vendor: they run on NVIDIA
GPUs too, where they are tested, and under TRITON_INTERPRET=1. Not run on AMD hardware yet.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm.v1.attention.backends.torch_ref import PagedAttentionImpl
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionMetadata,
)
from vllm.v1.attention.ops.paged_attn import PagedAttention
from vllm.v1.attention.ops.triton_split_attention import split_attention, store_split

__all__ = ["RocmAttentionBackend", "SplitAttentionBackend", "SplitAttentionImpl"]


class SplitAttentionImpl(PagedAttentionImpl[TritonAttentionMetadata]):
    """Takes the content apart into K of ``head_size`` and V of what is left."""

    def _split(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        width_v = kv_cache.shape[3] - self.head_size
        return PagedAttention.split_kv_cache(kv_cache, self.num_kv_heads, self.head_size, width_v)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: TritonAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Query (T, Q, D) and cache (B, K, N, D + Dv) -> output (T, Q, Dv)."""
        split_attention(
            query,
            *self._split(kv_cache),
            output,
            query_start_loc=attn_metadata.query_start_loc,
            seq_lens=attn_metadata.seq_lens,
            block_table=attn_metadata.block_table,
            max_query_len=attn_metadata.max_query_len,
            max_seq_len=attn_metadata.max_seq_len,
            scale=self.scale,
            has_decodes=attn_metadata.plan is not None,
            plan=attn_metadata.plan,
            window=self.sliding_window,
            soft_cap=self.logits_soft_cap,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            causal=attn_metadata.causal,
        )
        return output

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        store_split(key, value, *self._split(kv_cache), slot_mapping)


class SplitAttentionBackend(TritonAttentionBackend):
    """What the backends over these kernels declare: as TRITON_ATTN, but for plain caches alone."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "bfloat16", "float16", "float32"]
    fits_prompt_graphs = False

    @staticmethod
    def get_impl_cls() -> type[SplitAttentionImpl]:
        return SplitAttentionImpl

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(range(8, 257, 8))


class RocmAttentionBackend(SplitAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "ROCM_ATTN"
