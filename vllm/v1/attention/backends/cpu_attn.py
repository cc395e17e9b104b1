"""CPU_ATTN: paged attention by the C++ kernels, PyTorch's where the extension is not built.

Any layout, page and padding: the kernels take every distance from the cache tensor's strides.
K and V of a token lie side by side, as on every other device.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import ClassVar

import torch

from vllm import _custom_ops as ops
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.attention.backends.torch_ref import (
    OperatorAttentionImpl,
    PagedAttentionMetadataBuilder,
)
from vllm.v1.attention.ops.kv_formats import FORMATS
from vllm.v1.kv_cache_interface import KVCacheSpec

__all__ = ["CPUAttentionBackend", "CPUAttentionImpl"]


class CPUAttentionImpl(OperatorAttentionImpl):
    operators: ClassVar[ModuleType] = ops

    def fused_rope_kvcache_supported(self) -> bool:
        return True

    def do_rope_and_kv_cache_update(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        cos_sin_cache: torch.Tensor,
        is_neox: bool,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        ops.rope_and_store(
            positions,
            query,
            key,
            value,
            cos_sin_cache,
            is_neox,
            kv_cache,
            slot_mapping,
            self.format,
            self.side_scales(layer),
        )


class CPUAttentionBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.bfloat16,
        torch.float16,
        torch.float32,
    ]
    supported_kv_cache_dtypes: ClassVar[list[str]] = [
        "auto",
        "bfloat16",
        "float16",
        "float32",
        *FORMATS,
    ]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionImpl]:
        return CPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[PagedAttentionMetadataBuilder]:
        return PagedAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> Sequence[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(range(8, 257, 8))

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)

    @classmethod
    def supports_sink(cls) -> bool:
        return True
