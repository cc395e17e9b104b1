"""Specs of attention caches: bytes per block of everything that stores K and V.

Every cache is logically ``(B, H, N, C)``: blocks, head slots, states per block, content. A
spec answers ``num_heads`` (H), ``num_states`` (N) and ``state_content_size_bytes`` (C), and

    page = H * N * C bytes per block and layer, then rounded up to an alignment or padded.

Pure arithmetic: no torch, no backend, no model. A dtype may be given as a ``torch.dtype`` or by
name; specs compare by name. Plug-ins may subclass specs, so they are frozen but have no slots.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
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
    MultipleOf,
    StateSlice,
    cdiv,
    check_counts,
    dtype_itemsize,
    dtype_name,
    to_torch_dtype,
)

if TYPE_CHECKING:
    import torch

    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class KVCacheSpec:
    """What one layer keeps per block of ``block_size`` tokens."""

    block_size: int
    """Tokens that one manager block stands for."""
    block_stride_alignment: int | MultipleOf = 1
    """Bytes that the distance between two blocks must be a multiple of; kept as a number."""
    dcp_sharded: bool = True
    """Ranks that share a context while decoding keep a share of its tokens each."""
    is_draft: bool = field(default=False, compare=False)
    """The layer belongs to a draft model."""
    layer_name: str = field(default="", compare=False, repr=False)
    """Only used in messages."""

    def __post_init__(self) -> None:
        check_counts(self.where, block_size=self.block_size)
        object.__setattr__(self, "block_stride_alignment", self.stride_alignment)
        check_counts(self.where, block_stride_alignment=self.block_stride_alignment)

    @property
    def stride_alignment(self) -> int:
        """``block_stride_alignment`` as a number."""
        alignment = self.block_stride_alignment
        return alignment.base if isinstance(alignment, MultipleOf) else alignment

    @property
    def where(self) -> str:
        """Start of a message about this layer."""
        return f"layer {self.layer_name}: " if self.layer_name else ""

    kind = KVCacheSpecKind.FULL

    @property
    def num_heads(self) -> int:
        """H: head slots of one block."""
        raise TypeError(f"{type(self).__name__} has no logical shape of its own")

    @property
    def tokens_per_state(self) -> int | Fraction:
        """Tokens that one state stands for; -1 where a state does not count tokens."""
        return 1

    @property
    def num_states(self) -> int:
        """N: states of one manager block."""
        return self.get_num_kernel_states(self.block_size)

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        """States of a kernel block of ``kernel_block_size`` tokens."""
        if self.tokens_per_state == 1:
            return kernel_block_size
        states = Fraction(kernel_block_size) / Fraction(self.tokens_per_state)
        if states.denominator != 1 or states < 1:
            raise ConfigError(
                f"{self.where}a block of {kernel_block_size} tokens does not hold a whole number "
                f"of states of {self.tokens_per_state} tokens: choose a --block-size that is a "
                f"multiple of {Fraction(self.tokens_per_state).numerator}",
                parameter="block_size",
                value=kernel_block_size,
            )
        return int(states)

    @property
    def state_content_size_bytes(self) -> int:
        """C in bytes: content of one (head slot, state)."""
        raise TypeError(f"{type(self).__name__} has no logical shape of its own")

    @property
    def storage_block_size(self) -> int:
        """N by its older name."""
        return self.num_states

    @property
    def unpadded_page_size_bytes(self) -> int:
        """H * N * C: bytes that carry content; the span of a page."""
        return self.num_heads * self.num_states * self.state_content_size_bytes

    @property
    def page_size_bytes(self) -> int:
        """Room of one block and layer, in bytes: the span, aligned and padded."""
        return self.unpadded_page_size_bytes

    @property
    def content_format(self) -> ContentFormat:
        return ContentFormat.KV_PER_TOKEN

    @property
    def storage_dtype(self) -> str:
        """Name of the dtype that the layer's view has."""
        return "int8"

    @property
    def view_alignment(self) -> int:
        """Bytes that offset and strides of the page must be a multiple of, for every view."""
        return dtype_itemsize(self.storage_dtype)

    @property
    def head_axis_is_sliceable(self) -> bool:
        """A range of head slots is a set of whole byte ranges with a meaning of its own."""
        return self.num_heads > 1

    @property
    def head_sides(self) -> int:
        """2 where K heads and V heads are apart on the head axis, else 1."""
        return 2 if self.content_format is ContentFormat.KV_HEAD_GROUPS else 1

    @property
    def num_heads_of_side(self) -> int:
        """Head slots that hold one side's heads: all of them unless K and V are apart."""
        return self.num_heads // self.head_sides

    @property
    def content_parts(self) -> tuple[tuple[str, int], ...]:
        """Names and bytes of what one (head slot, state) consists of, in order."""
        return (("content", self.state_content_size_bytes),)

    @property
    def state_table(self) -> tuple[StateSlice, ...]:
        """Where states lie in the page; empty unless the page is a row of states."""
        return ()

    @property
    def state_layout(self) -> str | None:
        """Order inside a convolution state, "SD" or "DS"; None where there is none."""
        return None

    @property
    def needs_block_contiguous(self) -> bool:
        """The page only has its meaning in the order H, N, C, in one run."""
        return False

    @property
    def needs_zeroing(self) -> bool:
        """A block taken from the pool is read before it is written."""
        return False

    @property
    def uses_slot_mapping(self) -> bool:
        return True

    @property
    def has_layer_views(self) -> bool:
        """The layer gets a tensor of its own: it keeps something."""
        return self.page_size_bytes > 0

    @property
    def block_table_token_alignment(self) -> int:
        """Tokens that a request's row of the block table grows by."""
        return self.block_size

    @property
    def prefix_cacheable(self) -> bool:
        """A full block can be found again by the hash of its tokens."""
        return True

    @property
    def group_key(self) -> tuple[Any, ...]:
        """Layers with equal keys need the same blocks at the same time: one block table."""
        return (self.kind.value, self.block_size)

    @property
    def manager_spec(self) -> KVCacheSpec:
        """The spec by which the scheduler chooses a manager; a member's for a uniform group."""
        return self

    def num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Leading tokens that the next token, and all after it, do not read."""
        return 0

    def blocks_at(self, num_tokens: int, vllm_config: VllmConfig) -> int:
        """Blocks that a request of ``num_tokens`` computed tokens holds between two steps."""
        first = self.num_skipped_tokens(num_tokens) // self.block_size
        return cdiv(num_tokens, self.block_size) - first

    def payload_bytes_at(self, num_tokens: int, vllm_config: VllmConfig) -> int:
        """Bytes of those blocks that a layer still reads."""
        tokens = num_tokens - self.num_skipped_tokens(num_tokens)
        states = int(Fraction(tokens) / Fraction(self.tokens_per_state))
        return states * self.num_heads * self.state_content_size_bytes

    def max_resident_blocks(self, vllm_config: VllmConfig) -> int:
        """Blocks that one request of the longest length holds at one time, at most."""
        longest = vllm_config.model_config.max_model_len
        if self.dcp_sharded:
            longest = cdiv(longest, vllm_config.parallel_config.decode_context_parallel_size)
        return cdiv(longest, self.block_size)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Entries of one request's row of the block table."""
        return cdiv(max_len, self.block_size)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of one request of the longest length, for one layer."""
        return self.max_resident_blocks(vllm_config) * self.page_size_bytes

    def copy_with_new_block_size(self, block_size: int) -> KVCacheSpec:
        """The same layer with blocks of another size; a padding that no longer fits is dropped."""
        return replace(self, block_size=block_size)

    def with_layer_name(self, layer_name: str) -> KVCacheSpec:
        return replace(self, layer_name=layer_name)

    @classmethod
    def merge(cls, specs: Sequence[KVCacheSpec]) -> KVCacheSpec:
        """One spec for layers of one group.

        Raises:
            ConfigError: the specs differ.
        """
        first = specs[0]
        for spec in specs[1:]:
            if spec != first:
                raise ConfigError(f"layers of one cache group differ: {first} and {spec}")
        return copy.copy(first)

    def is_uniform_with_collection(self, specs: Mapping[str, KVCacheSpec]) -> bool:
        """All of ``specs`` can share one block table with this one."""
        return all(spec.group_key == self.group_key for spec in specs.values())


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
