"""Specs of attention caches: bytes per block of everything that stores K and V.

The rules are ``spec.py``'s. A dtype may be given as a ``torch.dtype`` or by name; specs compare by
name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from vllm.errors import ConfigError
from vllm.v1.kv_cache.content import (
    NVFP4_GROUP,
    SCALE_BYTES,
    ContentFormat,
    KVCacheSpecKind,
    KVQuantMode,
    cdiv,
    check_counts,
    dtype_itemsize,
    dtype_name,
    to_torch_dtype,
)
from vllm.v1.kv_cache.spec import KVCacheSpec

if TYPE_CHECKING:
    import torch

    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(KVCacheSpec):
    """K and V of ``num_kv_heads`` heads for every token.

    ================================  ==============  ====================================
    kind                              H               C, bytes
    ================================  ==============  ====================================
    plain                             heads           (D + Dv) * itemsize
    int8, fp8 per token and head      heads           (D + Dv) + 2 * 4
    int4 per token and head           heads           (D + Dv) / 2 + 2 * 4
    nvfp4                             2 * heads       D / 2 + D / 16
    set by a backend                  num_head_slots  state_content_bytes
    ================================  ==============  ====================================

    page = H * (block_size / tokens_per_state) * C, or ``page_size_padded``.
    """

    num_kv_heads: int
    head_size: int
    dtype: Any = field(compare=False)
    """torch.dtype or name of the stored elements (uint8 for fp8 kept as bytes)."""
    head_size_v: int | None = None
    """Width of V; None means that of K, 0 that there is no V of its own."""
    kv_quant_mode: KVQuantMode = KVQuantMode.NONE
    page_size_padded: int | None = None
    num_head_slots: int | None = None
    """Set by ``AttentionBackend.customize_spec`` where a kernel wants another packing."""
    state_content_bytes: int | None = None
    tokens_per_state: int | Fraction = 1
    indexes_kv_by_block_stride: bool = field(default=True, compare=False)
    """The kernels read the block stride from the tensor, as all of ours do."""
    dtype_name: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dtype_name", dtype_name(self.dtype))
        width_v = self.head_size if self.head_size_v is None else self.head_size_v
        object.__setattr__(self, "head_size_v", width_v)
        check_counts(
            self.where,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            num_head_slots=self.num_head_slots,
            state_content_bytes=self.state_content_bytes,
            page_size_padded=self.page_size_padded,
        )
        check_counts(self.where, 0, head_size_v=width_v)
        if not isinstance(self.tokens_per_state, int | Fraction) or self.tokens_per_state <= 0:
            raise ConfigError(
                f"{self.where}tokens_per_state must be a positive whole number or Fraction, not "
                f"{self.tokens_per_state!r}"
            )
        self.get_num_kernel_states(self.block_size)
        self._check_quantisation()
        item = dtype_itemsize(self.dtype_name)
        if self.state_content_size_bytes % item:
            raise ConfigError(
                f"{self.where}content of {self.state_content_size_bytes} bytes is not a whole "
                f"number of {self.dtype_name} elements"
            )
        self._check_page()

    def _check_quantisation(self) -> None:
        mode = self.kv_quant_mode
        if mode is not KVQuantMode.NONE and dtype_itemsize(self.dtype_name) != 1:
            raise ConfigError(
                f"{self.where}{mode.name.lower()} stores single bytes, not {self.dtype_name}: "
                "give the spec dtype uint8, int8 or a float8",
                parameter="kv_cache_dtype",
            )
        widths = (self.head_size, self.head_size_v or 0)
        # Scales are fp32 and lie behind each side's data.
        step = SCALE_BYTES * (2 if mode is KVQuantMode.INT4_PER_TOKEN_HEAD else 1)
        if mode.is_per_token_head and any(width % step for width in widths):
            raise ConfigError(
                f"{self.where}--kv-cache-dtype {mode.name.lower()} keeps a {SCALE_BYTES}-byte "
                f"scale behind the data of each head, so head sizes must be multiples of {step}, "
                f"not {widths}; fp8 takes any",
                parameter="kv_cache_dtype",
            )
        if mode.is_nvfp4 and (self.head_size_v != self.head_size or self.head_size % NVFP4_GROUP):
            raise ConfigError(
                f"{self.where}--kv-cache-dtype nvfp4 needs K and V of one width that is a multiple "
                f"of {NVFP4_GROUP}, not {widths}; fp8 takes any",
                parameter="kv_cache_dtype",
            )

    def _check_page(self) -> None:
        padded = self.page_size_padded
        if padded is None:
            return
        if padded < self.unpadded_page_size_bytes:
            raise ConfigError(
                f"{self.where}page padded to {padded} bytes is smaller than its content of "
                f"{self.unpadded_page_size_bytes}"
            )
        if padded % self.view_alignment:
            raise ConfigError(
                f"{self.where}page padded to {padded} bytes is not a multiple of the "
                f"{self.view_alignment}-byte {self._widest}"
            )

    @property
    def _widest(self) -> str:
        return "scales" if self.kv_quant_mode.is_per_token_head else self.dtype_name

    @property
    def view_alignment(self) -> int:
        return dtype_itemsize("float32" if self._widest == "scales" else self.dtype_name)

    def _side_bytes(self, width: int) -> int:
        if width == 0:
            return 0
        if self.kv_quant_mode is KVQuantMode.INT4_PER_TOKEN_HEAD:
            return width // 2 + SCALE_BYTES
        if self.kv_quant_mode.is_per_token_head:
            return width + SCALE_BYTES
        return width * dtype_itemsize(self.dtype_name)

    @property
    def num_heads(self) -> int:
        if self.num_head_slots is not None:
            return self.num_head_slots
        return 2 * self.num_kv_heads if self.kv_quant_mode.is_nvfp4 else self.num_kv_heads

    @property
    def state_content_size_bytes(self) -> int:
        if self.state_content_bytes is not None:
            return self.state_content_bytes
        if self.kv_quant_mode.is_nvfp4:
            return self.head_size // 2 + self.head_size // NVFP4_GROUP
        return self._side_bytes(self.head_size) + self._side_bytes(self.head_size_v or 0)

    @property
    def page_size_bytes(self) -> int:
        return self.page_size_padded or self.unpadded_page_size_bytes

    @property
    def real_page_size_bytes(self) -> int:
        return self.unpadded_page_size_bytes

    @property
    def storage_dtype(self) -> str:
        return self.dtype_name

    @property
    def torch_dtype(self) -> torch.dtype:
        return to_torch_dtype(self.dtype_name)

    @property
    def content_format(self) -> ContentFormat:
        if self.kv_quant_mode.is_nvfp4:
            return ContentFormat.KV_HEAD_GROUPS_NVFP4
        if self.kv_quant_mode.is_turboquant:
            return ContentFormat.PACKED_SLOT
        if self.kv_quant_mode.is_per_token_head:
            return ContentFormat.KV_PER_TOKEN_SCALED
        if self.num_head_slots == 2 * self.num_kv_heads:
            return ContentFormat.KV_HEAD_GROUPS
        if self.num_head_slots == 2 and self.num_kv_heads > 2:
            return ContentFormat.KV_SIDES
        return ContentFormat.KV_PER_TOKEN

    @property
    def content_parts(self) -> tuple[tuple[str, int], ...]:
        width_k, width_v = self.head_size, self.head_size_v or 0
        key, value = self._side_bytes(width_k), self._side_bytes(width_v)
        content = self.content_format
        parts: tuple[tuple[str, int], ...]
        if content is ContentFormat.KV_PER_TOKEN:
            parts = (("k", key), ("v", value))
        elif content is ContentFormat.KV_PER_TOKEN_SCALED:
            parts = (
                ("k", key - SCALE_BYTES),
                ("k_scale", SCALE_BYTES),
                ("v", value - SCALE_BYTES),
                ("v_scale", SCALE_BYTES),
            )
        elif content is ContentFormat.KV_HEAD_GROUPS_NVFP4:
            parts = (("data", width_k // 2), ("scale", width_k // NVFP4_GROUP))
        elif content is ContentFormat.KV_HEAD_GROUPS:
            parts = (("side", key),)
        else:
            parts = ((content.value, self.state_content_size_bytes),)
        if sum(size for _, size in parts) == self.state_content_size_bytes:
            return parts
        return (("content", self.state_content_size_bytes),)

    @property
    def head_axis_is_sliceable(self) -> bool:
        unsliceable = (ContentFormat.KV_HEAD_GROUPS_NVFP4, ContentFormat.KV_SIDES)
        return self.content_format not in unsliceable

    @property
    def needs_block_contiguous(self) -> bool:
        return self.content_format is ContentFormat.KV_HEAD_GROUPS_NVFP4

    def copy_with_new_block_size(self, block_size: int) -> KVCacheSpec:
        return replace(self, block_size=block_size, page_size_padded=None)


@dataclass(frozen=True, kw_only=True)
class FullAttentionSpec(AttentionSpec):
    """Every token of a request is kept: page = H * N * (D + Dv) * itemsize.

    ``sliding_window`` and ``attention_chunk_size`` record what the layer computes with where it
    was promoted to full attention; they change no bytes.
    """

    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    non_causal: bool = False

    kind = KVCacheSpecKind.FULL

    @property
    def group_key(self) -> tuple[Any, ...]:
        return (KVCacheSpecKind.FULL.value, self.block_size)

    @classmethod
    def merge(cls, specs: Sequence[KVCacheSpec]) -> KVCacheSpec:
        """One spec for the group; windows of promoted layers may be given on some only."""
        full = [spec for spec in specs if isinstance(spec, FullAttentionSpec)]
        windows = {spec.sliding_window for spec in full} - {None}
        chunks = {spec.attention_chunk_size for spec in full} - {None}
        if len(full) < len(specs) or len(windows) > 1 or len(chunks) > 1:
            raise ConfigError(
                "layers of one cache group differ in kind or window: "
                f"{', '.join(sorted(str(spec) for spec in set(specs)))}"
            )
        window = next(iter(windows), None)
        chunk = next(iter(chunks), None)
        alike = [replace(spec, sliding_window=window, attention_chunk_size=chunk) for spec in full]
        return KVCacheSpec.merge(alike)


@dataclass(frozen=True, kw_only=True)
class SinkFullAttentionSpec(FullAttentionSpec):
    """Full attention whose first ``sink_len`` tokens are kept apart and never evicted."""

    sink_len: int | None = None

    kind = KVCacheSpecKind.SINK_FULL

    def __post_init__(self) -> None:
        check_counts(self.where, 0, sink_len=self.sink_len)
        super().__post_init__()

    @property
    def group_key(self) -> tuple[Any, ...]:
        return (self.kind.value, self.block_size, self.sink_len)


@dataclass(frozen=True, kw_only=True)
class TQFullAttentionSpec(FullAttentionSpec):
    """Full attention in TurboQuant slots: page = H * N * tq_slot_size."""

    tq_slot_size: int = 0
    """Bytes of one (head, token) slot: K and V quantised, aligned."""
    kv_quant_mode: KVQuantMode = KVQuantMode.TURBOQUANT

    kind = KVCacheSpecKind.TQ_FULL

    def __post_init__(self) -> None:
        check_counts(self.where, tq_slot_size=self.tq_slot_size)
        super().__post_init__()

    @property
    def state_content_size_bytes(self) -> int:
        return self.tq_slot_size


@dataclass(frozen=True, kw_only=True)
class SlidingWindowSpec(AttentionSpec):
    """Only the last ``sliding_window`` tokens are kept; the page is that of full attention."""

    sliding_window: int

    kind = KVCacheSpecKind.SLIDING_WINDOW

    def __post_init__(self) -> None:
        check_counts(self.where, sliding_window=self.sliding_window)
        super().__post_init__()

    @property
    def group_key(self) -> tuple[Any, ...]:
        return (KVCacheSpecKind.SLIDING_WINDOW.value, self.block_size, self.sliding_window)

    def num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return max(0, num_computed_tokens - self.sliding_window + 1)

    def max_resident_blocks(self, vllm_config: VllmConfig) -> int:
        """cdiv(min(window - 1 + tokens of a step, longest), block_size) + 1.

        The + 1: the window need not start at a block's start.
        """
        in_flight = vllm_config.scheduler_config.max_num_batched_tokens
        kept = min(self.sliding_window - 1 + in_flight, vllm_config.model_config.max_model_len)
        return cdiv(kept, self.block_size) + 1


@dataclass(frozen=True, kw_only=True)
class ChunkedLocalAttentionSpec(AttentionSpec):
    """Only the running chunk of ``attention_chunk_size`` tokens is kept."""

    attention_chunk_size: int

    kind = KVCacheSpecKind.CHUNKED_LOCAL

    def __post_init__(self) -> None:
        check_counts(self.where, attention_chunk_size=self.attention_chunk_size)
        super().__post_init__()

    @property
    def group_key(self) -> tuple[Any, ...]:
        return (self.kind.value, self.block_size, self.attention_chunk_size)

    def num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return num_computed_tokens // self.attention_chunk_size * self.attention_chunk_size

    def max_resident_blocks(self, vllm_config: VllmConfig) -> int:
        """cdiv(min(chunk + tokens of a step, longest), block_size).

        One more where chunks do not start at blocks' starts.
        """
        in_flight = vllm_config.scheduler_config.max_num_batched_tokens
        kept = min(self.attention_chunk_size + in_flight, vllm_config.model_config.max_model_len)
        return cdiv(kept, self.block_size) + bool(self.attention_chunk_size % self.block_size)


def _encoder_len(vllm_config: VllmConfig) -> int:
    config = vllm_config.model_config
    return getattr(config.hf_config, "max_source_positions", None) or config.max_model_len


@dataclass(frozen=True, kw_only=True)
class CrossAttentionSpec(AttentionSpec):
    """K and V of an encoder's output: sized by the encoder's length, not by the tokens."""

    kind = KVCacheSpecKind.CROSS

    @property
    def prefix_cacheable(self) -> bool:
        return False

    def max_resident_blocks(self, vllm_config: VllmConfig) -> int:
        return cdiv(_encoder_len(vllm_config), self.block_size)

    def blocks_at(self, num_tokens: int, vllm_config: VllmConfig) -> int:
        return self.max_resident_blocks(vllm_config)

    def payload_bytes_at(self, num_tokens: int, vllm_config: VllmConfig) -> int:
        return _encoder_len(vllm_config) * self.num_heads * self.state_content_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        return self.max_resident_blocks(vllm_config)


@dataclass(frozen=True, kw_only=True)
class EncoderOnlyAttentionSpec(AttentionSpec):
    """Attention within one forward: nothing is kept, the page is 0 bytes."""

    kind = KVCacheSpecKind.ENCODER_ONLY

    @property
    def unpadded_page_size_bytes(self) -> int:
        return 0

    @property
    def page_size_bytes(self) -> int:
        return 0

    @property
    def prefix_cacheable(self) -> bool:
        return False

    def max_resident_blocks(self, vllm_config: VllmConfig) -> int:
        return 0

    def blocks_at(self, num_tokens: int, vllm_config: VllmConfig) -> int:
        return 0

    def payload_bytes_at(self, num_tokens: int, vllm_config: VllmConfig) -> int:
        return 0
