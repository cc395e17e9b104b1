"""FLASHINFER_MLA: latents by flashinfer-python's kernel for pages of latents.

It knows one shape, latents of 512 with 64 rotated numbers, and takes both parts as strided views
of the cache. Prompts are expanded as TRITON_MLA does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from vllm.v1.attention.backend import AttentionImpl, MultipleOf
from vllm.v1.attention.backends.libraries import capability, library, why_missing
from vllm.v1.attention.backends.mla.triton_mla import Absorbed, TritonMLABackend, TritonMLAImpl
from vllm.v1.kv_cache_interface import KVCacheSpec

__all__ = ["FlashInferMLABackend"]

_WORKSPACE_BYTES = 128 << 20


@functools.cache
def _wrapper(device: torch.device) -> Any:
    """The library's wrapper; all layers of a model share one plan of a step, and its workspace."""
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return library("flashinfer.mla").BatchMLAPagedAttentionWrapper(workspace)


@functools.cache
def _copied(device: torch.device) -> torch.cuda.Event | None:
    """Recorded behind each plan, whose host memory the next one overwrites."""
    return torch.cuda.Event() if device.type == "cuda" else None


class FlashInferMLAImpl(TritonMLAImpl):
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
        wrapper = _wrapper(query.device)
        kind = (layer.num_heads, self.scale, query.dtype)
        if step.library_plans.get("latest") != kind:
            self._plan(wrapper, layer, query, kv_cache, step)
            step.library_plans["latest"] = kind
        sums = wrapper.run(
            layer.kv_b_proj.absorb_queries(query[..., :nope]).transpose(0, 1),
            query[..., nope:],
            kv_cache[..., :rank],
            kv_cache[..., rank:],
        )
        output.copy_(layer.kv_b_proj.expand_values(sums.transpose(0, 1)).transpose(0, 1))

    def _plan(
        self,
        wrapper: Any,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        step: Absorbed,
    ) -> None:
        page = kv_cache.shape[1]
        counts = -(-step.host_lens.astype(np.int64) // page)
        ends = torch.zeros(counts.size + 1, dtype=torch.int32)
        ends[1:] = torch.from_numpy(counts.cumsum())
        total, device = int(ends[-1]), query.device
        on_device = torch.from_numpy(counts).to(device, non_blocking=True)
        rows = torch.repeat_interleave(
            torch.arange(counts.size, device=device), on_device, output_size=total
        )
        first = on_device.cumsum(0) - on_device
        columns = torch.arange(total, device=device) - first[rows]
        copied = _copied(device)
        if copied is not None:
            copied.synchronize()
        wrapper.plan(
            torch.arange(counts.size + 1, dtype=torch.int32),
            ends,
            step.block_table[rows, columns],
            torch.from_numpy(step.host_lens.astype(np.int32)),
            layer.num_heads,
            layer.kv_lora_rank,
            layer.qk_rope_head_dim,
            page,
            True,
            self.scale,
            query.dtype,
            kv_cache.dtype,
        )
        if copied is not None:
            copied.record()


class FlashInferMLABackend(TritonMLABackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]
    fits_cuda_graphs = False

    @staticmethod
    def get_name() -> str:
        return "FLASHINFER_MLA"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return FlashInferMLAImpl

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> Sequence[int | MultipleOf]:
        return [32, 64]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [576]

    @classmethod
    def validate_configuration(cls, **wanted: Any) -> list[str]:
        reasons = super().validate_configuration(**wanted) + why_missing("flashinfer")
        if capability() < (8, 0):
            reasons.append("needs an NVIDIA GPU of compute capability 8.0 or later")
        return reasons
