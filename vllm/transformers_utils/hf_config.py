"""A model's configuration as plain attributes, with what its ``config.json`` may leave out.

Reading it through ``transformers`` would import torch (2 to 7 s), which the API server's process
does without; so the defaults of the model types served here are kept in this file. Both forms of
the rotary settings are brought to one: ``rope_parameters`` as transformers 5 writes it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.errors import ConfigError
from vllm.transformers_utils.config_checks import check_fields, check_kinds
from vllm.transformers_utils.linear_attention_model_types import (
    LINEAR_ATTENTION_DEFAULTS,
    LINEAR_ATTENTION_FINISHERS,
)
from vllm.transformers_utils.model_types import DEFAULTS, FINISHERS

__all__ = ["HFConfig", "derive_max_model_len", "fill_in_config", "uniform_sliding_window"]

_COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "pad_token_id": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
}
_MISTRAL: dict[str, Any] = {
    **_COMMON,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
_LLAMA: dict[str, Any] = {
    **_COMMON,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": None,
    "vocab_size": 32000,
}
_QWEN2: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "layer_types": None,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN3: dict[str, Any] = {**_QWEN2, "attention_bias": False, "head_dim": 128}
MODEL_TYPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    **DEFAULTS,
    **LINEAR_ATTENTION_DEFAULTS,
}
"""Defaults of the transformers configuration class of each model type."""

_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
)
_NEEDS_ORIGINAL_LENGTH = ("llama3", "yarn", "longrope")


class HFConfig:
    """Attributes of a ``config.json``; nested text configurations are ``HFConfig`` too.

    It can be pickled and compared, and has the few methods of ``PretrainedConfig`` that model
    code uses.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name == "text_config" and isinstance(value, Mapping):
                value = HFConfig(value)
            setattr(self, name, value)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def get_text_config(self) -> HFConfig:
        return getattr(self, "text_config", self)

    def to_dict(self) -> dict[str, Any]:
        values = copy.deepcopy(self.__dict__)
        if isinstance(self.__dict__.get("text_config"), HFConfig):
            values["text_config"] = self.text_config.to_dict()
        return values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HFConfig) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"HFConfig({self.__dict__!r})"


def fill_in_config(values: dict[str, Any]) -> HFConfig:
    """The configuration with defaults, window and rotary settings of its model type.

    Args:
        values: a whole ``config.json``; not changed.

    Raises:
        ConfigError: a field has a value that cannot work.
    """
    values = copy.deepcopy(values)
    if isinstance(values.get("text_config"), dict):
        values["text_config"] = _fill_in(values["text_config"])
        return HFConfig(values)
    return HFConfig(_fill_in(values))


def _fill_in(values: dict[str, Any]) -> dict[str, Any]:
    model_type = values.get("model_type")
    defaults = MODEL_TYPE_DEFAULTS.get(model_type or "", {})
    values = {**defaults, **values}
    if values.get("num_key_value_heads") is None and "num_attention_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    _check_shape(values)
    check_fields(values, defaults)
    if values.get("head_dim") is None and values.get("num_attention_heads"):
        values["head_dim"] = _derive_head_dim(values)
    if model_type in ("qwen2", "qwen3"):
        _set_qwen_windows(values)
    finish = FINISHERS.get(model_type or "") or LINEAR_ATTENTION_FINISHERS.get(model_type or "")
    if finish is not None:
        finish(values)
    check_kinds(values)
    if "rope_theta" in values or values.get("rope_parameters"):
        _set_rope_parameters(values)
    dtype = values.get("dtype") or values.get("torch_dtype")
    values["dtype"] = values["torch_dtype"] = dtype
    return values


def _check_shape(values: dict[str, Any]) -> None:
    for name in (
        "hidden_size",
        "head_dim",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    ):
        value = values.get(name)
        if value is not None and (not _is_number(value, int) or value < 1):
            raise ConfigError(
                f"config.json: {name} must be a positive whole number, not {value!r}",
                parameter="model",
            )
    for name in ("rms_norm_eps", "rope_theta", "partial_rotary_factor"):
        if values.get(name) is not None or (name in values and name == "rms_norm_eps"):
            _check_positive(name, values[name])
    heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}",
            parameter="model",
        )


def _is_number(value: object, kind: type = float) -> bool:
    return isinstance(value, (int, kind)) and not isinstance(value, bool)


def _check_positive(name: str, value: Any) -> None:
    if not _is_number(value) or not value > 0:
        raise ConfigError(
            f"config.json: {name} must be a number above 0, not {value!r}", parameter="model"
        )


def _derive_head_dim(values: dict[str, Any]) -> int:
    hidden_size, num_heads = values.get("hidden_size"), values["num_attention_heads"]
    if hidden_size is None or hidden_size < num_heads:
        raise ConfigError(
            f"config.json: hidden_size must be at least num_attention_heads={num_heads}, not "
            f"{hidden_size!r}",
            parameter="model",
        )
    return hidden_size // num_heads


def _set_qwen_windows(values: dict[str, Any]) -> None:
    """Qwen's window holds only from layer ``max_window_layers`` on, and only if switched on."""
    if not values["use_sliding_window"]:
        values["sliding_window"] = None
    if values["layer_types"] is None:
        values["layer_types"] = [
            "sliding_attention"
            if values["sliding_window"] is not None and layer >= values["max_window_layers"]
            else "full_attention"
            for layer in range(values["num_hidden_layers"])
        ]


def _set_rope_parameters(values: dict[str, Any]) -> None:
    """Bring ``rope_theta`` + ``rope_scaling`` (4.x) and ``rope_parameters`` (5.x) to the latter.

    A model whose kinds of layers have a RoPE each has them by kind in ``rope_parameters``.
    """
    by_kind = values.get("rope_parameters") or {}
    if isinstance(by_kind.get("full_attention") or by_kind.get("main"), dict):
        values["rope_scaling"] = None
        return
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ConfigError(
            f"config.json: rope_scaling must be an object, not {given!r}", parameter="model"
        )
    rope = dict(given)
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = values.get("rope_theta") or 10000.0
    if values.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", values["partial_rotary_factor"])
    if rope["rope_type"] in _NEEDS_ORIGINAL_LENGTH:
        original = values.get("original_max_position_embeddings")
        if original is not None:
            rope["original_max_position_embeddings"] = original
        else:
            rope.setdefault(
                "original_max_position_embeddings", values.get("max_position_embeddings")
            )
    for name in ("rope_theta", "factor", "original_max_position_embeddings"):
        if rope.get(name) is not None:
            _check_positive(f"{name} of the rotary embedding", rope[name])
    values["rope_parameters"] = rope
    values["rope_theta"] = rope["rope_theta"]
    values["rope_scaling"] = None if rope["rope_type"] == "default" else rope


def derive_max_model_len(hf_text_config: Any) -> int | None:
    """Tokens that the model was made for, rotary scaling included; None if it doesn't say.

    ``max_position_embeddings`` already counts the scaling of llama3 and longrope; linear and
    dynamic multiply it, yarn multiplies its own original length.
    """
    lengths = [getattr(hf_text_config, key, None) for key in _LENGTH_KEYS]
    known = [length for length in lengths if length]
    if not known:
        return None
    length = min(known)
    rope = getattr(hf_text_config, "rope_parameters", None) or {}
    factor = rope.get("factor") or 1.0
    if rope.get("rope_type") in ("linear", "dynamic"):
        return int(length * factor)
    if rope.get("rope_type") == "yarn":
        return int((rope.get("original_max_position_embeddings") or length) * factor)
    return length


def uniform_sliding_window(hf_text_config: Any) -> int | None:
    """The window of every layer in tokens; None where layers differ or have none.

    It is what a layer gets that names no window of its own, so it must not be that of some.
    """
    kinds = set(getattr(hf_text_config, "layer_types", None) or ())
    if kinds - {"sliding_attention"}:
        return None
    return getattr(hf_text_config, "sliding_window", None)
