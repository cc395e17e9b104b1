"""What layers declare about the KV they keep, and the plan that comes of it.

Owns the specs (bytes per block of every kind of cache) and the plan's data types. Pure
arithmetic: imports no torch, allocates nothing, knows no backend and no model. A dtype may be
given as a ``torch.dtype`` or by name; specs compare by name.

Every cache is logically ``(B, H, N, C)``: blocks, head slots, states per block, content. A
spec answers ``num_heads`` (H), ``num_states`` (N) and ``state_content_size_bytes`` (C), and

    page = H * N * C bytes per block and layer, then rounded up to an alignment or padded.

Specs may be subclassed by plug-ins, so they are frozen but have no slots.
"""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from vllm.errors import ConfigError
from vllm.v1.kv_cache_layout import KVCacheLayout

if TYPE_CHECKING:
    import torch

    from vllm.config import VllmConfig

__all__ = [
    "AttentionSpec",
    "ChunkedLocalAttentionSpec",
    "ContentFormat",
    "CrossAttentionSpec",
    "EncoderOnlyAttentionSpec",
    "FullAttentionSpec",
    "KVCacheConfig",
    "KVCacheGroupSpec",
    "KVCacheSpec",
    "KVCacheSpecKind",
    "KVCacheTensor",
    "KVQuantMode",
    "MLAAttentionSpec",
    "MambaSpec",
    "MultipleOf",
    "SinkFullAttentionSpec",
    "SlidingWindowMLASpec",
    "SlidingWindowSpec",
    "StateSlice",
    "TQFullAttentionSpec",
    "UniformTypeKVCacheSpecs",
    "dtype_itemsize",
    "dtype_name",
    "to_torch_dtype",
]

_ITEMSIZE = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}
_DTYPE_ALIASES = {"half": "float16", "float": "float32", "bf16": "bfloat16", "fp16": "float16"}

SCALE_BYTES = 4
"""Bytes of one inline fp32 scale of a per-token-head quantised cache."""
NVFP4_GROUP = 16
"""Elements of nvfp4 data that share one fp8 block scale."""
# Bytes of one token's latent in the formats that pack data, scales and RoPE parts together:
# 512 fp8 + 16 scale + 128 RoPE; 448 fp8 + 128 RoPE + 8 scale; nvfp4.
_MLA_STATE_BYTES = {"fp8_ds_mla": 656, "fp8_ds_mla/deepseek_v4": 584, "nvfp4_ds_mla": 352}


def dtype_name(dtype: torch.dtype | str) -> str:
    """``torch.bfloat16`` or ``"bfloat16"`` -> ``"bfloat16"``.

    Raises:
        ConfigError: no dtype that a cache can hold has that name.
    """
    name = str(dtype).removeprefix("torch.")
    name = _DTYPE_ALIASES.get(name, name)
    if name not in _ITEMSIZE:
        raise ConfigError(
            f"a KV cache cannot hold dtype {name!r}: use one of {', '.join(_ITEMSIZE)}",
            parameter="kv_cache_dtype",
            value=name,
        )
    return name


def dtype_itemsize(dtype: torch.dtype | str) -> int:
    """Bytes of one element."""
    return _ITEMSIZE[dtype_name(dtype)]


def to_torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    import torch

    return getattr(torch, dtype_name(dtype))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    return cdiv(a, b) * b


@dataclass(frozen=True, slots=True)
class MultipleOf:
    """A backend's kernel block size may be any positive multiple of ``base``."""

    base: int

    def accepts(self, size: int) -> bool:
        return size > 0 and size % self.base == 0


class KVQuantMode(enum.IntEnum):
    """How the bytes of K and V are quantised; dtype and scales follow from it."""

    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4
    NVFP4 = 5
    TURBOQUANT = 6

    @property
    def is_per_token_head(self) -> bool:
        return self in (
            KVQuantMode.INT8_PER_TOKEN_HEAD,
            KVQuantMode.FP8_PER_TOKEN_HEAD,
            KVQuantMode.INT4_PER_TOKEN_HEAD,
        )

    @property
    def is_nvfp4(self) -> bool:
        return self is KVQuantMode.NVFP4

    @property
    def is_turboquant(self) -> bool:
        return self is KVQuantMode.TURBOQUANT


class KVCacheSpecKind(str, enum.Enum):
    """Name of a spec's class in descriptors and messages."""

    FULL = "full_attention"
    SLIDING_WINDOW = "sliding_window"
    CHUNKED_LOCAL = "chunked_local_attention"
    CROSS = "cross_attention"
    ENCODER_ONLY = "encoder_only_attention"
    SINK_FULL = "sink_full_attention"
    MLA = "mla_attention"
    SLIDING_WINDOW_MLA = "sliding_window_mla"
    TQ_FULL = "tq_full_attention"
    MAMBA = "mamba"
    UNIFORM_TYPE = "uniform_type"


class ContentFormat(str, enum.Enum):
    """What the bytes of one page mean. Two caches agree only if this agrees."""

    KV_PER_TOKEN = "kv_per_token"
    """Content of (head, token) is K then V."""
    KV_PER_TOKEN_SCALED = "kv_per_token_scaled"
    """Content of (head, token) is K data, K scale fp32, V data, V scale fp32."""
    KV_HEAD_GROUPS = "kv_head_groups"
    """K heads, then V heads, on the head axis."""
    KV_HEAD_GROUPS_NVFP4 = "kv_head_groups_nvfp4"
    """K heads, then V heads; each side all data bytes, then all block scales: not cut by head."""
    KV_SIDES = "kv_sides"
    """Two head slots, K and V; the content is all heads of one token."""
    PACKED_SLOT = "packed_slot"
    """Content of (head, token) is one opaque slot that holds both K and V, quantised."""
    LATENT = "latent"
    """One latent per state, the same on every tensor-parallel rank."""
    STATE_PAGE = "state_page"
    """The page is a row of state arrays, back to back (``MambaSpec.state_table``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSlice:
    """One state array inside a page: bytes ``[offset, offset + size_bytes)``."""

    shape: tuple[int, ...]
    dtype_name: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class KVCacheSpec:
    """What one layer keeps per block of ``block_size`` tokens."""

    block_size: int
    """Tokens that one manager block stands for."""
    block_stride_alignment: int = 1
    """Bytes that the distance between two blocks must be a multiple of."""
    is_draft: bool = field(default=False, compare=False)
    """The layer belongs to a draft model."""
    layer_name: str = field(default="", compare=False, repr=False)
    """Only used in messages."""

    def __post_init__(self) -> None:
        if self.block_size <= 0:
            raise ConfigError(
                f"{self._where}block size must be positive, not {self.block_size}",
                parameter="block_size",
            )
        if self.block_stride_alignment <= 0:
            raise ConfigError(f"{self._where}block_stride_alignment must be positive")

    @property
    def _where(self) -> str:
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
        states = Fraction(kernel_block_size) / Fraction(self.tokens_per_state)
        if states.denominator != 1 or states < 1:
            raise ConfigError(
                f"{self._where}a block of {kernel_block_size} tokens does not hold a whole number "
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

    def max_resident_blocks(self, vllm_config: VllmConfig) -> int:
        """Blocks that one request of the longest length holds at one time, at most."""
        return cdiv(_max_local_len(vllm_config), self.block_size)

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


def _max_local_len(vllm_config: VllmConfig) -> int:
    dcp = vllm_config.parallel_config.decode_context_parallel_size
    return cdiv(vllm_config.model_config.max_model_len, dcp)


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
        if self.head_size_v is None:
            object.__setattr__(self, "head_size_v", self.head_size)
        if self.num_kv_heads <= 0 or self.head_size <= 0 or self.head_size_v < 0:
            raise ConfigError(
                f"{self._where}num_kv_heads and head_size must be positive, not "
                f"{self.num_kv_heads} and {self.head_size}/{self.head_size_v}"
            )
        self._check_quantisation()
        item = dtype_itemsize(self.dtype_name)
        if self.state_content_size_bytes % item:
            raise ConfigError(
                f"{self._where}content of {self.state_content_size_bytes} bytes is not a whole "
                f"number of {self.dtype_name} elements"
            )
        self._check_page(item)

    def _check_quantisation(self) -> None:
        mode = self.kv_quant_mode
        if mode is not KVQuantMode.NONE and dtype_itemsize(self.dtype_name) != 1:
            raise ConfigError(
                f"{self._where}{mode.name.lower()} stores single bytes, not {self.dtype_name}: "
                "give the spec dtype uint8, int8 or a float8",
                parameter="kv_cache_dtype",
            )
        widths = (self.head_size, self.head_size_v or 0)
        if mode is KVQuantMode.INT4_PER_TOKEN_HEAD and any(w % 2 for w in widths):
            raise ConfigError(f"{self._where}int4 needs even head sizes, not {widths}")
        if mode.is_nvfp4 and (self.head_size_v != self.head_size or self.head_size % NVFP4_GROUP):
            raise ConfigError(
                f"{self._where}nvfp4 needs K and V of one width that is a multiple of "
                f"{NVFP4_GROUP}, not {widths}",
                parameter="kv_cache_dtype",
            )

    def _check_page(self, item: int) -> None:
        padded = self.page_size_padded
        if padded is None:
            return
        if padded < self.unpadded_page_size_bytes:
            raise ConfigError(
                f"{self._where}page padded to {padded} bytes is smaller than its content of "
                f"{self.unpadded_page_size_bytes}"
            )
        if padded % item:
            raise ConfigError(
                f"{self._where}page padded to {padded} bytes is not a multiple of the "
                f"{item}-byte {self.dtype_name}"
            )

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
        windows = {s.sliding_window for s in specs if isinstance(s, FullAttentionSpec)} - {None}
        chunks = {s.attention_chunk_size for s in specs if isinstance(s, FullAttentionSpec)} - {
            None
        }
        if len(windows) > 1 or len(chunks) > 1:
            raise ConfigError(
                f"layers of one cache group differ in window: {sorted(map(str, windows | chunks))}"
            )
        window = next(iter(windows), None)
        chunk = next(iter(chunks), None)
        alike = [replace(s, sliding_window=window, attention_chunk_size=chunk) for s in specs]
        return KVCacheSpec.merge(alike)


@dataclass(frozen=True, kw_only=True)
class SinkFullAttentionSpec(FullAttentionSpec):
    """Full attention whose first ``sink_len`` tokens are kept apart and never evicted."""

    sink_len: int | None = None

    kind = KVCacheSpecKind.SINK_FULL

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
        if self.tq_slot_size <= 0:
            raise ConfigError(f"{self._where}tq_slot_size must be positive")
        super().__post_init__()

    @property
    def state_content_size_bytes(self) -> int:
        return self.tq_slot_size


@dataclass(frozen=True, kw_only=True)
class MLAAttentionSpec(FullAttentionSpec):
    """One latent per ``compress_ratio`` tokens, no V of its own.

    page = round_up((block_size / compress_ratio) * C, alignment); C = head_size * itemsize, or
    656 (fp8_ds_mla), 584 (fp8_ds_mla of deepseek_v4), 352 (nvfp4_ds_mla).
    """

    head_size_v: int | None = 0
    cache_dtype_str: str | None = None
    alignment: int | None = None
    compress_ratio: int = 1
    model_version: str | None = None
    non_causal_multi_token_decode: bool = False

    kind = KVCacheSpecKind.MLA

    def __post_init__(self) -> None:
        _init_latent(self)
        super().__post_init__()
        _check_alignment(self)

    @property
    def state_content_size_bytes(self) -> int:
        return _latent_bytes(self)

    @property
    def page_size_bytes(self) -> int:
        return _latent_page(self)

    @property
    def content_format(self) -> ContentFormat:
        return ContentFormat.LATENT

    @property
    def head_axis_is_sliceable(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class SlidingWindowSpec(AttentionSpec):
    """Only the last ``sliding_window`` tokens are kept; the page is that of full attention."""

    sliding_window: int

    kind = KVCacheSpecKind.SLIDING_WINDOW

    def __post_init__(self) -> None:
        if self.sliding_window <= 0:
            raise ConfigError(
                f"{self._where}sliding_window must be positive, not {self.sliding_window}"
            )
        super().__post_init__()

    @property
    def group_key(self) -> tuple[Any, ...]:
        return (KVCacheSpecKind.SLIDING_WINDOW.value, self.block_size, self.sliding_window)

    def max_resident_blocks(self, vllm_config: VllmConfig) -> int:
        """cdiv(min(window - 1 + tokens of a step, longest), block_size) + 1.

        The + 1: the window need not start at a block's start.
        """
        in_flight = vllm_config.scheduler_config.max_num_batched_tokens
        kept = min(self.sliding_window - 1 + in_flight, vllm_config.model_config.max_model_len)
        return cdiv(kept, self.block_size) + 1


@dataclass(frozen=True, kw_only=True)
class SlidingWindowMLASpec(SlidingWindowSpec):
    """A latent per state within a window; page as ``MLAAttentionSpec``'s."""

    head_size_v: int | None = 0
    cache_dtype_str: str | None = None
    alignment: int | None = None
    compress_ratio: int = 1
    model_version: str | None = None

    kind = KVCacheSpecKind.SLIDING_WINDOW_MLA

    def __post_init__(self) -> None:
        _init_latent(self)
        super().__post_init__()
        _check_alignment(self)

    @property
    def state_content_size_bytes(self) -> int:
        return _latent_bytes(self)

    @property
    def page_size_bytes(self) -> int:
        return _latent_page(self)

    @property
    def content_format(self) -> ContentFormat:
        return ContentFormat.LATENT

    @property
    def head_axis_is_sliceable(self) -> bool:
        return False


LatentSpec = MLAAttentionSpec | SlidingWindowMLASpec


def _init_latent(spec: LatentSpec) -> None:
    if spec.num_kv_heads != 1:
        raise ConfigError(f"{spec._where}a latent cache has one head slot, not {spec.num_kv_heads}")
    ratio = spec.compress_ratio
    if ratio < 1:
        raise ConfigError(f"{spec._where}compress_ratio must be positive, not {ratio}")
    if ratio != 1:
        if spec.tokens_per_state not in (1, ratio):
            raise ConfigError(
                f"{spec._where}compress_ratio {ratio} and tokens_per_state "
                f"{spec.tokens_per_state} contradict each other"
            )
        object.__setattr__(spec, "tokens_per_state", ratio)


def _check_alignment(spec: LatentSpec) -> None:
    if spec.alignment is not None and spec.alignment <= 0:
        raise ConfigError(f"{spec._where}alignment must be positive, not {spec.alignment}")
    item = dtype_itemsize(spec.dtype_name)
    if spec.page_size_bytes % item:
        raise ConfigError(
            f"{spec._where}page aligned to {spec.page_size_bytes} bytes is not a multiple of the "
            f"{item}-byte {spec.dtype_name}"
        )


def _latent_bytes(spec: LatentSpec) -> int:
    if spec.state_content_bytes is not None:
        return spec.state_content_bytes
    name = spec.cache_dtype_str or ""
    if f"{name}/{spec.model_version}" in _MLA_STATE_BYTES:
        return _MLA_STATE_BYTES[f"{name}/{spec.model_version}"]
    if name in _MLA_STATE_BYTES:
        return _MLA_STATE_BYTES[name]
    return spec.head_size * dtype_itemsize(spec.dtype_name)


def _latent_page(spec: LatentSpec) -> int:
    if spec.page_size_padded is not None:
        return spec.page_size_padded
    return round_up(spec.unpadded_page_size_bytes, spec.alignment or 1)


@dataclass(frozen=True, kw_only=True)
class ChunkedLocalAttentionSpec(AttentionSpec):
    """Only the running chunk of ``attention_chunk_size`` tokens is kept."""

    attention_chunk_size: int

    kind = KVCacheSpecKind.CHUNKED_LOCAL

    def __post_init__(self) -> None:
        if self.attention_chunk_size <= 0:
            raise ConfigError(f"{self._where}attention_chunk_size must be positive")
        super().__post_init__()

    @property
    def group_key(self) -> tuple[Any, ...]:
        return (self.kind.value, self.block_size, self.attention_chunk_size)

    def max_resident_blocks(self, vllm_config: VllmConfig) -> int:
        """cdiv(min(chunk + tokens of a step, longest), block_size)."""
        in_flight = vllm_config.scheduler_config.max_num_batched_tokens
        kept = min(self.attention_chunk_size + in_flight, vllm_config.model_config.max_model_len)
        return cdiv(kept, self.block_size)


@dataclass(frozen=True, kw_only=True)
class CrossAttentionSpec(AttentionSpec):
    """K and V of an encoder's output: sized by the encoder's length, not by the tokens."""

    kind = KVCacheSpecKind.CROSS

    @property
    def prefix_cacheable(self) -> bool:
        return False

    def max_resident_blocks(self, vllm_config: VllmConfig) -> int:
        config = vllm_config.model_config
        encoder_len = getattr(config.hf_config, "max_source_positions", None)
        return cdiv(encoder_len or config.max_model_len, self.block_size)

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


@dataclass(frozen=True, kw_only=True)
class MambaSpec(KVCacheSpec):
    """A fixed state per request: Mamba 1/2, short convolution, gated delta net, linear attention.

    The page is one int8 row ``(B, 1, 1, page)`` that holds the states back to back, in order:
    page = sum(prod(shape_i) * itemsize_i), or ``page_size_padded``. Nothing is put between
    states, so each offset must be a multiple of its dtype, and so must the page, whose multiples
    the rows start at; anything else is refused here.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...] = field(compare=False)
    """torch.dtype or name, one for each shape."""
    page_size_padded: int | None = None
    mamba_type: str = "mamba2"
    mamba_cache_mode: str = "none"
    """"none" (one running state), "align" (states also at block boundaries) or "all"."""
    num_speculative_blocks: int = 0
    conv_state_layout: str = "SD"
    """"SD" (state rows by time) or "DS" (rows by channel, so a channel range is one run)."""
    dtype_names: tuple[str, ...] = field(init=False, repr=False)

    kind = KVCacheSpecKind.MAMBA

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "shapes", tuple(tuple(shape) for shape in self.shapes))
        object.__setattr__(self, "dtypes", tuple(self.dtypes))
        object.__setattr__(self, "dtype_names", tuple(dtype_name(d) for d in self.dtypes))
        if not self.shapes or len(self.shapes) != len(self.dtypes):
            raise ConfigError(
                f"{self._where}{len(self.shapes)} state shapes and {len(self.dtypes)} dtypes"
            )
        if self.mamba_cache_mode not in ("none", "align", "all"):
            raise ConfigError(
                f"mamba_cache_mode must be none, align or all, not {self.mamba_cache_mode!r}",
                parameter="mamba_cache_mode",
            )
        needed = self.unpadded_page_size_bytes
        page = self.page_size_bytes
        if page < needed:
            raise ConfigError(
                f"{self._where}page of {page} bytes is smaller than its states' {needed} bytes"
            )
        for i, state in enumerate(self.state_table):
            item = dtype_itemsize(state.dtype_name)
            what = f"{self._where}state {i} {state.shape} of {self.mamba_type}"
            if state.offset % item:
                raise ConfigError(
                    f"{what} starts at byte {state.offset}, which {item}-byte {state.dtype_name} "
                    "does not divide: store the states before it in a dtype or order that keeps "
                    f"the offset a multiple of {item}",
                    parameter="mamba_cache_dtype",
                )
            if page % item:
                raise ConfigError(
                    f"{what}: a page of {page} bytes is not a multiple of its {item}-byte "
                    f"{state.dtype_name}; pad the page to {round_up(page, item)}"
                )

    @property
    def state_table(self) -> tuple[StateSlice, ...]:
        """Where each state lies in the page."""
        table, offset = [], 0
        for shape, name in zip(self.shapes, self.dtype_names, strict=True):
            size = math.prod(shape) * _ITEMSIZE[name]
            table.append(StateSlice(shape=shape, dtype_name=name, offset=offset, size_bytes=size))
            offset += size
        return tuple(table)

    @property
    def num_heads(self) -> int:
        return 1

    @property
    def tokens_per_state(self) -> int:
        return -1

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        return 1

    @property
    def state_content_size_bytes(self) -> int:
        return self.page_size_bytes

    @property
    def storage_block_size(self) -> int:
        return self.block_size

    @property
    def unpadded_page_size_bytes(self) -> int:
        return sum(
            math.prod(shape) * _ITEMSIZE[name]
            for shape, name in zip(self.shapes, self.dtype_names, strict=True)
        )

    @property
    def page_size_bytes(self) -> int:
        return self.page_size_padded or self.unpadded_page_size_bytes

    @property
    def content_format(self) -> ContentFormat:
        return ContentFormat.STATE_PAGE

    @property
    def view_alignment(self) -> int:
        return math.lcm(*(_ITEMSIZE[name] for name in self.dtype_names))

    @property
    def head_axis_is_sliceable(self) -> bool:
        return False

    @property
    def needs_zeroing(self) -> bool:
        return True

    @property
    def uses_slot_mapping(self) -> bool:
        return False

    @property
    def prefix_cacheable(self) -> bool:
        return self.mamba_cache_mode != "none"

    @property
    def group_key(self) -> tuple[Any, ...]:
        return (
            self.kind.value,
            self.block_size,
            self.mamba_cache_mode,
            self.num_speculative_blocks,
        )

    def max_resident_blocks(self, vllm_config: VllmConfig) -> int:
        """1, or 2 at boundaries ("align"), or one per block ("all"); + speculative blocks."""
        if self.mamba_cache_mode == "all":
            tokens = vllm_config.model_config.max_model_len
            return cdiv(tokens, self.block_size) + self.num_speculative_blocks
        running = 2 if self.mamba_cache_mode == "align" else 1
        return running + self.num_speculative_blocks

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        if self.mamba_cache_mode == "none":
            return 1 + self.num_speculative_blocks
        return cdiv(max_len, self.block_size) + self.num_speculative_blocks


@dataclass(frozen=True, kw_only=True)
class UniformTypeKVCacheSpecs(KVCacheSpec):
    """Layers of one kind, and so of one block table, whose pages differ: page = their sum."""

    kv_cache_specs: dict[str, KVCacheSpec]

    kind = KVCacheSpecKind.UNIFORM_TYPE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.is_uniform_type(self.kv_cache_specs):
            keys = sorted({str(spec.group_key) for spec in self.kv_cache_specs.values()})
            raise ConfigError(f"layers of kinds {', '.join(keys)} cannot share a block table")

    @classmethod
    def is_uniform_type(cls, kv_cache_specs: Mapping[str, KVCacheSpec]) -> bool:
        return len({spec.group_key for spec in kv_cache_specs.values()}) == 1

    @classmethod
    def from_specs(cls, kv_cache_specs: dict[str, KVCacheSpec]) -> UniformTypeKVCacheSpecs | None:
        """The group of these layers, or None where they cannot share a block table."""
        if not cls.is_uniform_type(kv_cache_specs):
            return None
        first = next(iter(kv_cache_specs.values()))
        return cls(block_size=first.block_size, kv_cache_specs=dict(kv_cache_specs))

    @property
    def unpadded_page_size_bytes(self) -> int:
        return sum(spec.unpadded_page_size_bytes for spec in self.kv_cache_specs.values())

    @property
    def page_size_bytes(self) -> int:
        return sum(spec.page_size_bytes for spec in self.kv_cache_specs.values())

    def get_page_sizes(self) -> set[int]:
        return {spec.page_size_bytes for spec in self.kv_cache_specs.values()}

    def get_num_layer_tuples(self) -> int:
        """Layers that have the commonest page size."""
        pages = [spec.page_size_bytes for spec in self.kv_cache_specs.values()]
        return max(pages.count(page) for page in set(pages))

    @property
    def manager_spec(self) -> KVCacheSpec:
        return next(iter(self.kv_cache_specs.values()))

    @property
    def group_key(self) -> tuple[Any, ...]:
        return self.manager_spec.group_key

    @property
    def needs_zeroing(self) -> bool:
        return any(spec.needs_zeroing for spec in self.kv_cache_specs.values())

    @property
    def uses_slot_mapping(self) -> bool:
        return self.manager_spec.uses_slot_mapping

    @property
    def prefix_cacheable(self) -> bool:
        return self.manager_spec.prefix_cacheable

    @property
    def tokens_per_state(self) -> int | Fraction:
        return self.manager_spec.tokens_per_state

    def max_resident_blocks(self, vllm_config: VllmConfig) -> int:
        return self.manager_spec.max_resident_blocks(vllm_config)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        return self.manager_spec.max_num_blocks_per_req(vllm_config, max_len)

    def copy_with_new_block_size(self, block_size: int) -> KVCacheSpec:
        return UniformTypeKVCacheSpecs(
            block_size=block_size,
            kv_cache_specs={
                name: spec.copy_with_new_block_size(block_size)
                for name, spec in self.kv_cache_specs.items()
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheTensor:
    """Layers of one group and one spec, in the shared backing allocation.

    The page of layer ``layers[l]`` and block ``b`` starts at

        base + offset + l * layer_stride + b * block_stride      (bytes)
    """

    size: int
    """Bytes of the whole backing, the same for every tensor of a device."""
    layers: tuple[str, ...]
    layer_stride: int
    block_stride: int
    offset: int = 0
    host_resident: bool = False


@dataclass(frozen=True, slots=True)
class KVCacheGroupSpec:
    """Layers that share one block table."""

    layer_names: list[str]
    kv_cache_spec: KVCacheSpec
    is_eagle_group: bool = False
    host_resident: bool = False
    enable_kv_transfer: bool = True
    role: str | None = None

    def spec_of(self, layer_name: str) -> KVCacheSpec:
        """The layer's own spec, also where the group's is a uniform-type collection."""
        if isinstance(self.kv_cache_spec, UniformTypeKVCacheSpecs):
            return self.kv_cache_spec.kv_cache_specs[layer_name]
        return self.kv_cache_spec


@dataclass(frozen=True, slots=True)
class KVCacheConfig:
    """The plan of one worker's cache: all that allocation, scheduling and transfer need.

    ``num_blocks`` counts manager blocks; block 0 is the null block, which no request owns.
    """

    num_blocks: int
    kv_cache_tensors: list[KVCacheTensor]
    kv_cache_groups: list[KVCacheGroupSpec]
    kv_cache_layout: KVCacheLayout = KVCacheLayout.LBHNC
    kernel_block_sizes: tuple[int, ...] = ()
    """Tokens of a kernel block, for each group; empty means that they are the manager's."""
    hash_block_size: int | None = None
    """Tokens that one block hash covers; None where nothing is prefix-cached."""
    explanation: Any = field(default=None, compare=False, repr=False)
    """``planner.LayoutPlan``: why this came out."""

    @property
    def backing_size_bytes(self) -> int:
        return max((tensor.size for tensor in self.kv_cache_tensors), default=0)

    @property
    def bytes_per_block(self) -> int:
        return self.backing_size_bytes // self.num_blocks

    @property
    def has_mamba_layers(self) -> bool:
        return any(
            isinstance(g.kv_cache_spec.manager_spec, MambaSpec) for g in self.kv_cache_groups
        )

    @property
    def has_mixed_precision_kv_cache(self) -> bool:
        """Layers store different dtypes, so a block changes its meaning with its owner."""
        dtypes = {
            group.spec_of(name).storage_dtype
            for group in self.kv_cache_groups
            for name in group.layer_names
        }
        return len(dtypes) > 1

    @property
    def needs_kv_cache_zeroing(self) -> bool:
        """Blocks must be zeroed when they are taken from the pool."""
        zeroing = any(group.kv_cache_spec.needs_zeroing for group in self.kv_cache_groups)
        return zeroing or self.has_mixed_precision_kv_cache

    @property
    def cache_hit_alignment_tokens(self) -> int:
        """A prefix hit is a multiple of this: the common multiple of the groups' block sizes."""
        sizes = [
            g.kv_cache_spec.block_size
            for g in self.kv_cache_groups
            if g.kv_cache_spec.prefix_cacheable
        ]
        return math.lcm(*sizes) if sizes else 1

    def kernel_block_size(self, group_id: int) -> int:
        """Tokens of a kernel block of this group."""
        if self.kernel_block_sizes:
            return self.kernel_block_sizes[group_id]
        return self.kv_cache_groups[group_id].kv_cache_spec.block_size

    def kernel_blocks_per_block(self, group_id: int) -> int:
        block_size = self.kv_cache_groups[group_id].kv_cache_spec.block_size
        return block_size // self.kernel_block_size(group_id)

    def group_of(self, layer_name: str) -> int:
        """Index of the group that the layer belongs to.

        Raises:
            KeyError: no group has that layer.
        """
        for i, group in enumerate(self.kv_cache_groups):
            if layer_name in group.layer_names:
                return i
        raise KeyError(layer_name)

    def layer_spec(self, layer_name: str) -> KVCacheSpec:
        return self.kv_cache_groups[self.group_of(layer_name)].spec_of(layer_name)
