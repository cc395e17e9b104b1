"""What an attention backend is: its declaration, its computation, its per-step metadata.

Owns the abstract classes. A backend declares which dtypes, head sizes, kernel block sizes and
layouts its kernels can read, and may change how a page is packed (``customize_spec``). It never
decides where bytes lie: shapes follow from the spec and orders from the resolved layout, here
and once, so no backend can disagree with the allocator.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch

from vllm.v1.kv_cache.declare import kv_cache_storage
from vllm.v1.kv_cache.published import published_layout
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    MultipleOf,
    dtype_itemsize,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = [
    "AttentionBackend",
    "AttentionImpl",
    "AttentionLayer",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "AttentionType",
    "CommonAttentionMetadata",
    "MultipleOf",
    "kv_cache_storage",
]


class AttentionType(enum.StrEnum):
    """What a layer's queries attend to. Compares equal to its string."""

    DECODER = "decoder"
    ENCODER = "encoder"
    ENCODER_ONLY = "encoder_only"
    ENCODER_DECODER = "encoder_decoder"


class AttentionMetadata:
    """Base of what a builder hands to an impl for one step."""


AttentionLayer = Any
"""A layer as an impl sees it: attributes ``layer_name`` and scales such as ``_k_scale``."""

M = TypeVar("M")


class AttentionBackend(ABC):
    """Declaration of one backend; only class methods, never instantiated."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]
    accept_output_buffer: ClassVar[bool] = True
    forward_includes_kv_cache_update: ClassVar[bool] = True
    """False: the layer calls ``impl.do_kv_cache_update`` before ``forward``."""
    supports_kv_connector: ClassVar[bool] = True
    supports_kv_cache_update_bypass: ClassVar[bool] = False
    fits_cuda_graphs: ClassVar[bool] = False
    """Launches for a step of one token per request depend on the number of requests alone, and
    read everything else from tensors that the builder writes in place."""
    fits_prompt_graphs: ClassVar[bool] = False
    """Launches for any step whose metadata ``is_captured`` depend on its numbers of tokens and
    requests alone, likewise."""

    @staticmethod
    @abstractmethod
    def get_name() -> str:
        """Name in the registry, such as "CPU_ATTN"."""

    @staticmethod
    @abstractmethod
    def get_impl_cls() -> type[AttentionImpl]: ...

    @staticmethod
    @abstractmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]: ...

    @classmethod
    def full_cls_name(cls) -> tuple[str, str]:
        return (cls.__module__, cls.__qualname__)

    # What the kernels can read.

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> Sequence[int | MultipleOf]:
        """Tokens of a block that the kernels accept."""
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:
        """Layouts that the kernels read, the preferred first; None for any."""
        return None

    @classmethod
    def customize_spec(cls, spec: KVCacheSpec) -> KVCacheSpec:
        """The spec with this backend's packing (``num_head_slots``, ``state_content_bytes``)."""
        return spec

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Head sizes; empty for any."""
        return []

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        sizes = cls.get_supported_head_sizes()
        return not sizes or head_size in sizes

    @classmethod
    def supports_head_size_v(cls, head_size: int, head_size_v: int) -> bool:
        """Values of another width than keys; the kernels of most backends know one width."""
        return head_size_v == head_size

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return dtype in cls.supported_dtypes

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return kv_cache_dtype is None or kv_cache_dtype in cls.supported_kv_cache_dtypes

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """The kernels read blocks of this many tokens, or parts of them that divide it."""
        if block_size is None:
            return True
        for size in cls.get_supported_kernel_block_sizes():
            base = size.base if isinstance(size, MultipleOf) else size
            if block_size % base == 0:
                return True
        return False

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """``default_block_size`` if the kernels take it, else the smallest that they take."""
        if cls.supports_block_size(default_block_size):
            return default_block_size
        sizes = cls.get_supported_kernel_block_sizes()
        return min(s.base if isinstance(s, MultipleOf) else s for s in sizes)

    @classmethod
    def is_mla(cls) -> bool:
        return False

    @classmethod
    def is_ssm(cls) -> bool:
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        return False

    @classmethod
    def supports_alibi(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def validate_configuration(
        cls,
        *,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None = "auto",
        block_size: int | None = None,
        use_mla: bool = False,
        has_sink: bool = False,
        attn_type: str = AttentionType.DECODER,
        head_size_v: int | None = None,
        has_alibi: bool = False,
    ) -> list[str]:
        """Why this backend cannot serve such a layer; empty if it can."""
        reasons = []
        if not cls.supports_head_size(head_size):
            reasons.append(f"head size {head_size} not supported")
        if head_size_v is not None and not cls.supports_head_size_v(head_size, head_size_v):
            reasons.append(f"values of {head_size_v} beside keys of {head_size} not supported")
        if not cls.supports_dtype(dtype):
            reasons.append(f"dtype {dtype} not supported")
        if not cls.supports_kv_cache_dtype(kv_cache_dtype):
            reasons.append(f"kv cache dtype {kv_cache_dtype} not supported")
        if not cls.supports_block_size(block_size):
            sizes = ", ".join(map(str, cls.get_supported_kernel_block_sizes()))
            reasons.append(f"block size {block_size} not supported (takes {sizes})")
        if use_mla != cls.is_mla():
            reasons.append("MLA not supported" if use_mla else "only for MLA")
        if has_sink and not cls.supports_sink():
            reasons.append("attention sinks not supported")
        if has_alibi and not cls.supports_alibi():
            reasons.append("ALiBi not supported")
        if not cls.supports_attn_type(attn_type):
            reasons.append(f"attention type {attn_type} not supported")
        return reasons

    # Shapes and orders as outside callers of vLLM 0.27.1 ask for them; derived, never overridden.

    @classmethod
    def get_kv_cache_shape(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Logical shape in elements: ``(B, H, N, C)``, or ``(B, N, C)`` for an MLA backend."""
        dtype, quant = kv_cache_storage(cache_dtype_str, "bfloat16")
        spec: AttentionSpec
        if cls.is_mla():
            spec = MLAAttentionSpec(
                block_size=block_size,
                num_kv_heads=1,
                head_size=head_size,
                dtype=dtype,
                cache_dtype_str=cache_dtype_str,
            )
        else:
            spec = FullAttentionSpec(
                block_size=block_size,
                num_kv_heads=num_kv_heads,
                head_size=head_size,
                dtype=dtype,
                kv_quant_mode=quant,
            )
        custom = cls.customize_spec(spec)
        content = custom.state_content_size_bytes // dtype_itemsize(custom.storage_dtype)
        if cls.is_mla():
            return (num_blocks, custom.num_states, content)
        return (num_blocks, custom.num_heads, custom.num_states, content)

    @classmethod
    def get_kv_cache_stride_order(
        cls, include_num_layers_dimension: bool = False
    ) -> tuple[int, ...]:
        """Permutation p: physical axis i is axis p[i] of ``get_kv_cache_shape``.

        With the layers flag, of that shape with L in front. HND answers (1, 2, 0, 3, 4) and NHD
        (1, 0, 3, 2, 4) there, as in vLLM 0.27.1, whose layered cache is always blocks first.
        """
        layout = published_layout() or cls._default_layout()
        if cls.is_mla():
            return (1, 0, 2, 3) if include_num_layers_dimension else (0, 1, 2)
        if not include_num_layers_dimension:
            return layout.layer_view_order
        layered = {
            KVCacheLayout.LBHNC: KVCacheLayout.BHLNC,
            KVCacheLayout.LBNHC: KVCacheLayout.BLNHC,
        }
        return layered.get(layout, layout).stride_order

    @classmethod
    def _default_layout(cls) -> KVCacheLayout:
        layouts = cls.supported_kv_cache_layouts()
        return layouts[0] if layouts else KVCacheLayout.LBHNC

    @classmethod
    def get_kv_cache_block_dim(
        cls,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> int:
        """Axis of the block: always 0."""
        return 0

    @classmethod
    def indexes_kv_by_block_stride(cls) -> bool:
        """The kernels read the distance of blocks from the tensor's strides."""
        return True


class AttentionImpl(ABC, Generic[M]):
    """Computation of one layer. Reads the cache only through its strides."""

    @abstractmethod
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None: ...

    @abstractmethod
    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: M,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: (T, Q, D); key, value: (T, K, D); any strides with dense last axis.
            kv_cache: what the layer bound, normally (B, K, N, 2 * D).
            output: (T, Q, D), written in place and returned.
        """

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store K and V (T, K, D) at slots (T,) int64; -1 stores nothing."""
        raise TypeError(f"{type(self).__name__} stores K and V inside forward")

    def fused_rope_kvcache_supported(self) -> bool:
        return False

    def fused_head_norms_supported(self) -> bool:
        """``do_rope_and_kv_cache_update`` takes ``head_norms``: RMSNorms of query's and key's heads
        that come before the rotation.
        """
        return False

    def do_rope_and_kv_cache_update(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor,
        cos_sin_cache: torch.Tensor,
        is_neox: bool,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Rotate ``query`` in place; rotate ``key`` and store it with ``value``."""
        raise TypeError(f"{type(self).__name__} has no fused RoPE and store")

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Called once when all weights are there."""


@dataclass(slots=True)
class CommonAttentionMetadata:
    """One step of one cache group, for every backend; builders derive theirs from it.

    R requests, T tokens. The ``_cpu`` fields are the same values in host memory; on the CPU they
    may be the same tensors.
    """

    query_start_loc: torch.Tensor
    """(R + 1,) int32: request r owns tokens ``[query_start_loc[r], query_start_loc[r + 1])``."""
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    """(R,) int32: tokens of the request with this step's, i.e. keys that its last token sees."""
    seq_lens_cpu: torch.Tensor
    num_computed_tokens_cpu: torch.Tensor
    """(R,) int32: tokens in the cache before this step."""
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    """(R, max_blocks) int32: KERNEL block ids."""
    slot_mapping: torch.Tensor
    """(T,) int64: kernel block * kernel block size + offset; -1: don't store."""
    causal: bool = True
    is_captured: bool = False
    """A captured graph runs the step: requests without tokens, and tokens behind the last
    request's, fill it up, and ``max_query_len`` is T where there may be prompts."""


class AttentionMetadataBuilder(ABC, Generic[M]):
    """Turns a step's common metadata into one backend's; one for each cache group."""

    reorder_batch_threshold: int | None = None
    """Requests with at most so many new tokens are put first in the batch; None: any order."""

    def __init__(
        self,
        kv_cache_spec: KVCacheSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        self.kv_cache_spec = kv_cache_spec
        self.layer_names = layer_names
        self.vllm_config = vllm_config
        self.device = device

    @abstractmethod
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> M:
        """Metadata of one step.

        Args:
            common_prefix_len: tokens that all requests share from the start (0: none known).
            fast_build: the result is used once only; skip what pays over several layers.
        """
