"""TORCH_REF: attention over the packed paged cache in plain PyTorch, on any device.

Slow and simple: it is what the other backends are tested against, and the one that runs where no
kernel does. Owns no cache; takes every address from the cache tensor's strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Self, TypeVar

import torch

from vllm import _torch_ops
from vllm.errors import ConfigError
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.ops.kv_formats import FORMATS, SideScales, kv_format
from vllm.v1.attention.ops.turboquant import TURBOQUANT_FORMATS
from vllm.v1.kv_cache_interface import KVCacheSpec

__all__ = [
    "OperatorAttentionImpl",
    "PagedAttentionImpl",
    "PagedAttentionMetadata",
    "PagedAttentionMetadataBuilder",
    "PagedMetadataT",
    "TorchRefBackend",
]


@dataclass(slots=True)
class PagedAttentionMetadata(AttentionMetadata):
    """One step as the paged kernels take it. R requests, T tokens."""

    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: torch.Tensor
    """(R + 1,) int32."""
    seq_lens: torch.Tensor
    """(R,) int32."""
    block_table: torch.Tensor
    """(R, max blocks) int32, in kernel blocks."""
    slot_mapping: torch.Tensor
    """(T,) int64; -1 is not stored."""
    causal: bool

    @classmethod
    def of(cls, common: CommonAttentionMetadata, **more: Any) -> Self:
        """The step's tensors as they are; ``more`` is what a subclass adds."""
        return cls(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            causal=common.causal,
            **more,
        )


PagedMetadataT = TypeVar("PagedMetadataT", bound=PagedAttentionMetadata)


class PagedAttentionMetadataBuilder(AttentionMetadataBuilder[PagedAttentionMetadata]):
    """Hands the step's tensors on as they are: the kernels need nothing else."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PagedAttentionMetadata:
        return PagedAttentionMetadata.of(common_attn_metadata)


class PagedAttentionImpl(AttentionImpl[PagedMetadataT]):
    """What the paged backends share: the constructor's checks and the arguments of the kernels."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | torch.Tensor | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        if num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly",
                parameter="num_key_value_heads",
            )
        self.alibi_slopes = (
            None
            if alibi_slopes is None
            else torch.as_tensor(alibi_slopes, dtype=torch.float32).contiguous()
        )
        self.sliding_window = sliding_window or 0
        self.kv_cache_dtype = kv_cache_dtype
        self.format = kv_format(kv_cache_dtype)
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        # A model loads its sinks after the layer is built: a parameter is read when it is used.
        self.sinks = sinks

    def side_scales(self, layer: AttentionLayer) -> SideScales | None:
        """The layer's scales of K and V, where the cache's format has one per tensor."""
        if self.format is None or self.format.per_token_head:
            return None
        return SideScales(k=layer._k_scale_float, v=layer._v_scale_float)


class OperatorAttentionImpl(PagedAttentionImpl[PagedAttentionMetadata]):
    """Attention by operators that take the step's tensors as they are."""

    operators: ClassVar[ModuleType]
    """``_custom_ops``, or another module with its names."""

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: PagedAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.operators.paged_attention(
            query,
            kv_cache,
            output,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            self.scale,
            causal=attn_metadata.causal,
            sliding_window=self.sliding_window,
            logits_soft_cap=self.logits_soft_cap,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            fmt=self.format,
            scales=self.side_scales(layer),
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
        scales = self.side_scales(layer)
        self.operators.store_kv_cache(key, value, kv_cache, slot_mapping, self.format, scales)


class TorchRefImpl(OperatorAttentionImpl):
    operators: ClassVar[ModuleType] = _torch_ops


class TorchRefBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
    ]
    supported_kv_cache_dtypes: ClassVar[list[str]] = [
        "auto",
        "bfloat16",
        "float16",
        "float32",
        *FORMATS,
        *TURBOQUANT_FORMATS,
    ]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "TORCH_REF"

    @staticmethod
    def get_impl_cls() -> type[TorchRefImpl]:
        return TorchRefImpl

    @staticmethod
    def get_builder_cls() -> type[PagedAttentionMetadataBuilder]:
        return PagedAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> Sequence[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supports_head_size_v(cls, head_size: int, head_size_v: int) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER)

    @classmethod
    def supports_sink(cls) -> bool:
        return True
