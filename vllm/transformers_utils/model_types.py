"""What the configurations of model types leave out, and what their fields imply.

For each model type beyond the Llama family: the defaults of its transformers configuration class,
and a function that completes its values. ``hf_config`` applies both. No torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.errors import ConfigError, UnsupportedError
from vllm.transformers_utils.state_model_types import STATE_DEFAULTS, STATE_FINISHERS

__all__ = ["DEFAULTS", "FINISHERS"]

Values = dict[str, Any]

_COMMON: Values = {
    "attention_bias": False,
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
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_cache": True,
}
_GEMMA2: Values = {
    **_COMMON,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
    "vocab_size": 256000,
}
_GEMMA3: Values = {
    **_GEMMA2,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "max_position_embeddings": 131072,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "sliding_window_pattern": 6,
    "use_bidirectional_attention": False,
    "vocab_size": 262208,
}
_MIXTRAL: Values = {
    **_COMMON,
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
    "vocab_size": 32000,
}
_QWEN_MOE: Values = {
    **_COMMON,
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "max_position_embeddings": 32768,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "num_hidden_layers": 24,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN2_MOE: Values = {
    **_QWEN_MOE,
    "intermediate_size": 5632,
    "max_window_layers": 28,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 16,
    "qkv_bias": True,
    "shared_expert_intermediate_size": 5632,
}
_QWEN3_MOE: Values = {
    **_QWEN_MOE,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
}
_GPT_OSS: Values = {
    **_COMMON,
    "attention_bias": True,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "sliding_window": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "vocab_size": 201088,
}
_LLAMA4: Values = {
    **_COMMON,
    "attention_chunk_size": 8192,
    "attn_scale": 0.1,
    "attn_temperature_tuning": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "floor_scale": 8192,
    "head_dim": 128,
    "hidden_size": 5120,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 131072,
    "moe_layers": None,
    "no_rope_layer_interval": 4,
    "no_rope_layers": None,
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_qk_norm": True,
    "vocab_size": 202048,
}
_DEEPSEEK: Values = {
    **_COMMON,
    "kv_lora_rank": 512,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": None,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_interleave": True,
    "v_head_dim": 128,
}
_DEEPSEEK_V2: Values = {
    **_DEEPSEEK,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 0,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "moe_intermediate_size": 1407,
    "n_group": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 32,
    "num_experts_per_tok": None,
    "num_hidden_layers": 32,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": None,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
_DEEPSEEK_V3: Values = {
    **_DEEPSEEK,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
_DEEPSEEK_V4: Values = {
    **_COMMON,
    "bos_token_id": 0,
    "compress_rope_theta": 160000.0,
    "eos_token_id": 1,
    "hc_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "max_position_embeddings": 1048576,
    "mlp_bias": False,
    "mlp_layer_types": None,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "vocab_size": 129280,
}
_BART: Values = {
    "activation_function": "gelu",
    "bos_token_id": 0,
    "d_model": 1024,
    "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096,
    "decoder_layers": 12,
    "decoder_start_token_id": 2,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "encoder_layers": 12,
    "eos_token_id": 2,
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "max_position_embeddings": 1024,
    "pad_token_id": 1,
    "scale_embedding": False,
    "tie_word_embeddings": True,
    "vocab_size": 50265,
}
DEFAULTS: dict[str, Values] = {
    "bart": _BART,
    "deepseek_v4": _DEEPSEEK_V4,
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v3": _DEEPSEEK_V3,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "mixtral": _MIXTRAL,
    "qwen2_moe": _QWEN2_MOE,
    "qwen3_moe": _QWEN3_MOE,
    "gpt_oss": _GPT_OSS,
    "llama4_text": _LLAMA4,
    **STATE_DEFAULTS,
}
"""Defaults of the transformers configuration class of each model type."""

_GPT_OSS_ROPE: Values = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _set_layer_types(values: Values, is_sliding: Callable[[int], bool]) -> None:
    """Kinds of attention layers by their number, where the configuration does not list them."""
    count = values["num_hidden_layers"]
    if values["layer_types"] is None:
        values["layer_types"] = [
            "sliding_attention" if is_sliding(layer) else "full_attention" for layer in range(count)
        ]
    if len(values["layer_types"]) < count:
        raise ConfigError(
            f"config.json: layer_types names {len(values['layer_types'])} layers, but "
            f"num_hidden_layers is {count}"
        )


def _refuse_bidirectional(values: Values) -> None:
    if values["use_bidirectional_attention"]:
        raise UnsupportedError(
            "config.json: use_bidirectional_attention makes an encoder of this model; this engine "
            "serves decoders",
            parameter="model",
        )


def _finish_gemma2(values: Values) -> None:
    _refuse_bidirectional(values)
    _set_layer_types(values, lambda layer: layer % 2 == 0)


def _finish_gemma3(values: Values) -> None:
    """Every sixth layer is full and has a RoPE of its own; older files name the two bases."""
    _refuse_bidirectional(values)
    # A model that was saved by transformers 5 names the pattern with an underscore.
    pattern = values.get("_sliding_window_pattern") or values["sliding_window_pattern"]
    _set_layer_types(values, lambda layer: (layer + 1) % pattern != 0)
    given = dict(values.get("rope_parameters") or {})
    if "full_attention" not in given and "sliding_attention" not in given:
        scaling = given or dict(values.get("rope_scaling") or {})
        given = {"full_attention": scaling}
    full = dict(given.get("full_attention") or {})
    sliding = dict(given.get("sliding_attention") or {})
    full.setdefault("rope_theta", values["rope_theta"])
    sliding.setdefault("rope_theta", values["rope_local_base_freq"])
    for rope in (full, sliding):
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    values["rope_parameters"] = {"full_attention": full, "sliding_attention": sliding}


def _set_experts(values: Values) -> None:
    """One name for the number of experts, which files call by two."""
    local = values.get("num_local_experts")
    if local is not None:
        values["num_experts"] = local
    values["num_local_experts"] = values["num_experts"]


def _finish_qwen2_moe(values: Values) -> None:
    _set_experts(values)
    values["mlp_only_layers"] = values["mlp_only_layers"] or []
    sliding = values["use_sliding_window"]
    if not sliding:
        values["sliding_window"] = None
    last = values["max_window_layers"]
    _set_layer_types(values, lambda layer: sliding and layer % 2 == 0 and layer < last)


def _finish_qwen3_moe(values: Values) -> None:
    _set_experts(values)
    values["mlp_only_layers"] = values["mlp_only_layers"] or []
    if not values["use_sliding_window"]:
        values["sliding_window"] = None
    values["layer_types"] = None


def _finish_gpt_oss(values: Values) -> None:
    _set_experts(values)
    _set_layer_types(values, lambda layer: layer % 2 == 0)
    if not values.get("rope_parameters") and not values.get("rope_scaling"):
        values["rope_parameters"] = dict(_GPT_OSS_ROPE)


def _finish_llama4(values: Values) -> None:
    """``no_rope_layers`` says 1 for a layer with RoPE: it attends within its chunk."""
    _set_experts(values)
    count = values["num_hidden_layers"]
    if not values["no_rope_layers"]:
        interval = values["no_rope_layer_interval"]
        values["no_rope_layers"] = [int((layer + 1) % interval != 0) for layer in range(count)]
    if values["moe_layers"] is None:
        step = values["interleave_moe_layer_step"]
        values["moe_layers"] = list(range(step - 1, count, step))
    if values["layer_types"] is None:
        values["layer_types"] = [
            "chunked_attention" if rope else "full_attention" for rope in values["no_rope_layers"]
        ]
    for name in ("no_rope_layers", "layer_types"):
        if len(values[name]) < count:
            raise ConfigError(
                f"config.json: {name} names {len(values[name])} layers, but num_hidden_layers is "
                f"{count}"
            )


def _finish_deepseek(values: Values) -> None:
    """Attention needs no ``head_dim``; where one is asked for, it is that of RoPE."""
    values["head_dim"] = values["qk_rope_head_dim"]
    routed = values.get("num_experts") or values.get("num_local_experts")
    if routed is not None:
        values["n_routed_experts"] = routed


_WINDOW_ONLY = "sliding_attention"
_SPARSELY_COMPRESSED = "compressed_sparse_attention"
_HEAVILY_COMPRESSED = "heavily_compressed_attention"


def _kinds_of_ratios(ratios: Any, rates: Values, count: int) -> list[str]:
    """Kinds of layers that compress so many tokens to one; 0 for none."""
    kinds = {0: _WINDOW_ONLY, rates[_HEAVILY_COMPRESSED]: _HEAVILY_COMPRESSED}
    kinds[rates[_SPARSELY_COMPRESSED]] = _SPARSELY_COMPRESSED
    if not isinstance(ratios, list):
        raise ConfigError(
            f"config.json: compress_ratios must be a list of numbers, one a layer, not {ratios!r}",
            parameter="model",
        )
    # Behind the last layer there may be those of layers that guess further tokens.
    for layer, ratio in enumerate(ratios[:count]):
        if ratio not in kinds:
            raise ConfigError(
                f"config.json: compress_ratios says {ratio!r} for layer {layer}; ratios are "
                f"{', '.join(map(str, sorted(kinds)))}",
                parameter="model",
            )
    return [kinds[ratio] for ratio in ratios[:count]]


def _finish_deepseek_v4(values: Values) -> None:
    """Kinds of layers and tokens of a compressed latent from each other; a RoPE for windows and one
    for compressed latents.
    """
    count = values["num_hidden_layers"]
    ratios = values.get("compress_ratios")
    rates = {_SPARSELY_COMPRESSED: 4, _HEAVILY_COMPRESSED: 128}
    rates |= values.get("compress_rates") or {}
    for kind, name in (
        (_SPARSELY_COMPRESSED, "compress_rate_csa"),
        (_HEAVILY_COMPRESSED, "compress_rate_hca"),
    ):
        rates[kind] = values.get(name) or rates[kind]
    if values["layer_types"] is None and ratios is not None:
        values["layer_types"] = _kinds_of_ratios(ratios, rates, count)
    if values["layer_types"] is None:
        values["layer_types"] = [
            _SPARSELY_COMPRESSED if i % 2 and i > 1 else _HEAVILY_COMPRESSED for i in range(count)
        ]
    values["layer_types"] = values["layer_types"][:count]
    values["compress_rates"] = rates
    if rates[_HEAVILY_COMPRESSED] == rates[_SPARSELY_COMPRESSED]:
        raise ConfigError(
            f"config.json: compress_rates.{_HEAVILY_COMPRESSED} must not be that of "
            f"{_SPARSELY_COMPRESSED}, {rates[_SPARSELY_COMPRESSED]}",
            parameter="model",
        )
    kinds = {_WINDOW_ONLY: 0, **rates}
    unknown = sorted(set(map(str, values["layer_types"])) - {*kinds})
    if unknown:
        raise ConfigError(
            f"config.json: layer_types of deepseek_v4 may be {', '.join(kinds)}, not "
            f"{', '.join(unknown)}",
            parameter="model",
        )
    values["compress_ratios"] = [kinds[kind] for kind in values["layer_types"]]
    if rates[_SPARSELY_COMPRESSED] != 4:
        raise UnsupportedError(
            f"config.json: compress_rates.{_SPARSELY_COMPRESSED} must be 4, not "
            f"{rates[_SPARSELY_COMPRESSED]}: windows of 4 overlap, others do not",
            parameter="model",
        )
    if values["mlp_layer_types"] is None:
        hashed = values.get("num_hash_layers", 3)
        values["mlp_layer_types"] = ["hash_moe" if i < hashed else "moe" for i in range(count)]
    for name in ("layer_types", "mlp_layer_types"):
        if len(values[name]) < count:
            raise ConfigError(
                f"config.json: {name} names {len(values[name])} layers, but num_hidden_layers is "
                f"{count}"
            )
    rotated = values.get("qk_rope_head_dim")
    share = values.get("partial_rotary_factor")
    if share is None:
        share = rotated / values["head_dim"] if rotated else 64 / 512
    values["partial_rotary_factor"] = share
    rotated = values["qk_rope_head_dim"] = int(values["head_dim"] * share)
    if rotated > values["index_head_dim"]:
        raise ConfigError(
            f"config.json: index_head_dim {values['index_head_dim']} is less than the {rotated} "
            "dimensions that are rotated",
            parameter="model",
        )
    _set_compressed_ropes(values, share)


def _set_compressed_ropes(values: Values, share: float) -> None:
    given = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    if "main" not in given or "compress" not in given:
        if "type" in given:
            given["rope_type"] = given.pop("type")
        scaled = {
            "rope_type": "default",
            **given,
            "rope_theta": values["compress_rope_theta"],
            "partial_rotary_factor": share,
        }
        if scaled["rope_type"] == "yarn":
            scaled.setdefault("attention_factor", 1.0)
            scaled.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
        plain = {
            "rope_type": "default",
            "rope_theta": values["rope_theta"],
            "partial_rotary_factor": share,
        }
        given = {"main": plain, "compress": scaled}
    values["rope_parameters"] = {name: dict(given[name]) for name in ("main", "compress")}


def _finish_bart(values: Values) -> None:
    """The decoder's sizes by the names that other models have."""
    heads, width = values["decoder_attention_heads"], values["d_model"]
    for side in ("encoder", "decoder"):
        if width % values[f"{side}_attention_heads"]:
            raise ConfigError(
                f"config.json: d_model {width} is not a multiple of {side}_attention_heads "
                f"{values[f'{side}_attention_heads']}",
                parameter="model",
            )
    values["hidden_size"] = width
    values["num_attention_heads"] = values["num_key_value_heads"] = heads
    values["num_hidden_layers"] = values["decoder_layers"]
    values["head_dim"] = width // heads


FINISHERS: dict[str, Callable[[Values], None]] = {
    "bart": _finish_bart,
    "deepseek_v4": _finish_deepseek_v4,
    "deepseek_v2": _finish_deepseek,
    "deepseek_v3": _finish_deepseek,
    "gemma2": _finish_gemma2,
    "gemma3_text": _finish_gemma3,
    "mixtral": _set_experts,
    "qwen2_moe": _finish_qwen2_moe,
    "qwen3_moe": _finish_qwen3_moe,
    "gpt_oss": _finish_gpt_oss,
    "llama4_text": _finish_llama4,
    **STATE_FINISHERS,
}
"""Complete a configuration of this model type, in place, before its rotary settings are."""
