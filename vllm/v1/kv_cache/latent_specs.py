"""Specs of latent caches: one vector per state for all heads, as MLA and its indexers keep.

The same rules as ``attention_specs``: arithmetic on integers, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.errors import ConfigError
from vllm.v1.kv_cache.attention_specs import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache.content import (
    ContentFormat,
    KVCacheSpecKind,
    check_counts,
    dtype_itemsize,
    dtype_name,
    round_up,
)

# Bytes of one token's latent in the formats that pack data, scales and RoPE parts together:
# 512 fp8 + 16 scale + 128 RoPE; 448 fp8 + 128 RoPE + 8 scale; nvfp4.
_MLA_STATE_BYTES = {"fp8_ds_mla": 656, "fp8_ds_mla/deepseek_v4": 584, "nvfp4_ds_mla": 352}


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
        raise ConfigError(f"{spec.where}a latent cache has one head slot, not {spec.num_kv_heads}")
    ratio = spec.compress_ratio
    check_counts(spec.where, compress_ratio=ratio, alignment=spec.alignment)
    name = spec.cache_dtype_str
    if name in _MLA_STATE_BYTES and dtype_itemsize(spec.dtype) != 1:
        raise ConfigError(
            f"{spec.where}{name} packs single bytes, not {dtype_name(spec.dtype)}: give the spec "
            "dtype uint8",
            parameter="kv_cache_dtype",
        )
    if ratio != 1:
        if spec.tokens_per_state not in (1, ratio):
            raise ConfigError(
                f"{spec.where}compress_ratio {ratio} and tokens_per_state "
                f"{spec.tokens_per_state} contradict each other"
            )
        object.__setattr__(spec, "tokens_per_state", ratio)


def _check_alignment(spec: LatentSpec) -> None:
    item = dtype_itemsize(spec.dtype_name)
    if spec.page_size_bytes % item:
        raise ConfigError(
            f"{spec.where}page aligned to {spec.page_size_bytes} bytes is not a multiple of the "
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
