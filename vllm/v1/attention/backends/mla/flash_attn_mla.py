"""FLASH_ATTN_MLA: latents by flash-attn-4, which reads them as keys and values at once.

Its absorbed kernel knows one shape, latents of 512 with 64 rotated numbers, on Blackwell
data-centre GPUs; elsewhere it declines. Prompts are expanded as TRITON_MLA does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from vllm.v1.attention.backend import AttentionImpl, MultipleOf
from vllm.v1.attention.backends.libraries import capability, library, why_missing
from vllm.v1.attention.backends.mla.triton_mla import (
    Absorbed,
    TritonMLABackend,
    TritonMLAImpl,
    TritonMLAMetadata,
)
from vllm.v1.attention.ops.triton_tails import clear_tails
from vllm.v1.kv_cache_interface import KVCacheSpec

__all__ = ["FlashAttentionMLABackend"]


class FlashAttentionMLAImpl(TritonMLAImpl):
    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: TritonMLAMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # It reads whole pages.
        step = attn_metadata
        clear_tails(kv_cache, step.block_table, step.query_start_loc, step.seq_lens)
        return super().forward(layer, query, key, value, kv_cache, step, output)

    def forward_mqa(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        step: Absorbed,
        output: torch.Tensor,
    ) -> None:
        """Attend to latents; query (T, Q, nope + rope) -> output (T, Q, v)."""
        nope, rank = layer.qk_nope_head_dim, layer.kv_lora_rank
        latents = kv_cache.unsqueeze(2)
        result = library("flash_attn.cute.interface").flash_attn_varlen_func(
            query[..., nope:],
            latents[..., rank:],
            latents[..., :rank],
            qv=layer.kv_b_proj.absorb_queries(query[..., :nope]).transpose(0, 1),
            cu_seqlens_q=step.query_start_loc,
            max_seqlen_q=1,
            seqused_k=step.seq_lens,
            page_table=step.block_table,
            softmax_scale=self.scale,
            causal=True,
        )
        sums = result[0] if isinstance(result, tuple) else result
        output.copy_(layer.kv_b_proj.expand_values(sums.transpose(0, 1)).transpose(0, 1))


class FlashAttentionMLABackend(TritonMLABackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        return "FLASH_ATTN_MLA"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return FlashAttentionMLAImpl

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> Sequence[int | MultipleOf]:
        return [64, 128]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [576]

    @classmethod
    def validate_configuration(cls, **wanted: Any) -> list[str]:
        reasons = super().validate_configuration(**wanted) + why_missing("flash_attn.cute")
        if capability()[0] not in (10, 11):
            reasons.append("its absorbed kernel needs a GPU of compute capability 10 or 11")
        return reasons
