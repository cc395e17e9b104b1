"""From ``--model`` to everything that is known about it without reading a weight.

``resolve_model`` finds the files, reads the configuration (of a Hugging Face directory, or out of
GGUF metadata), applies ``--hf-overrides`` and picks the architecture. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.errors import ConfigError
from vllm.model_executor.models.registry import ModelRegistry
from vllm.transformers_utils.gguf_config import gguf_config_values, gguf_generation_config
from vllm.transformers_utils.gguf_file import read_gguf
from vllm.transformers_utils.hf_config import HFConfig, derive_max_model_len, fill_in_config
from vllm.transformers_utils.model_path import resolve_model_path

__all__ = [
    "HFConfig",
    "ResolvedModel",
    "derive_max_model_len",
    "load_generation_config",
    "load_hf_config",
    "resolve_model",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    model_path: str
    """An existing directory or ``.gguf`` file."""
    hf_config: Any
    """``HFConfig``, or a ``PretrainedConfig`` of remote code."""
    architecture: str
    """Known to ``ModelRegistry``."""
    generation_config: dict[str, Any] = field(default_factory=dict)
    """The model's own generation_config.json; empty if it has none."""
    is_gguf: bool
    tokenizer: str
    """What ``get_tokenizer`` reads: the model's own path."""

    @property
    def hf_text_config(self) -> Any:
        return self.hf_config.get_text_config()


def resolve_model(
    model: str,
    revision: str | None = None,
    download_dir: str | None = None,
    trust_remote_code: bool = False,
    hf_overrides: Mapping[str, Any] | None = None,
    weights: bool = True,
) -> ResolvedModel:
    """Find ``model`` and read its configuration.

    Args:
        model: a directory, a ``.gguf`` file, a short name, or a hub id.
        hf_overrides: replaces fields of config.json; nested objects are merged.
        weights: False leaves a hub model's weights where they are (``--load-format dummy``).

    Raises:
        ConfigError: naming --model (or --hf-overrides) and what would work.
    """
    path = resolve_model_path(model, revision=revision, download_dir=download_dir, weights=weights)
    hf_config = load_hf_config(path, trust_remote_code, hf_overrides)
    try:
        architecture = ModelRegistry.choose_arch(getattr(hf_config, "architectures", None))
    except ConfigError as error:
        raise ConfigError(f"--model {model}: {error}", parameter="model", value=model) from None
    return ResolvedModel(
        model_path=str(path),
        hf_config=hf_config,
        architecture=architecture,
        generation_config=load_generation_config(path),
        is_gguf=path.suffix == ".gguf",
        tokenizer=str(path),
    )


def load_hf_config(
    path: str | Path,
    trust_remote_code: bool = False,
    hf_overrides: Mapping[str, Any] | None = None,
) -> Any:
    """The configuration of a model directory or ``.gguf`` file."""
    path = Path(path)
    if path.suffix == ".gguf":
        values = gguf_config_values(read_gguf(path))
    else:
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"--model {path} holds no config.json and no .gguf file; name a Hugging Face "
                "model directory or a .gguf file",
                parameter="model",
                value=str(path),
            )
        values = _read_json(path / "config.json")
    values = _merge(values, hf_overrides or {})
    if "auto_map" in values and trust_remote_code:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(path, trust_remote_code=True, **dict(hf_overrides or {}))
    try:
        return fill_in_config(values)
    except ConfigError as error:
        raise ConfigError(f"--model {path}: {error}", parameter="model") from None


def load_generation_config(path: str | Path) -> dict[str, Any]:
    """``generation_config.json`` of a directory, or what GGUF metadata says; may be empty."""
    path = Path(path)
    if path.suffix == ".gguf":
        return gguf_generation_config(read_gguf(path))
    file = path / "generation_config.json"
    return _read_json(file) if file.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}", parameter="model") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object", parameter="model")
    return value


def _merge(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), dict):
            value = _merge(merged[key], value)
        merged[key] = value
    return merged
