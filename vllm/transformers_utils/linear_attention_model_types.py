"""Defaults and implied fields of the models with linear attention and short convolutions.

As ``model_types``, for Qwen3-Next, LFM2, MiniMax-Text-01 and Kimi Linear. No torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.errors import ConfigError, UnsupportedError

__all__ = ["LINEAR_ATTENTION_DEFAULTS", "LINEAR_ATTENTION_FINISHERS"]

Values = dict[str, Any]

_COMMON: Values = {
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "layer_types": None,
    "num_key_value_heads": None,
    "pad_token_id": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
}
_QWEN3_NEXT: Values = {
    **_COMMON,
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 32768,
    "mlp_only_layers": None,
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "shared_expert_intermediate_size": 512,
    "vocab_size": 151936,
}
_LFM2: Values = {
    **_COMMON,
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "bos_token_id": 1,
    "conv_L_cache": 3,
    "conv_bias": False,
    "eos_token_id": 2,
    "full_attn_idxs": None,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-5,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 65536,
}
_LFM2_MOE: Values = {
    **_LFM2,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "moe_intermediate_size": 1792,
    "norm_topk_prob": True,
    "num_dense_layers": 2,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.0,
    "use_expert_bias": True,
}
_KIMI_LINEAR: Values = {
    **_COMMON,
    "attention_bias": False,
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": None,
    "linear_conv_kernel_dim": 4,
    "linear_head_dim": 128,
    "linear_num_heads": 32,
    "mlp_layer_types": None,
    "model_max_length": 1048576,
    "moe_intermediate_size": 1024,
    "moe_renormalize": True,
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_shared_experts": 1,
    "pad_token_id": 163839,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
_FACTORS = ("full_attn", "linear_attn", "mlp")
_MINIMAX: Values = {
    **_COMMON,
    **{f"{part}_{which}_factor": 1 for part in _FACTORS for which in ("alpha", "beta")},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32000,
}
LINEAR_ATTENTION_DEFAULTS: dict[str, Values] = {
    "qwen3_next": _QWEN3_NEXT,
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2_MOE,
    "minimax": _MINIMAX,
    "minimax_text_01": _MINIMAX,
    "kimi_linear": _KIMI_LINEAR,
}


def _check_layer_types(values: Values, kinds: tuple[str, str]) -> None:
    """Each layer is one of two kinds, which are all that the model knows."""
    given, count = values["layer_types"], values["num_hidden_layers"]
    if len(given) < count:
        raise ConfigError(
            f"config.json: layer_types names {len(given)} layers, but num_hidden_layers is {count}",
            parameter="model",
        )
    unknown = sorted({str(kind) for kind in given[:count]} - set(kinds))
    if unknown:
        raise ConfigError(
            f"config.json: layer_types may be {' or '.join(kinds)} in this model, not "
            f"{', '.join(unknown)}",
            parameter="model",
        )


def _finish_qwen3_next(values: Values) -> None:
    values["mlp_only_layers"] = values["mlp_only_layers"] or []
    if values["layer_types"] is None:
        interval = values["full_attention_interval"]
        values["layer_types"] = [
            "linear_attention" if (layer + 1) % interval else "full_attention"
            for layer in range(values["num_hidden_layers"])
        ]
    _check_layer_types(values, ("linear_attention", "full_attention"))


def _finish_lfm2(values: Values) -> None:
    """Older files have names of their own for the inner size, the norms' eps and the tying."""
    values["intermediate_size"] = values.pop("block_ff_dim", values["intermediate_size"])
    values["tie_word_embeddings"] = values.pop("tie_embedding", values["tie_word_embeddings"])
    values["rms_norm_eps"] = values["norm_eps"]
    if values["layer_types"] is None:
        count = values["num_hidden_layers"]
        given = values["full_attn_idxs"]
        attending = range(count) if given is None else given
        values["layer_types"] = [
            "full_attention" if layer in attending else "conv" for layer in range(count)
        ]
    _check_layer_types(values, ("conv", "full_attention"))


def _finish_minimax(values: Values) -> None:
    """The first release has names of its own for the kinds of layers, factors and rotated dims."""
    if values["layer_types"] is None:
        values["layer_types"] = [
            "full_attention" if kind else "linear_attention"
            for kind in values.get("attn_type_list")
            or [(layer + 1) % 2 for layer in range(values["num_hidden_layers"])]
        ]
    _check_layer_types(values, ("linear_attention", "full_attention"))
    for part, old in zip(_FACTORS, ("full_attention", "linear_attention", "mlp"), strict=True):
        for which in ("alpha", "beta"):
            name = f"{part}_{which}_factor"
            values[name] = values.get(f"layernorm_{old}_{which}", values[name])
    rotated = values.get("rotary_dim")
    if rotated is not None:
        width = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        values["partial_rotary_factor"] = rotated / width
    if values.get("shared_intermediate_size"):
        raise UnsupportedError(
            "config.json: shared_intermediate_size is not supported; experts that all tokens share "
            "are there in qwen2_moe and qwen3_next",
            parameter="model",
        )
    if not values.get("postnorm", True):
        raise UnsupportedError(
            "config.json: postnorm false is not supported; true is", parameter="model"
        )


_KIMI_NAMES = {
    "max_position_embeddings": "model_max_length",
    "n_group": "num_expert_group",
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "norm_topk_prob": "moe_renormalize",
    "num_experts_per_tok": "num_experts_per_token",
}
"""What DeepSeek V3 calls a field -> what Kimi Linear calls it."""


def _finish_kimi_linear(values: Values) -> None:
    """Kinds of layers by their numbers, which count from one in the first release."""
    for name, own in _KIMI_NAMES.items():
        values[name] = values.get(name, values[own])
    values["scoring_func"], values["topk_method"] = "sigmoid", "noaux_tc"
    values["head_dim"] = values["qk_rope_head_dim"]
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": values["rope_theta"]}
    given = values["linear_attn_config"] or {}
    for name, own in (
        ("linear_head_dim", "head_dim"),
        ("linear_num_heads", "num_heads"),
        ("linear_conv_kernel_dim", "short_conv_kernel_size"),
    ):
        values[name] = given.get(own, values[name])
    count = values["num_hidden_layers"]
    if values["layer_types"] is None:
        attending = [layer - 1 for layer in given.get("full_attn_layers", [])]
        attending = attending or list(range(4, count, 4))
        values["layer_types"] = [
            "full_attention" if layer in attending else "linear_attention" for layer in range(count)
        ]
    _check_layer_types(values, ("linear_attention", "full_attention"))
    if values["mlp_layer_types"] is None:
        first = values["first_k_dense_replace"]
        values["mlp_layer_types"] = [
            "dense" if layer < first else "sparse" for layer in range(count)
        ]


LINEAR_ATTENTION_FINISHERS: dict[str, Callable[[Values], None]] = {
    "qwen3_next": _finish_qwen3_next,
    "lfm2": _finish_lfm2,
    "lfm2_moe": _finish_lfm2,
    "minimax": _finish_minimax,
    "minimax_text_01": _finish_minimax,
    "kimi_linear": _finish_kimi_linear,
}
"""Complete a configuration of this model type, in place, before its rotary settings are."""
