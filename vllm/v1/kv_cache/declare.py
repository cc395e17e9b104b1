"""From a layer's sizes and the settings to its spec: what layers and plans without a model share.

A layer that declares its cache, and ``vllm kv-plan`` that knows a ``config.json`` only, call the
same functions, so both speak of the same bytes. Pure: no torch, no backend; the packing that a
backend wants (``customize_spec``) comes after.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vllm.errors import ConfigError
from vllm.v1.kv_cache.attention_specs import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
    TQFullAttentionSpec,
)
from vllm.v1.kv_cache.content import KVQuantMode, cdiv, round_up
from vllm.v1.kv_cache.latent_specs import MLAAttentionSpec
from vllm.v1.kv_cache.spec import KVCacheSpec
from vllm.v1.kv_cache.state_shapes import StateShapes, state_dtypes
from vllm.v1.kv_cache.state_specs import MambaSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = [
    "TURBOQUANT_BITS",
    "attention_spec",
    "check_skipped_layers",
    "cross_attention_spec",
    "kv_cache_storage",
    "kv_heads_of_rank",
    "latent_spec",
    "state_spec",
    "turboquant_slot_bytes",
]

DEFAULT_BLOCK_SIZE = 16

_STORAGE: Mapping[str, tuple[str, KVQuantMode]] = MappingProxyType(
    {
        "fp8": ("uint8", KVQuantMode.FP8_PER_TENSOR),
        "fp8_e4m3": ("uint8", KVQuantMode.FP8_PER_TENSOR),
        "fp8_e5m2": ("uint8", KVQuantMode.FP8_PER_TENSOR),
        "fp8_inc": ("uint8", KVQuantMode.FP8_PER_TENSOR),
        "int8_per_token_head": ("int8", KVQuantMode.INT8_PER_TOKEN_HEAD),
        "fp8_per_token_head": ("uint8", KVQuantMode.FP8_PER_TOKEN_HEAD),
        "int4_per_token_head": ("uint8", KVQuantMode.INT4_PER_TOKEN_HEAD),
        "nvfp4": ("uint8", KVQuantMode.NVFP4),
        "fp8_ds_mla": ("uint8", KVQuantMode.NONE),
        "nvfp4_ds_mla": ("uint8", KVQuantMode.NONE),
        "turboquant_k8v4": ("uint8", KVQuantMode.TURBOQUANT),
        "turboquant_4bit_nc": ("uint8", KVQuantMode.TURBOQUANT),
        "turboquant_k3v4_nc": ("uint8", KVQuantMode.TURBOQUANT),
        "turboquant_3bit_nc": ("uint8", KVQuantMode.TURBOQUANT),
    }
)
TURBOQUANT_BITS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "turboquant_k8v4": (8, 4),
        "turboquant_4bit_nc": (4, 4),
        "turboquant_k3v4_nc": (3, 4),
        "turboquant_3bit_nc": (3, 3),
    }
)
"""Bits of a key's code and of a value's, by preset."""
_PLAIN = ("bfloat16", "float16", "float32")
_LATENT_ONLY = ("fp8_ds_mla", "nvfp4_ds_mla")


def kv_cache_storage(cache_dtype: str, model_dtype: Any) -> tuple[str, KVQuantMode]:
    """Element dtype (name) and quantisation of a cache asked for as ``--kv-cache-dtype``.

    Raises:
        ConfigError: the name is unknown.
    """
    if cache_dtype == "auto":
        return str(model_dtype).removeprefix("torch."), KVQuantMode.NONE
    if cache_dtype in _PLAIN:
        return cache_dtype, KVQuantMode.NONE
    if cache_dtype in _STORAGE:
        return _STORAGE[cache_dtype]
    raise ConfigError(
        f"--kv-cache-dtype {cache_dtype!r} is unknown: use auto, {', '.join(_PLAIN)}, "
        f"{', '.join(_STORAGE)}",
        parameter="kv_cache_dtype",
        value=cache_dtype,
    )


def turboquant_slot_bytes(cache_dtype: str, head_size: int) -> int:
    """Bytes of one (head, token) slot of a TurboQuant preset.

    Key: ``D`` at 8 bits, else ``ceil(D * bits / 8)`` and an fp16 norm. Value: the same of its bits,
    an fp16 scale and an fp16 zero. Their sum is rounded up to even.

    Raises:
        ConfigError: heads of this size are not taken (those that are rotated cannot be).
    """
    key_bits, value_bits = TURBOQUANT_BITS[cache_dtype]
    if head_size & (head_size - 1) or head_size < 8:
        raise ConfigError(
            f"--kv-cache-dtype {cache_dtype} takes heads whose size is a power of two, not "
            f"{head_size}: use nvfp4 or int4_per_token_head",
            parameter="kv_cache_dtype",
            value=cache_dtype,
        )
    key = head_size if key_bits == 8 else cdiv(head_size * key_bits, 8) + 2
    return round_up(key + cdiv(head_size * value_bits, 8) + 4, 2)


def kv_heads_of_rank(total: int, tp_size: int) -> int:
    """KV heads that each of ``tp_size`` ranks holds; one, a copy, where there are fewer heads.

    Raises:
        ConfigError: neither divides the other.
    """
    if total % tp_size == 0:
        return total // tp_size
    if tp_size % total == 0:
        return 1
    raise ConfigError(
        f"--tensor-parallel-size {tp_size} neither divides the {total} KV heads nor is a multiple "
        "of them",
        parameter="tensor_parallel_size",
        value=tp_size,
    )


def check_skipped_layers(specs: Mapping[str, KVCacheSpec], vllm_config: VllmConfig) -> None:
    """Whether each entry of --kv-cache-dtype-skip-layers means a layer that attends.

    Raises:
        ConfigError: one means none, so it would be ignored.
    """
    vllm_config.cache_config.check_skipped_layers(
        {name: _has_window(spec) for name, spec in specs.items() if isinstance(spec, AttentionSpec)}
    )


def _has_window(spec: AttentionSpec) -> bool:
    """Whether tokens see the last ones only, whatever the cache keeps."""
    if isinstance(spec, FullAttentionSpec):
        return spec.sliding_window is not None
    return isinstance(spec, SlidingWindowSpec)


def _cache_dtype(vllm_config: VllmConfig, layer_name: str, has_window: bool = False) -> str:
    return vllm_config.cache_config.dtype_of_layer(layer_name, has_window)


def _block_size(vllm_config: VllmConfig, default: int = DEFAULT_BLOCK_SIZE) -> int:
    return vllm_config.cache_config.block_size or default


def attention_spec(
    vllm_config: VllmConfig,
    layer_name: str,
    *,
    num_kv_heads: int,
    head_size: int,
    head_size_v: int | None = None,
    sliding_window: int | None = None,
    attention_chunk_size: int | None = None,
    default_block_size: int = DEFAULT_BLOCK_SIZE,
) -> KVCacheSpec:
    """K and V of a decoder's layer with ``num_kv_heads`` heads on this rank.

    Args:
        default_block_size: tokens of a block where the settings leave it open.

    Raises:
        ConfigError: the cache dtype does not exist, or does not fit the layer.
    """
    name = _cache_dtype(vllm_config, layer_name, sliding_window is not None)
    if name in _LATENT_ONLY:
        raise ConfigError(
            f"--kv-cache-dtype {name} is for latent (MLA) caches; layer {layer_name} keeps K and "
            "V: use fp8 or nvfp4",
            parameter="kv_cache_dtype",
            value=name,
        )
    dtype, quant = kv_cache_storage(name, vllm_config.model_config.dtype_name)
    common: dict[str, Any] = {
        "block_size": _block_size(vllm_config, default_block_size),
        "num_kv_heads": num_kv_heads,
        "head_size": head_size,
        "head_size_v": head_size_v,
        "dtype": dtype,
        "kv_quant_mode": quant,
        "layer_name": layer_name,
    }
    if quant.is_turboquant:
        slot = turboquant_slot_bytes(name, head_size)
        if sliding_window is None and attention_chunk_size is None:
            return TQFullAttentionSpec(**common, tq_slot_size=slot)
        common["state_content_bytes"] = slot
    if sliding_window is not None:
        return SlidingWindowSpec(**common, sliding_window=sliding_window)
    if attention_chunk_size is not None:
        return ChunkedLocalAttentionSpec(**common, attention_chunk_size=attention_chunk_size)
    return FullAttentionSpec(**common)


def cross_attention_spec(
    vllm_config: VllmConfig, layer_name: str, *, num_kv_heads: int, head_size: int
) -> CrossAttentionSpec:
    """K and V of an encoder's output."""
    dtype, quant = kv_cache_storage(
        _cache_dtype(vllm_config, layer_name), vllm_config.model_config.dtype_name
    )
    return CrossAttentionSpec(
        block_size=_block_size(vllm_config),
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        dtype=dtype,
        kv_quant_mode=quant,
        layer_name=layer_name,
    )


def latent_spec(
    vllm_config: VllmConfig, layer_name: str, *, kv_lora_rank: int, qk_rope_head_dim: int
) -> MLAAttentionSpec:
    """The latent and the rotary part of K, one for all heads and on every rank."""
    name = _cache_dtype(vllm_config, layer_name)
    dtype, quant = kv_cache_storage(name, vllm_config.model_config.dtype_name)
    if quant not in (KVQuantMode.NONE, KVQuantMode.FP8_PER_TENSOR):
        raise ConfigError(
            f"--kv-cache-dtype {name} stores K and V of heads; layer {layer_name} keeps a latent: "
            "use fp8, fp8_ds_mla or nvfp4_ds_mla",
            parameter="kv_cache_dtype",
            value=name,
        )
    return MLAAttentionSpec(
        block_size=_block_size(vllm_config),
        num_kv_heads=1,
        head_size=kv_lora_rank + qk_rope_head_dim,
        dtype=dtype,
        kv_quant_mode=quant,
        cache_dtype_str=name,
        layer_name=layer_name,
    )


def state_spec(
    vllm_config: VllmConfig,
    layer_name: str,
    shapes: StateShapes,
    conv_state_layout: str | None = None,
    num_speculative_blocks: int = 0,
) -> MambaSpec:
    """The states of a recurrent layer.

    With ``mamba_cache_mode`` "none" a block stands for a whole request. Else it stands for
    --mamba-block-size tokens, by default as many as an attention block.

    Args:
        conv_state_layout: VLLM_SSM_CONV_STATE_LAYOUT; None is SD.

    Raises:
        ConfigError: the dtypes do not fit the shapes.
    """
    cache = vllm_config.cache_config
    ordered = shapes.in_order(conv_state_layout)
    if cache.mamba_cache_mode == "none":
        block_size = vllm_config.model_config.max_model_len
    else:
        block_size = cache.mamba_block_size or _block_size(vllm_config)
    return MambaSpec(
        block_size=block_size,
        shapes=ordered.shapes,
        dtypes=state_dtypes(
            shapes,
            vllm_config.model_config.dtype_name,
            cache.mamba_cache_dtype,
            cache.mamba_ssm_cache_dtype,
        ),
        mamba_type=shapes.mamba_type,
        mamba_cache_mode=cache.mamba_cache_mode,
        num_speculative_blocks=num_speculative_blocks,
        conv_state_layout=ordered.conv_order,
        segments=ordered.segments,
        sharded_axes=ordered.sharded_axes,
        layer_name=layer_name,
    )
