"""Collectives of the tensor-parallel group, by the names that layers call."""

import torch

from vllm.distributed.parallel_state import get_tp_group

__all__ = [
    "tensor_model_parallel_all_gather",
    "tensor_model_parallel_all_reduce",
    "tensor_model_parallel_gather",
]


def tensor_model_parallel_all_reduce(input_: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks, in place."""
    return get_tp_group().all_reduce(input_)


def tensor_model_parallel_all_gather(input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Concatenation over the ranks along ``dim``."""
    return get_tp_group().all_gather(input_, dim)


def tensor_model_parallel_gather(
    input_: torch.Tensor, dst: int = 0, dim: int = -1
) -> torch.Tensor | None:
    """Concatenation along ``dim`` on rank ``dst``; None elsewhere."""
    return get_tp_group().gather(input_, dst, dim)
