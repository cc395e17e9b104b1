"""TURBOQUANT: attention over TurboQuant slots by the Triton kernels, on any layout.

Keys are stored rotated, so queries are rotated before they meet them; values are as they were.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
)
from vllm.v1.attention.ops.triton_slots import store_slots
from vllm.v1.attention.ops.turboquant import TURBOQUANT_FORMATS, TurboQuantFormat, hadamard

__all__ = ["TurboQuantBackend", "TurboQuantImpl"]


class TurboQuantImpl(TritonAttentionImpl):
    format: TurboQuantFormat

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
        if self.format.rotates:
            turned = query.float() @ hadamard(self.head_size, query.device)
            query = turned.to(query.dtype)
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, output)

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        store_slots(key, value, kv_cache, slot_mapping, self.format)

    def fused_rope_kvcache_supported(self) -> bool:
        return False

    def fused_head_norms_supported(self) -> bool:
        return False


class TurboQuantBackend(TritonAttentionBackend):
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(TURBOQUANT_FORMATS)

    @staticmethod
    def get_name() -> str:
        return "TURBOQUANT"

    @staticmethod
    def get_impl_cls() -> type[TurboQuantImpl]:
        return TurboQuantImpl

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [16, 32, 64, 128, 256]
