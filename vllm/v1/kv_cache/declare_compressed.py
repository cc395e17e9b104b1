"""What a layer of compressed attention (DeepSeek V4) keeps: one spec for each of its caches.

Pure, as ``declare``: layers and plans that are made without a model call the same functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.errors import ConfigError
from vllm.v1.kv_cache.content import KVQuantMode
from vllm.v1.kv_cache.declare import kv_cache_storage
from vllm.v1.kv_cache.latent_specs import MLAAttentionSpec, SlidingWindowMLASpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = [
    "PACKED_WIDTH",
    "compressed_latent_spec",
    "compressor_spec",
    "index_key_spec",
    "window_latent_spec",
]

PACKED_WIDTH = 512
"""Of the latents that fp8_ds_mla packs into 584 bytes."""

# Tokens of a block, and bytes that packed pages are aligned to.
_LATENT_BLOCK, _WINDOW_BLOCK, _ROW_ALIGNMENT = 256, 64, 576
# fp8 values share a float32 scale.
_INDEX_SCALE_BYTES = 4


def _is_packed(vllm_config: VllmConfig, width: int) -> bool:
    """Latents are kept as fp8 with scales: what "auto" means for the width that is made for it."""
    name = vllm_config.cache_config.cache_dtype
    if name in ("fp8", "fp8_ds_mla") and width != PACKED_WIDTH:
        raise ConfigError(
            f"--kv-cache-dtype {name} packs latents of {PACKED_WIDTH}, this model's have {width}: "
            "use auto",
            parameter="kv_cache_dtype",
            value=name,
        )
    return name in ("fp8", "fp8_ds_mla") or (name == "auto" and width == PACKED_WIDTH)


def _plain_dtype(vllm_config: VllmConfig) -> str:
    name = vllm_config.cache_config.cache_dtype
    dtype, quant = kv_cache_storage(name, vllm_config.model_config.dtype_name)
    if quant is not KVQuantMode.NONE:
        raise ConfigError(
            f"--kv-cache-dtype {name} is not for compressed latents: use auto, fp8_ds_mla or the "
            "model's dtype",
            parameter="kv_cache_dtype",
            value=name,
        )
    return dtype


def _latent(vllm_config: VllmConfig, layer_name: str, width: int) -> dict[str, Any]:
    common = {"num_kv_heads": 1, "head_size": width, "layer_name": layer_name}
    if not _is_packed(vllm_config, width):
        return {**common, "dtype": _plain_dtype(vllm_config)}
    return {
        **common,
        "dtype": "uint8",
        "cache_dtype_str": "fp8_ds_mla",
        "model_version": "deepseek_v4",
        "alignment": _ROW_ALIGNMENT,
    }


def window_latent_spec(
    vllm_config: VllmConfig, layer_name: str, *, width: int, window: int
) -> SlidingWindowMLASpec:
    """The latents of the last ``window`` tokens."""
    return SlidingWindowMLASpec(
        block_size=_WINDOW_BLOCK,
        sliding_window=window,
        **_latent(vllm_config, layer_name, width),
    )


def compressed_latent_spec(
    vllm_config: VllmConfig, layer_name: str, *, width: int, ratio: int
) -> MLAAttentionSpec:
    """One latent for each ``ratio`` tokens.

    Raises:
        ConfigError: a block does not hold whole ones.
    """
    if ratio < 1 or _LATENT_BLOCK % ratio:
        raise ConfigError(
            f"config.json: {ratio} tokens a compressed latent do not divide the {_LATENT_BLOCK} of "
            "a block",
            parameter="model",
        )
    return MLAAttentionSpec(
        block_size=_LATENT_BLOCK,
        compress_ratio=ratio,
        **_latent(vllm_config, layer_name, width),
    )


def index_key_spec(
    vllm_config: VllmConfig, layer_name: str, *, width: int, ratio: int, latent_width: int
) -> MLAAttentionSpec:
    """The keys by which compressed latents are chosen; as packed as those latents are."""
    packed = _is_packed(vllm_config, latent_width)
    return MLAAttentionSpec(
        block_size=_LATENT_BLOCK,
        num_kv_heads=1,
        head_size=width + _INDEX_SCALE_BYTES if packed else width,
        dtype="uint8" if packed else _plain_dtype(vllm_config),
        compress_ratio=ratio,
        layer_name=layer_name,
    )


def compressor_spec(layer_name: str, *, width: int, ratio: int, overlaps: bool) -> Any:
    """What the tokens of windows that are not complete give to their compressed latent.

    Values and gates in float32; of both windows that a token belongs to, where they overlap.
    """
    windows = 2 if overlaps else 1
    return SlidingWindowMLASpec(
        block_size=4 if overlaps else 8,
        num_kv_heads=1,
        head_size=2 * windows * width,
        dtype="float32",
        sliding_window=windows * ratio,
        alignment=_ROW_ALIGNMENT if width == PACKED_WIDTH else None,
        layer_name=layer_name,
    )
