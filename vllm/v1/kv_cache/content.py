"""What the bytes of a cache are: dtypes, quantisation, the names of formats and of kinds.

Plain values without sizes of a model; imports nothing but the errors, and no torch.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.errors import ConfigError

if TYPE_CHECKING:
    import torch

ITEMSIZE = {
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


def dtype_name(dtype: torch.dtype | str) -> str:
    """``torch.bfloat16`` or ``"bfloat16"`` -> ``"bfloat16"``.

    Raises:
        ConfigError: no dtype that a cache can hold has that name.
    """
    name = str(dtype).removeprefix("torch.")
    name = _DTYPE_ALIASES.get(name, name)
    if name not in ITEMSIZE:
        raise ConfigError(
            f"a KV cache cannot hold dtype {name!r}: use one of {', '.join(ITEMSIZE)}",
            parameter="kv_cache_dtype",
            value=name,
        )
    return name


def dtype_itemsize(dtype: torch.dtype | str) -> int:
    """Bytes of one element."""
    return ITEMSIZE[dtype_name(dtype)]


def to_torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    import torch

    return getattr(torch, dtype_name(dtype))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    return cdiv(a, b) * b


def check_counts(where: str, least: int = 1, /, **counts: Any) -> None:
    """Each of these is a whole number of at least ``least``, or None where it was left out.

    Raises:
        ConfigError: one is not; ``where`` begins the message.
    """
    for name, value in counts.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and value >= least):
            raise ConfigError(
                f"{where}{name} must be a whole number of at least {least}, not {value!r}",
                parameter=name,
                value=value,
            )


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


class KVCacheSpecKind(enum.StrEnum):
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


class ContentFormat(enum.StrEnum):
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
class Segment:
    """Rows along a state's sharded axis that ranks share out: a projection's, or heads.

    The whole model has ``units`` of ``rows`` rows each; a rank holds ``units_per_rank`` of them.
    Where ranks hold more in all than there are, neighbours hold copies.
    """

    name: str
    units: int
    rows: int
    units_per_rank: int

    @property
    def rows_per_rank(self) -> int:
        return self.units_per_rank * self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSlice:
    """One state array inside a page: bytes ``[offset, offset + size_bytes)``."""

    shape: tuple[int, ...]
    dtype_name: str
    offset: int
    size_bytes: int
    sharded_axis: int = 0
    """Axis that tensor-parallel ranks share out."""
    segments: tuple[Segment, ...] = ()
    """What lies along that axis, in order; empty where the layer does not say."""
