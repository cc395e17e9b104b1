"""Specs of latent caches: one vector per state for all heads, as MLA and its indexers keep.

The same rules as ``attention_specs``: arithmetic on integers, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.errors import ConfigError
from vllm.v1.kv_cache.attention_specs import (
    AttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
)
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
class _LatentSpec(AttentionSpec):
    """What specs of latents share, whatever a token sees; never used by itself."""

    head_size_v: int | None = 0
    cache_dtype_str: str | None = None
    alignment: int | None = None
    compress_ratio: int = 1
    model_version: str | None = None

    def __post_init__(self) -> None:
        self._check_latent()
        super().__post_init__()
        item = dtype_itemsize(self.dtype_name)
        if self.page_size_bytes % item:
            raise ConfigError(
                f"{self.where}page aligned to {self.page_size_bytes} bytes is not a multiple of "
                f"the {item}-byte {self.dtype_name}"
            )

    def _check_latent(self) -> None:
        if self.num_kv_heads != 1:
            raise ConfigError(
                f"{self.where}a latent cache has one head slot, not {self.num_kv_heads}"
            )
        ratio = self.compress_ratio
        check_counts(self.where, compress_ratio=ratio, alignment=self.alignment)
        name = self.cache_dtype_str
        if name in _MLA_STATE_BYTES and dtype_itemsize(self.dtype) != 1:
            raise ConfigError(
                f"{self.where}{name} packs single bytes, not {dtype_name(self.dtype)}: give the "
                "spec dtype uint8",
                parameter="kv_cache_dtype",
            )
        if ratio != 1:
            if self.tokens_per_state not in (1, ratio):
                raise ConfigError(
                    f"{self.where}compress_ratio {ratio} and tokens_per_state "
                    f"{self.tokens_per_state} contradict each other"
                )
            object.__setattr__(self, "tokens_per_state", ratio)

    @property
    def state_content_size_bytes(self) -> int:
        if self.state_content_bytes is not None:
            return self.state_content_bytes
        name = self.cache_dtype_str or ""
        if f"{name}/{self.model_version}" in _MLA_STATE_BYTES:
            return _MLA_STATE_BYTES[f"{name}/{self.model_version}"]
        if name in _MLA_STATE_BYTES:
            return _MLA_STATE_BYTES[name]
        return self.head_size * dtype_itemsize(self.dtype_name)

    @property
    def page_size_bytes(self) -> int:
        if self.page_size_padded is not None:
            return self.page_size_padded
        return round_up(self.unpadded_page_size_bytes, self.alignment or 1)

    @property
    def content_format(self) -> ContentFormat:
        return ContentFormat.LATENT

    @property
    def head_axis_is_sliceable(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class MLAAttentionSpec(_LatentSpec, FullAttentionSpec):
    """One latent per ``compress_ratio`` tokens, no V of its own.

    page = round_up((block_size / compress_ratio) * C, alignment); C = head_size * itemsize, or
    656 (fp8_ds_mla), 584 (fp8_ds_mla of deepseek_v4), 352 (nvfp4_ds_mla).
    """

    non_causal_multi_token_decode: bool = False

    kind = KVCacheSpecKind.MLA


@dataclass(frozen=True, kw_only=True)
class SlidingWindowMLASpec(_LatentSpec, SlidingWindowSpec):
    """A latent per state within a window; page as ``MLAAttentionSpec``'s."""

    kind = KVCacheSpecKind.SLIDING_WINDOW_MLA
