"""Scales of an fp8 or nvfp4 cache that a checkpoint brings, one for a layer's keys, one for values.

Checkpoints call them ``<attention>.k_scale`` and ``.v_scale``, or put them beside the projections
(``<attention>.k_proj.k_scale``), or give both at once (``.kv_scale``). They matter only where the
cache has one scale per layer and side; a plain cache, or one with scales of its own, does without.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from vllm.errors import ConfigError
from vllm.model_executor.layers.attention import Attention

__all__ = ["CacheScales"]

_SIDES = {"k_scale": "k", "v_scale": "v", "kv_scale": "kv"}
# Of queries and of weights after the softmax: for products in fp8, which are not computed here.
_WITHOUT_USE = ("q_scale", "prob_scale")
_HOLDERS = ("k_proj", "v_proj", "q_proj", "qkv_proj", "attn")


class CacheScales:
    """The attention layers of a model, to be told their scales."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = {
            name.removesuffix(".attn"): module
            for name, module in model.named_modules()
            if isinstance(module, Attention)
        }

    def take(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether ``name`` is such a scale; the layer has it then.

        Raises:
            ConfigError: it is not one positive number.
        """
        prefix, _, kind = name.rpartition(".")
        owner, _, holder = prefix.rpartition(".")
        layer = self._layers.get(owner if holder in _HOLDERS else prefix)
        if layer is None or kind not in (*_SIDES, *_WITHOUT_USE):
            return False
        if kind in _WITHOUT_USE:
            return True
        value = float(tensor.float().reshape(-1)[0]) if tensor.numel() == 1 else math.nan
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(
                f"{name} must be one positive number, not {tensor.flatten()[:4].tolist()} of shape "
                f"{tuple(tensor.shape)}: quantise the checkpoint with one scale per layer, or use "
                "--kv-cache-dtype fp8_per_token_head, which needs none",
                parameter="kv_cache_dtype",
            )
        for side in _SIDES[kind]:
            layer.set_kv_scale(side, value)
            layer.checkpoint_scales.add(side)
        return True
