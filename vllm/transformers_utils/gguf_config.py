"""A Hugging Face configuration out of GGUF metadata. Knows no tensors' contents and no torch."""

from __future__ import annotations

import mmap
import struct
from typing import Any

from vllm.errors import ConfigError, UnsupportedError
from vllm.transformers_utils.gguf_file import GGUFFile

__all__ = ["GGUF_ARCHITECTURES", "gguf_config_values", "gguf_generation_config"]

GGUF_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
    "mamba": ("MambaForCausalLM", "mamba"),
}
"""``general.architecture`` -> (class, model_type); Mistral's files say llama."""

_REQUIRED = (
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "block_count",
    "context_length",
)
_REQUIRED_OF_MAMBA = (
    "embedding_length",
    "block_count",
    "ssm.conv_kernel",
    "ssm.inner_size",
    "ssm.state_size",
    "ssm.time_step_rank",
)
_F32_FILE, _F16_FILE = 0, 1
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models: they alone scale scores by hidden size / heads, and no key says so."""
_ROPE_FACTORS = "rope_freqs.weight"


def gguf_config_values(gguf: GGUFFile) -> dict[str, Any]:
    """What ``config.json`` would hold.

    Raises:
        ConfigError: metadata that every model needs is absent.
        UnsupportedError: the file's architecture or rotary scaling is not served.
    """
    if gguf.architecture not in GGUF_ARCHITECTURES:
        raise UnsupportedError(
            f"--model {gguf.path}: GGUF architecture {gguf.architecture!r} is not supported; "
            f"these are: {', '.join(sorted(GGUF_ARCHITECTURES))}",
            parameter="model",
        )
    is_mamba = gguf.architecture == "mamba"
    absent = [
        key for key in (_REQUIRED_OF_MAMBA if is_mamba else _REQUIRED) if gguf.get(key) is None
    ]
    if absent:
        names = ", ".join(f"{gguf.architecture}.{key}" for key in absent)
        raise ConfigError(
            f"--model {gguf.path}: the GGUF metadata lacks {names}", parameter="model"
        )
    if is_mamba:
        return _mamba_values(gguf)
    architecture, model_type = GGUF_ARCHITECTURES[gguf.architecture]
    heads = gguf.get("attention.head_count")
    hidden = gguf.get("embedding_length")
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": gguf.get("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.get("attention.head_count_kv", heads),
        "num_hidden_layers": gguf.get("block_count"),
        "max_position_embeddings": gguf.get("context_length"),
        "head_dim": gguf.get("attention.key_length") or hidden // heads,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "rms_norm_eps": _norm_eps(gguf),
        "rope_theta": gguf.get("rope.freq_base", 10000.0),
        "rope_parameters": _rope_parameters(gguf),
        **_common_values(gguf),
    }
    if gguf.get("attention.sliding_window"):
        values["sliding_window"] = gguf.get("attention.sliding_window")
    if gguf.architecture in _SCALED_BY_WIDTH:
        values |= _gemma_values(gguf, values)
    return values


def _norm_eps(gguf: GGUFFile) -> float:
    """The file holds a float32: 9.99999974e-06 is 1e-05."""
    return float(f"{gguf.get('attention.layer_norm_rms_epsilon', 1e-6):.6g}")


def _common_values(gguf: GGUFFile) -> dict[str, Any]:
    dtypes = {_F32_FILE: "float32", _F16_FILE: "float16"}
    return {
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0]
        if "token_embd.weight" in gguf.tensors
        else gguf.get("vocab_size"),
        "torch_dtype": dtypes.get(gguf.metadata.get("general.file_type", -1), "bfloat16"),
        **_special_token_ids(gguf),
    }


def _mamba_values(gguf: GGUFFile) -> dict[str, Any]:
    """Mamba, and Falcon-Mamba, whose files say that step, B and C are normed."""
    is_falcon = bool(gguf.get("ssm.dt_b_c_rms"))
    hidden, inner = gguf.get("embedding_length"), gguf.get("ssm.inner_size")
    return {
        "architectures": ["FalconMambaForCausalLM" if is_falcon else "MambaForCausalLM"],
        "model_type": "falcon_mamba" if is_falcon else "mamba",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "expand": inner / hidden if inner % hidden else inner // hidden,
        "num_hidden_layers": gguf.get("block_count"),
        "conv_kernel": gguf.get("ssm.conv_kernel"),
        "state_size": gguf.get("ssm.state_size"),
        "time_step_rank": gguf.get("ssm.time_step_rank"),
        "layer_norm_epsilon": _norm_eps(gguf),
        "mixer_rms_eps": _norm_eps(gguf),
        "use_conv_bias": "blk.0.ssm_conv1d.bias" in gguf.tensors,
        "use_bias": "blk.0.ssm_in.bias" in gguf.tensors,
        **_common_values(gguf),
    }


def _gemma_values(gguf: GGUFFile, values: dict[str, Any]) -> dict[str, Any]:
    """What only Gemma's files say; ``rope_parameters`` are those of full layers."""
    wide = values["num_hidden_layers"] == _SCALED_BY_WIDTH[gguf.architecture]
    own: dict[str, Any] = {
        "query_pre_attn_scalar": values["hidden_size"] // values["num_attention_heads"]
        if wide
        else values["head_dim"],
    }
    for key, name in (
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
        ("rope.freq_base_swa", "rope_local_base_freq"),
    ):
        if gguf.get(key) is not None:
            own[name] = gguf.get(key)
    pattern = gguf.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        own["layer_types"] = [
            "sliding_attention" if sliding else "full_attention" for sliding in pattern
        ]
    elif pattern is not None:
        own["sliding_window_pattern"] = pattern
    return own


def gguf_generation_config(gguf: GGUFFile) -> dict[str, Any]:
    """What ``generation_config.json`` would hold; a chat model's end of turn ends an answer."""
    values = {"_from_model_config": True, **_special_token_ids(gguf)}
    eos, turn = values["eos_token_id"], gguf.metadata.get("tokenizer.ggml.eot_token_id")
    if turn is not None and turn != eos:
        values["eos_token_id"] = [turn] if eos is None else [eos, turn]
    return values


def _special_token_ids(gguf: GGUFFile) -> dict[str, Any]:
    return {
        f"{role}_token_id": gguf.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }


def _rope_parameters(gguf: GGUFFile) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": gguf.get("rope.freq_base", 10000.0)}
    head_dim = gguf.get("attention.key_length") or (
        gguf.get("embedding_length") // gguf.get("attention.head_count")
    )
    rotary_dim = gguf.get("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        rope["partial_rotary_factor"] = rotary_dim / head_dim
    kind = gguf.get("rope.scaling.type", "none")
    if _ROPE_FACTORS in gguf.tensors:
        rope |= {"rope_type": "frequency_factors", "factors": _read_rope_factors(gguf)}
    elif kind == "linear":
        rope |= {"rope_type": "linear", "factor": gguf.get("rope.scaling.factor")}
    elif kind == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": gguf.get("rope.scaling.factor"),
            "original_max_position_embeddings": gguf.get("rope.scaling.original_context_length"),
        }
    elif kind == "none":
        rope["rope_type"] = "default"
    else:
        raise UnsupportedError(
            f"--model {gguf.path}: rope scaling {kind!r} in GGUF is not supported; these are: "
            "none, linear, yarn and frequency factors (Llama 3.1)",
            parameter="model",
        )
    return rope


def _read_rope_factors(gguf: GGUFFile) -> list[float]:
    """Divisors of each rotary frequency: how GGUF writes Llama 3.1's scaling."""
    tensor = gguf.tensors[_ROPE_FACTORS]
    (count,) = tensor.shape
    with gguf.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return list(struct.unpack_from(f"<{count}f", data, tensor.offset))
