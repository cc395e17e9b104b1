"""What a ``config.json`` must hold before anything is computed from it: types, ranges, kinds.

Told once for all model types, by the names of fields; it must not know what a model does with
them. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from vllm.errors import ConfigError

__all__ = ["check_fields", "check_kinds"]

_LEAST: dict[str, int] = {
    "conv_L_cache": 2,
    "conv_kernel": 2,
    "decoder_sparse_step": 1,
    "full_attention_interval": 1,
    "interleave_moe_layer_step": 1,
    "linear_conv_kernel_dim": 2,
    "linear_key_head_dim": 1,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 1,
    "linear_value_head_dim": 1,
    "mamba_d_conv": 2,
    "mamba_d_state": 1,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "n_groups": 1,
    "no_rope_layer_interval": 1,
    "num_mem_blocks": 1,
    "sliding_window_pattern": 1,
    "ssm_state_size": 1,
    "state_size": 1,
}
"""Whole numbers that something is divided by or made of. A convolution over one token alone would
keep no state.
"""
_ABOVE_ZERO = ("floor_scale", "logits_scaling", "query_pre_attn_scalar", "swiglu_limit")
_NAMES_OF_LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types")
_NUMBERS_OF_LAYERS = ("mlp_only_layers", "moe_layers", "no_rope_layers")
_MULTIPLES = (
    ("linear_num_value_heads", "linear_num_key_heads"),
    ("mamba_n_heads", "mamba_n_groups"),
    ("mamba_num_heads", "n_groups"),
    ("n_mamba_heads", "mamba_ngroups"),
    ("num_heads", "n_groups"),
)
_FULL, _SLIDING = "full_attention", "sliding_attention"
_KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "gemma2": {"layer_types": (_FULL, _SLIDING)},
    "gemma3_text": {"layer_types": (_FULL, _SLIDING)},
    "gpt_oss": {"layer_types": (_FULL, _SLIDING)},
    "kimi_linear": {"mlp_layer_types": ("dense", "sparse")},
    "llama": {"layer_types": (_FULL, _SLIDING)},
    "llama4_text": {"layer_types": (_FULL, "chunked_attention")},
    "mistral": {"layer_types": (_FULL, _SLIDING)},
    "mixtral": {"layer_types": (_FULL, _SLIDING)},
    "qwen2": {"layer_types": (_FULL, _SLIDING)},
    "qwen2_moe": {"layer_types": (_FULL, _SLIDING)},
    "qwen3": {"layer_types": (_FULL, _SLIDING)},
}
"""Model type -> list of layers -> what may stand in it."""


def check_fields(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Fields that are given are of a type and size that a model can be built from.

    Args:
        values: a ``config.json`` with its defaults filled in.
        defaults: those of the model type; a field whose default is a number must be one, or null.

    Raises:
        ConfigError: naming the field.
    """
    for name in ("sliding_window", "attention_chunk_size"):
        if values.get(name) is not None and not _is_whole(values[name]):
            raise _wrong(name, "a whole number", values[name])
    ends = values.get("eos_token_id")
    if ends is not None and not all(map(_is_whole, ends if isinstance(ends, list) else [ends])):
        raise _wrong("eos_token_id", "a token id or a list of them", ends)
    for name, default in defaults.items():
        value = values[name]
        # Several tokens may end a text; sizes that are derived may say so.
        if name.endswith("_token_id") or value is None or value == "auto":
            continue
        if _is_number(default) and not _is_number(value):
            raise _wrong(name, "a number", value)
    for name, least in _LEAST.items():
        value = values.get(name)
        if value is not None and not (_is_whole(value) and value >= least):
            raise _wrong(name, f"a whole number of at least {least}", value)
    for name in _ABOVE_ZERO:
        value = values.get(name)
        needed = defaults.get(name) is not None
        if (value is not None or needed) and not (_is_number(value) and value > 0):
            raise _wrong(name, "a number above 0", value)
    for name in _NAMES_OF_LAYERS:
        _check_list(name, values.get(name), str, "names, one a layer")
    for name in _NUMBERS_OF_LAYERS:
        _check_list(name, values.get(name), int, "whole numbers")
    for name, divisor in _MULTIPLES:
        many, few = values.get(name), values.get(divisor)
        if _is_whole(many) and _is_whole(few) and many % few:
            raise ConfigError(
                f"config.json: {name} {many} is not a multiple of {divisor} {few}",
                parameter="model",
            )


def check_kinds(values: Mapping[str, Any]) -> None:
    """Lists of layers name each layer, and nothing that this model type does not have.

    Raises:
        ConfigError: naming the list and what may stand in it.
    """
    count = values.get("num_hidden_layers", 0)
    for name, known in _KINDS.get(values.get("model_type") or "", {}).items():
        given = values.get(name)
        if given is None:
            continue
        if len(given) < count:
            raise ConfigError(
                f"config.json: {name} names {len(given)} layers, but num_hidden_layers is {count}",
                parameter="model",
            )
        unknown = sorted(set(given[:count]) - set(known))
        if unknown:
            raise ConfigError(
                f"config.json: {name} may be {' or '.join(known)} in this model, not "
                f"{', '.join(unknown)}",
                parameter="model",
            )


def _check_list(name: str, value: Any, kind: type, what: str) -> None:
    if value is None:
        return
    if not isinstance(value, list | tuple) or not all(isinstance(item, kind) for item in value):
        raise _wrong(name, f"a list of {what}", value)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(name: str, what: str, value: Any) -> ConfigError:
    return ConfigError(f"config.json: {name} must be {what}, not {value!r}", parameter="model")
