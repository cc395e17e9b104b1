"""Loads checkpoints from disk: safetensors (one file or sharded) and GGUF, memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm.config import ModelConfig
from vllm.errors import ConfigError
from vllm.model_executor.model_loader.base_loader import BaseModelLoader, with_progress
from vllm.model_executor.model_loader.gguf_weights import gguf_weight_names, gguf_weights
from vllm.transformers_utils.gguf_file import read_gguf

__all__ = ["GGUFLoader", "SafetensorsLoader", "safetensors_files"]

_INDEX = "model.safetensors.index.json"
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")


def safetensors_files(folder: Path) -> list[Path]:
    """The files of one checkpoint: those of the index, or every ``.safetensors``.

    Raises:
        ConfigError: there are none, or the index names one that isn't there.
    """
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"--model {folder}: {_INDEX} is damaged ({error})", parameter="model"
            ) from None
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ConfigError(
                f"--model {folder}: {_INDEX} names files that are not there: {', '.join(absent)}",
                parameter="model",
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    single = folder / "model.safetensors"
    if single in files:
        # A directory may hold other tensors too (adapters, an original's consolidated.*).
        return [single]
    if not files:
        others = sorted({p.suffix for pattern in _OTHER_FORMATS for p in folder.glob(pattern)})
        found = f" (there are {', '.join(others)} files, which --model cannot load)"
        raise ConfigError(
            f"--model {folder} holds no .safetensors weights{found if others else ''}; "
            "use --load-format dummy for random ones",
            parameter="model",
            value=str(folder),
        )
    return files


class SafetensorsLoader(BaseModelLoader):
    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        folder = Path(model_config.model_path)
        files = safetensors_files(folder)
        total = sum(len(_names(file)) for file in files)
        try:
            model.load_weights(with_progress(_tensors(files), total, self.load_config))
        except ConfigError as error:
            raise ConfigError(f"--model {folder}: {error}", parameter="model") from None


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"--model: {file} is damaged or incomplete ({error}); download it again",
            parameter="model",
        ) from None


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of the mapped files; a page is read when a tensor is copied."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                yield name, tensors.get_tensor(name)


class GGUFLoader(BaseModelLoader):
    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        gguf = read_gguf(model_config.model_path)
        weights = gguf_weights(gguf, model_config.dtype)
        try:
            model.load_weights(
                with_progress(weights, len(gguf_weight_names(gguf)), self.load_config)
            )
        except ConfigError as error:
            if str(gguf.path) in str(error):
                raise
            raise ConfigError(f"--model {gguf.path}: {error}", parameter="model") from None
