"""Loads checkpoints from disk: safetensors (one file or sharded) and GGUF, memory-mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.config import ModelConfig
from vllm.errors import ConfigError
from vllm.model_executor.model_loader.base_loader import BaseModelLoader, with_progress
from vllm.model_executor.model_loader.gguf_weights import gguf_weight_names, gguf_weights
from vllm.model_executor.model_loader.weight_utils import (
    safetensors_files,
    safetensors_names,
    safetensors_weights_iterator,
)
from vllm.transformers_utils.gguf_file import read_gguf

__all__ = ["GGUFLoader", "SafetensorsLoader"]


class SafetensorsLoader(BaseModelLoader):
    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        folder = Path(model_config.model_path)
        files = safetensors_files(folder)
        total = sum(len(safetensors_names(file)) for file in files)
        try:
            model.load_weights(
                with_progress(safetensors_weights_iterator(files), total, self.load_config)
            )
        except ConfigError as error:
            raise ConfigError(f"--model {folder}: {error}", parameter="model") from None


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
