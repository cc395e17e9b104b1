"""As ``model_types``, for models with state layers: defaults, and what their fields imply."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from vllm.errors import ConfigError

__all__ = ["STATE_DEFAULTS", "STATE_FINISHERS"]

Values = dict[str, Any]

_NO_LIMIT = (0.0, float("inf"))
_COMMON: Values = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "use_cache": True,
}
_MAMBA: Values = {
    **_COMMON,
    "bos_token_id": 0,
    "conv_kernel": 4,
    "eos_token_id": 0,
    "expand": 2,
    "hidden_size": 768,
    "layer_norm_epsilon": 1e-5,
    "num_hidden_layers": 32,
    "residual_in_fp32": True,
    "state_size": 16,
    "tie_word_embeddings": True,
    "time_step_rank": "auto",
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 50280,
}
_MAMBA2: Values = {
    **_MAMBA,
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_size": 4096,
    "n_groups": 8,
    "num_heads": 128,
    "num_hidden_layers": 64,
    "pad_token_id": 1,
    "state_size": 128,
    "tie_word_embeddings": False,
    "time_step_limit": _NO_LIMIT,
    "vocab_size": 32768,
}
_ATTENTION: Values = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": None,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 262144,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
}
_BAMBA: Values = {
    **_COMMON,
    **_ATTENTION,
    "attn_layer_indices": None,
    "layer_types": None,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": "auto",
    "mamba_d_state": 256,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 128,
    "mamba_proj_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "time_step_limit": _NO_LIMIT,
    "vocab_size": 128000,
}
STATE_DEFAULTS: dict[str, Values] = {
    "mamba": _MAMBA,
    "falcon_mamba": {**_MAMBA, "mixer_rms_eps": 1e-6},
    "mamba2": _MAMBA2,
    "bamba": _BAMBA,
}
"""Defaults of the transformers configuration class of each model type."""

_KINDS = {
    "attention": "full_attention",
    "mamba": "linear_attention",
    "hybrid": "hybrid",
    "full_attention": "full_attention",
    "linear_attention": "linear_attention",
    "mlp": "mlp",
    "moe": "moe",
}


def _set_kinds(values: Values, kinds: Sequence[str] | None, default: Sequence[str]) -> None:
    """``layer_types`` by the names of transformers 5, whichever the file uses."""
    names = list(kinds if kinds is not None else default)
    unknown = sorted(set(names) - _KINDS.keys())
    if unknown:
        raise ConfigError(
            f"config.json: layers of kind {', '.join(map(repr, unknown))} are not known; these "
            f"are: {', '.join(_KINDS)}",
            parameter="model",
        )
    if len(names) < values["num_hidden_layers"]:
        raise ConfigError(
            f"config.json: the kinds of {len(names)} layers are named, but num_hidden_layers is "
            f"{values['num_hidden_layers']}",
            parameter="model",
        )
    values["layer_types"] = [_KINDS[name] for name in names]


def _kinds_of(values: Values) -> Sequence[str] | None:
    kinds = values.get("layer_types")
    return kinds if kinds is not None else values.get("layers_block_type")


def _set_time_step_limit(values: Values) -> None:
    """Two numbers; transformers writes infinity as ``{"__float__": "Infinity"}``."""
    given = values["time_step_limit"]
    limit = _NO_LIMIT if given is None else given
    try:
        low, high = (
            float(bound["__float__"] if isinstance(bound, dict) else bound) for bound in limit
        )
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"config.json: time_step_limit must be two numbers, not {given!r}", parameter="model"
        ) from None
    values["time_step_limit"] = (low, high)


def _finish_mamba(values: Values) -> None:
    values["rms_norm_eps"] = values["layer_norm_epsilon"]
    if values.get("intermediate_size") is None:
        values["intermediate_size"] = int(values["expand"] * values["hidden_size"])
    if values["time_step_rank"] == "auto":
        values["time_step_rank"] = math.ceil(values["hidden_size"] / 16)


def _finish_mamba2(values: Values) -> None:
    values["rms_norm_eps"] = values["layer_norm_epsilon"]
    _set_time_step_limit(values)
    inner = values["num_heads"] * values["head_dim"]
    if inner != values["expand"] * values["hidden_size"]:
        raise ConfigError(
            f"config.json: num_heads {values['num_heads']} of head_dim {values['head_dim']} are "
            f"{inner} channels, but expand * hidden_size is "
            f"{values['expand'] * values['hidden_size']}",
            parameter="model",
        )


def _set_mamba_head(values: Values, inner: int) -> None:
    """Width of a Mamba 2 head where the file leaves it to be derived."""
    if values["mamba_d_head"] == "auto":
        values["mamba_d_head"] = inner // values["mamba_n_heads"]
    if values["mamba_d_head"] * values["mamba_n_heads"] != inner:
        raise ConfigError(
            f"config.json: mamba_n_heads {values['mamba_n_heads']} of mamba_d_head "
            f"{values['mamba_d_head']} do not make {inner} channels",
            parameter="model",
        )


def _finish_bamba(values: Values) -> None:
    _set_time_step_limit(values)
    _set_mamba_head(values, values["mamba_expand"] * values["hidden_size"])
    attending = values["attn_layer_indices"] or ()
    default = [
        "attention" if layer in attending else "mamba"
        for layer in range(values["num_hidden_layers"])
    ]
    _set_kinds(values, _kinds_of(values), default)
    # Half of each head is turned, whatever the file says.
    values["partial_rotary_factor"] = 0.5
    if isinstance(values.get("rope_parameters"), dict):
        values["rope_parameters"] = {**values["rope_parameters"], "partial_rotary_factor": 0.5}


STATE_FINISHERS: dict[str, Callable[[Values], None]] = {
    "mamba": _finish_mamba,
    "falcon_mamba": _finish_mamba,
    "mamba2": _finish_mamba2,
    "bamba": _finish_bamba,
}
"""Complete a configuration of this model type, in place, before its rotary settings are."""
