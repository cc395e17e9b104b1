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
    "initializer_range": 0.1,
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
_GRANITE: Values = {
    **_BAMBA,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "intermediate_size": 11008,
    "logits_scaling": 1.0,
    "max_position_embeddings": 2048,
    "num_experts_per_tok": 2,
    "num_key_value_heads": None,
    "num_local_experts": 8,
    "pad_token_id": None,
    "position_embedding_type": None,
    "residual_multiplier": 1.0,
    "rms_norm_eps": 1e-6,
    "shared_intermediate_size": 1024,
    "vocab_size": 32000,
}
_FALCON_H1: Values = {
    **_BAMBA,
    "attention_in_multiplier": 1.0,
    "attention_out_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "key_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
    "mamba_d_ssm": 1024,
    "mamba_norm_before_gate": True,
    "mamba_rms_norm": False,
    "max_position_embeddings": 8192,
    "mlp_multipliers": None,
    "projectors_bias": False,
    "ssm_in_multiplier": 1.0,
    "ssm_multipliers": None,
    "ssm_out_multiplier": 1.0,
}
_NEMOTRON_H: Values = {
    **_COMMON,
    **_ATTENTION,
    "conv_kernel": 4,
    "head_dim": 128,
    "intermediate_size": 21504,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 128,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "moe_intermediate_size": 7688,
    "moe_latent_size": None,
    "moe_shared_expert_intermediate_size": 7688,
    "n_group": 1,
    "n_groups": 8,
    "n_routed_experts": 8,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "residual_in_fp32": False,
    "routed_scaling_factor": 1.0,
    "ssm_state_size": 128,
    "time_step_min": 0.001,
    "topk_group": 1,
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 131072,
}
_JAMBA: Values = {
    **_COMMON,
    **_ATTENTION,
    "attn_layer_offset": 4,
    "attn_layer_period": 8,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": "auto",
    "mamba_expand": 2,
    "mamba_proj_bias": False,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 65536,
}
_ZAMBA2: Values = {
    **_COMMON,
    "adapter_rank": 128,
    "add_bias_linear": False,
    "hidden_act": "gelu",
    "hidden_size": 2560,
    "intermediate_size": None,
    "layers_block_type": None,
    "mamba_d_conv": 4,
    "mamba_d_state": 64,
    "mamba_expand": 2,
    "mamba_ngroups": 1,
    "max_position_embeddings": 4096,
    "n_mamba_heads": 8,
    "num_attention_heads": 32,
    "num_hidden_layers": 54,
    "num_key_value_heads": None,
    "num_mem_blocks": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "time_step_min": 0.001,
    "use_long_context": False,
    "use_mem_rope": False,
    "use_shared_attention_adapter": False,
    "vocab_size": 32000,
}
STATE_DEFAULTS: dict[str, Values] = {
    "mamba": _MAMBA,
    "falcon_mamba": {**_MAMBA, "mixer_rms_eps": 1e-6},
    "mamba2": _MAMBA2,
    "bamba": _BAMBA,
    "granitemoehybrid": _GRANITE,
    "falcon_h1": _FALCON_H1,
    "nemotron_h": _NEMOTRON_H,
    "jamba": _JAMBA,
    "zamba2": _ZAMBA2,
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


def _set_time_step_rank(values: Values) -> None:
    if values["time_step_rank"] == "auto":
        values["time_step_rank"] = math.ceil(values["hidden_size"] / 16)


def _finish_mamba(values: Values) -> None:
    values["rms_norm_eps"] = values["layer_norm_epsilon"]
    _set_time_step_rank(values)
    if values.get("intermediate_size") is None:
        values["intermediate_size"] = int(values["expand"] * values["hidden_size"])


def _finish_mamba2(values: Values) -> None:
    values["rms_norm_eps"] = values["layer_norm_epsilon"]
    _set_time_step_rank(values)
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


def _finish_granite(values: Values) -> None:
    _set_time_step_limit(values)
    _set_mamba_head(values, values["mamba_expand"] * values["hidden_size"])
    _set_kinds(values, _kinds_of(values), ["mamba"] * values["num_hidden_layers"])


def _finish_falcon_h1(values: Values) -> None:
    _set_time_step_limit(values)
    if values["mamba_d_ssm"] is None:
        values["mamba_d_ssm"] = values["mamba_expand"] * values["hidden_size"]
    _set_mamba_head(values, values["mamba_d_ssm"])
    values["layer_types"] = ["hybrid"] * values["num_hidden_layers"]
    for name, count in (("mlp_multipliers", 2), ("ssm_multipliers", 5)):
        values[name] = [1.0] * count if values[name] is None else values[name]
        if len(values[name]) != count:
            raise ConfigError(
                f"config.json: {name} must be {count} numbers, not {values[name]!r}",
                parameter="model",
            )


_PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


def _read_pattern(values: Values) -> list[str]:
    pattern = values.get("hybrid_override_pattern")
    if pattern is None:
        return [_PATTERN[letter] for letter in "ME*-"]
    unknown = sorted(set(pattern) - _PATTERN.keys())
    if unknown:
        raise ConfigError(
            f"config.json: hybrid_override_pattern names {', '.join(unknown)}; known: "
            f"{', '.join(_PATTERN)}",
            parameter="model",
        )
    count = values["num_hidden_layers"]
    if len(pattern) < count:
        raise ConfigError(
            f"config.json: hybrid_override_pattern names {len(pattern)} layers, num_hidden_layers "
            f"{count}",
            parameter="model",
        )
    return [_PATTERN[letter] for letter in pattern[:count]]


def _finish_nemotron_h(values: Values) -> None:
    """Released files spell the kinds of layers as one word, a letter each."""
    if values.get("attention_head_dim") is not None:
        values["head_dim"] = values["attention_head_dim"]
    if values.get("num_local_experts") is not None:
        values["n_routed_experts"] = values["num_local_experts"]
    eps = values.get("layer_norm_epsilon")
    values["rms_norm_eps"] = eps if eps is not None else values.get("rms_norm_eps", 1e-5)
    kinds = _kinds_of(values)
    if kinds is None:
        kinds = _read_pattern(values)
    values["num_hidden_layers"] = len(kinds)
    _set_kinds(values, kinds, ())


def _finish_jamba(values: Values) -> None:
    if values["mamba_dt_rank"] == "auto":
        values["mamba_dt_rank"] = math.ceil(values["hidden_size"] / 16)
    for name in ("attn_layer", "expert_layer"):
        offset, period = values[f"{name}_offset"], values[f"{name}_period"]
        if period < 1:
            raise ConfigError(
                f"config.json: {name}_period must be a whole number of at least 1, not {period!r}",
                parameter="model",
            )
        if not 0 <= offset < period:
            raise ConfigError(
                f"config.json: {name}_offset {offset} must be below {name}_period {period}",
                parameter="model",
            )


def _finish_zamba2(values: Values) -> None:
    """Heads of the shared blocks are as wide as two hidden states over the number of heads."""
    hidden = values["hidden_size"]
    values["intermediate_size"] = values["intermediate_size"] or 4 * hidden
    values["head_dim"] = 2 * hidden // values["num_attention_heads"]
    values["attention_head_dim"] = values["head_dim"]
    if values["use_long_context"]:
        values["max_position_embeddings"] = 16384
    run = ["mamba"] * 5 + ["hybrid"]
    default = ["mamba", *run * 7, *["mamba"] * 4, "hybrid", *["mamba"] * 3, "hybrid"]
    _set_kinds(values, _kinds_of(values), [*default, "mamba", "mamba"])
    values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
    values["layers_block_type"] = values["layer_types"]


STATE_FINISHERS: dict[str, Callable[[Values], None]] = {
    "mamba": _finish_mamba,
    "falcon_mamba": _finish_mamba,
    "mamba2": _finish_mamba2,
    "bamba": _finish_bamba,
    "granitemoehybrid": _finish_granite,
    "falcon_h1": _finish_falcon_h1,
    "nemotron_h": _finish_nemotron_h,
    "jamba": _finish_jamba,
    "zamba2": _finish_zamba2,
}
"""Complete a configuration of this model type, in place, before its rotary settings are."""
