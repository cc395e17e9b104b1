"""Random weights, the same for the same seed: for measuring without a checkpoint."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from vllm.config import ModelConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.weights import process_module

__all__ = ["DummyLoader"]

_STD = 0.02  # what the models' own initialisation uses


class DummyLoader(BaseModelLoader):
    """Uniform weights of a standard deviation of 0.02; norms stay at one."""

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        bound = _STD * 3**0.5
        for prefix, module in model.named_modules():
            if isinstance(module, RMSNorm):
                continue
            for name, param in module.named_parameters(recurse=False):
                # Of the name, so that a layer's values do not depend on those before it.
                seed = zlib.crc32(f"{model_config.seed}/{prefix}.{name}".encode())
                generator = torch.Generator(param.device).manual_seed(seed)
                param.data.uniform_(-bound, bound, generator=generator)
            process_module(module)
