"""Random weights, the same for the same seed: for measuring without a checkpoint."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from vllm.config import ModelConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.weight_loading import load_shard, whole_shape
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.weights import process_module

__all__ = ["DummyLoader"]

_STD = 0.02  # what the models' own initialisation uses


class DummyLoader(BaseModelLoader):
    """Uniform weights of a standard deviation of 0.02; norms stay at one.

    Each tensor that a checkpoint would have is drawn whole, and a rank keeps its part of it: the
    model is the same on any number of ranks. Whole numbers, of which a parameter says by
    ``num_values`` how many there are, are drawn from these.
    """

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        for prefix, module in model.named_modules():
            if isinstance(module, RMSNorm):
                continue
            for name, param in module.named_parameters(recurse=False):
                for shard_id in getattr(param, "shard_ids", (None,)):
                    # Of the name, so that a layer's values do not depend on those before it.
                    key = f"{model_config.seed}/{prefix}.{name}/{shard_id}"
                    load_shard(param, _draw(param, shard_id, zlib.crc32(key.encode())), shard_id)
            process_module(module)


def _draw(param: torch.Tensor, shard_id: Any, seed: int) -> torch.Tensor:
    """A random tensor that fills a shard of ``param``, of all ranks."""
    generator = torch.Generator(param.device).manual_seed(seed)
    whole = torch.empty(whole_shape(param, shard_id), dtype=param.dtype, device=param.device)
    if not param.dtype.is_floating_point:
        return whole.random_(0, param.num_values, generator=generator)  # type: ignore[attr-defined]
    bound = _STD * 3**0.5
    return whole.uniform_(-bound, bound, generator=generator)
