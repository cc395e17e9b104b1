"""ROCM_AITER_FA and ROCM_AITER_UNIFIED_ATTN: kernels of AMD's aiter where it is installed.

ROCM_AITER_UNIFIED_ATTN hands the whole step to aiter's unified kernel, which reads K and V as
strided views ``(B, N, K, D)`` of the packed cache. ROCM_AITER_FA gives it prompts without a
prefix, whose keys and values are in hand; what reads the cache is the portable kernels' of
ROCM_ATTN. Neither has been run on this hardware: tests check the calls against a stand-in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from vllm.v1.attention.backend import CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.libraries import library, why_missing
from vllm.v1.attention.backends.rocm_attn import SplitAttentionBackend, SplitAttentionImpl
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

__all__ = ["AiterFlashAttentionBackend", "AiterUnifiedAttentionBackend"]


@dataclass(slots=True)
class AiterMetadata(TritonAttentionMetadata):
    is_fresh: bool = False
    """No request has tokens in the cache from before this step."""


class AiterMetadataBuilder(TritonAttentionMetadataBuilder):
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> AiterMetadata:
        base = super().build(0, common_attn_metadata, fast_build)
        values = {field.name: getattr(base, field.name) for field in fields(base)}
        before = common_attn_metadata.num_computed_tokens_cpu[: common_attn_metadata.num_reqs]
        return AiterMetadata(**values, is_fresh=not bool(before.any()))


class AiterFlashAttentionImpl(SplitAttentionImpl):
    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: AiterMetadata,  # type: ignore[override]
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        step = attn_metadata
        # The library's kernel knows neither soft caps nor sinks.
        plain = not self.logits_soft_cap and self.sinks is None
        if not (step.is_fresh and plain and key is not None and value is not None):
            return super().forward(layer, query, key, value, kv_cache, step, output)
        tokens = step.num_actual_tokens
        window = self.sliding_window - 1 if self.sliding_window else -1
        slopes = self.alibi_slopes
        library("aiter").flash_attn_varlen_func(
            query[:tokens],
            key[:tokens],
            value[:tokens],
            cu_seqlens_q=step.query_start_loc,
            cu_seqlens_k=step.query_start_loc,
            max_seqlen_q=step.max_query_len,
            max_seqlen_k=step.max_query_len,
            softmax_scale=self.scale,
            causal=step.causal,
            window_size=(window, 0 if self.sliding_window and step.causal else window),
            alibi_slopes=None if slopes is None else slopes.to(query.device),
            out=output[:tokens],
        )
        return output


class AiterUnifiedAttentionImpl(SplitAttentionImpl):
    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: AiterMetadata,  # type: ignore[override]
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        step = attn_metadata
        if not step.causal:
            return super().forward(layer, query, key, value, kv_cache, step, output)
        keys, values = (part.transpose(1, 2) for part in self._split(kv_cache))
        tokens = step.num_actual_tokens
        slopes = self.alibi_slopes
        library("aiter.ops.triton.unified_attention").unified_attention(
            q=query[:tokens],
            k=keys,
            v=values,
            out=output[:tokens],
            cu_seqlens_q=step.query_start_loc,
            max_seqlen_q=step.max_query_len,
            seqused_k=step.seq_lens,
            max_seqlen_k=step.max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            alibi_slopes=None if slopes is None else slopes.to(query.device),
            window_size=(self.sliding_window - 1, 0) if self.sliding_window else (-1, -1),
            block_table=step.block_table,
            softcap=self.logits_soft_cap,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            sinks=self.sinks,
        )
        return output


class _AiterBackend(SplitAttentionBackend):
    supported_dtypes = [torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes = ["auto", "bfloat16", "float16"]
    fits_cuda_graphs = False

    @staticmethod
    def get_builder_cls() -> type[AiterMetadataBuilder]:
        return AiterMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> Sequence[int | MultipleOf]:
        return [16, 32]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [64, 128, 256]

    @classmethod
    def validate_configuration(cls, **wanted: Any) -> list[str]:
        reasons = super().validate_configuration(**wanted) + why_missing("aiter")
        if torch.version.hip is None:
            reasons.append("needs an AMD GPU and a build of torch for ROCm")
        return reasons


class AiterFlashAttentionBackend(_AiterBackend):
    @staticmethod
    def get_name() -> str:
        return "ROCM_AITER_FA"

    @staticmethod
    def get_impl_cls() -> type[SplitAttentionImpl]:
        return AiterFlashAttentionImpl


class AiterUnifiedAttentionBackend(_AiterBackend):
    @staticmethod
    def get_name() -> str:
        return "ROCM_AITER_UNIFIED_ATTN"

    @staticmethod
    def get_impl_cls() -> type[SplitAttentionImpl]:
        return AiterUnifiedAttentionImpl
