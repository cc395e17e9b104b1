"""How a checkpoint's tensor finds its place in a parameter that is fused or sharded.

A parameter carries ``weight_loader(param, tensor, shard_id=None)`` and ``shard_ids``, the shards
that together fill it. Which checkpoint name goes where is the models' business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

__all__ = [
    "ShardId",
    "WeightShapeError",
    "copy_weight",
    "default_weight_loader",
    "load_shard",
    "make_parameter",
    "set_weight_attrs",
    "take_shard",
    "whole_shape",
]

ShardId = str | int | tuple[int, str] | None
"""Which part of a parameter: a name, a number, or (expert, name); None for all of it."""


class WeightShapeError(ValueError):
    """A checkpoint's tensor has another shape than the parameter's part that it goes to.

    ``expected`` is the shape that it would have to have, over all ranks.
    """

    def __init__(self, got: Sequence[int], expected: Sequence[int]) -> None:
        self.expected = tuple(expected)
        super().__init__(f"has shape {list(got)}, expected {list(expected)}")


def make_parameter(
    *shape: int,
    dtype: torch.dtype | None = None,
    weight_loader: Callable[..., None] | None = None,
    shard_ids: tuple[ShardId, ...] = (None,),
) -> nn.Parameter:
    """An uninitialised parameter (untouched memory costs nothing until it is written)."""
    param = nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
    set_weight_attrs(
        param, {"weight_loader": weight_loader or default_weight_loader, "shard_ids": shard_ids}
    )
    return param


def set_weight_attrs(param: torch.Tensor, attrs: dict[str, Any]) -> None:
    for name, value in attrs.items():
        setattr(param, name, value)


def copy_weight(target: torch.Tensor, loaded: torch.Tensor) -> None:
    """Copy with conversion of dtype and device.

    Raises:
        WeightShapeError: the shapes differ.
    """
    if target.shape != loaded.shape:
        raise WeightShapeError(loaded.shape, target.shape)
    target.copy_(loaded)


def default_weight_loader(
    param: torch.Tensor, loaded_weight: torch.Tensor, shard_id: ShardId = None
) -> None:
    """For a parameter that every rank holds whole."""
    assert shard_id is None, "a whole parameter has no shards"
    copy_weight(param.data, loaded_weight)


def whole_shape(param: torch.Tensor, shard_id: ShardId) -> tuple[int, ...]:
    """The shape, over all ranks, of the tensor that fills a shard of ``param``.

    Only its loader knows: it is offered a tensor that fits nowhere, and refuses it by that shape.
    """
    nothing = torch.empty((0,), dtype=param.dtype, device=param.device)
    try:
        _loader_of(param)(param, nothing, shard_id)
    except WeightShapeError as error:
        return error.expected
    raise AssertionError("a weight loader has taken a tensor without elements")


def load_shard(param: torch.Tensor, loaded: torch.Tensor, shard_id: ShardId) -> None:
    """Have ``param``'s loader take this rank's part of a checkpoint's tensor.

    Raises:
        WeightShapeError: the tensor has another shape than ``whole_shape``.
    """
    _loader_of(param)(param, loaded, shard_id)


def _loader_of(param: torch.Tensor) -> Callable[..., None]:
    return getattr(param, "weight_loader", default_weight_loader)


def take_shard(
    loaded: torch.Tensor, dim: int, rank: int, size: int, full: Sequence[int]
) -> torch.Tensor:
    """Rank ``rank``'s ``size`` entries along ``dim`` of a checkpoint's tensor, as a view.

    Args:
        full: the shape that the whole tensor must have.

    Raises:
        WeightShapeError: it has another one.
    """
    if tuple(loaded.shape) != tuple(full):
        raise WeightShapeError(loaded.shape, full)
    return loaded.narrow(dim, rank * size, size)
