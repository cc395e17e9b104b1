"""Scales of quantised caches, found from the keys and values of one run of the model.

A layer is told its scales before it stores anything, so the layers after it compute on what this
one will store when requests come. Owns the formula; must not know who runs the model, or on what.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from vllm.distributed.parallel_state import get_tp_group
from vllm.errors import ConfigError
from vllm.v1.attention.ops.kv_formats import kv_format

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.v1.attention.ops.kv_formats import KVFormat

__all__ = ["KVScaleCalibration", "scale_for"]

_HEADROOM = 2.0


def scale_for(fmt: KVFormat, magnitude: float) -> float:
    """The scale of a side whose largest magnitude in a run was ``magnitude``.

    It puts that magnitude at a half to a quarter of the largest number of the format: requests
    may bring larger ones, and floating point loses nothing by the room. A power of two changes no
    bit of a number, and ranks or devices that round a magnitude differently mostly agree on it.
    """
    if magnitude == 0:
        return 1.0
    return float(2.0 ** math.ceil(math.log2(magnitude * _HEADROOM / fmt.largest_value)))


class KVScaleCalibration:
    """The ``KVScaleFinder`` of one run.

    Attributes:
        scales: what was found, (K, V) by layer; of a side with a checkpoint's scale, that.
    """

    def __init__(self) -> None:
        self.scales: dict[str, tuple[float, float]] = {}

    def observe(self, layer: Attention, key: torch.Tensor, value: torch.Tensor) -> None:
        """Give ``layer`` the scales of keys ``(T, K, D)`` and values ``(T, K, Dv)``.

        All ranks of a model take the largest magnitude of any of them.

        Raises:
            ConfigError: there is a number that is not finite.
        """
        fmt = kv_format(layer.kv_cache_dtype)
        if fmt is None or not fmt.has_layer_scales:
            return
        magnitudes = torch.stack((key.abs().amax(), value.abs().amax())).float()
        group = get_tp_group()
        if group.world_size > 1:
            magnitudes = group.all_gather(magnitudes[None], dim=0).amax(dim=0)
        for side, magnitude in zip("kv", magnitudes.tolist(), strict=True):
            if side in layer.checkpoint_scales:
                continue
            if not magnitude < float("inf"):
                raise ConfigError(
                    f"--calculate-kv-scales: keys or values of {layer.layer_name} are not finite "
                    "numbers in a run over arbitrary tokens; use --dtype float32 or bfloat16, or "
                    "put k_scale and v_scale in the checkpoint",
                    parameter="calculate_kv_scales",
                    value=True,
                )
            layer.set_kv_scale(side, scale_for(fmt, magnitude))
        self.scales[layer.layer_name] = (layer._k_scale_float, layer._v_scale_float)
