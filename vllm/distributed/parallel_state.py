"""Process groups: who computes which part of the model, and the collectives between them.

At world size 1 nothing is initialised and every collective returns its input. It must not know
models, layers or schedulers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from vllm.distributed.device_communicators.symmetric_memory import SymmetricAllReduce

__all__ = [
    "GroupCoordinator",
    "destroy_distributed_environment",
    "destroy_model_parallel",
    "get_pp_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "get_tp_group",
    "get_world_group",
    "init_distributed_environment",
    "initialize_model_parallel",
    "model_parallel_is_initialized",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCoordinator:
    """The ranks that act together, seen from one of them.

    ``group`` is None for a group of one, whose collectives do nothing. ``symmetric`` does those
    sums that it takes.
    """

    ranks: tuple[int, ...] = (0,)
    """Global ranks, in the order of the group."""
    rank_in_group: int = 0
    group: dist.ProcessGroup | None = None
    symmetric: SymmetricAllReduce | None = None

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return self.ranks[self.rank_in_group]

    @property
    def is_first_rank(self) -> bool:
        return self.rank_in_group == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank_in_group == self.world_size - 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the group, in place; the tensor itself comes back."""
        if self.symmetric is not None and self.symmetric.takes(tensor):
            return self.symmetric.all_reduce(tensor)
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> bool:
        """In place and in one kernel: ``residual += sum of x``, then ``x = rms_norm(residual)``.

        False, with nothing done, where there is no such kernel for these tensors.
        """
        return self.symmetric is not None and self.symmetric.add_rms_norm(x, residual, weight, eps)

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Every rank's tensor, concatenated along ``dim`` in rank order; equal shapes."""
        if self.group is None:
            return tensor
        if self.symmetric is not None and self.symmetric.joins(tensor, dim):
            return self.symmetric.all_gather(tensor)
        parts = [torch.empty_like(tensor) for _ in self.ranks]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return torch.cat(parts, dim=dim)

    def gather(self, tensor: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        """As ``all_gather``, on rank ``dst`` of the group only; None elsewhere."""
        if self.group is None:
            return tensor
        here = self.rank_in_group == dst
        parts = [torch.empty_like(tensor) for _ in self.ranks] if here else None
        dist.gather(tensor.contiguous(), parts, dst=self.ranks[dst], group=self.group)
        return torch.cat(parts, dim=dim) if parts is not None else None

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank ``src``'s values into every rank's tensor, in place."""
        if self.group is not None:
            dist.broadcast(tensor, src=self.ranks[src], group=self.group)
        return tensor

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)


_ALONE = GroupCoordinator()
_world: GroupCoordinator = _ALONE
_tp: GroupCoordinator | None = None
_pp: GroupCoordinator | None = None


def init_distributed_environment(
    world_size: int = 1,
    rank: int = 0,
    distributed_init_method: str = "env://",
    local_rank: int = 0,
    backend: str = "gloo",
) -> None:
    """Join the world of ``world_size`` processes; nothing is opened for a world of one.

    Args:
        local_rank: the device of this process; only NCCL needs it.
        backend: "gloo" for CPUs, "nccl" for CUDA.
    """
    global _world
    if world_size == 1 or dist.is_initialized():
        return
    if backend == "nccl":
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        backend, init_method=distributed_init_method, world_size=world_size, rank=rank
    )
    ranks = tuple(range(world_size))
    _world = GroupCoordinator(ranks=ranks, rank_in_group=rank, group=dist.group.WORLD)


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1, pipeline_model_parallel_size: int = 1
) -> None:
    """Cut the world into tensor-parallel groups of neighbours and pipeline groups across them.

    With 4 ranks, TP 2 and PP 2: TP groups (0, 1) and (2, 3), pipeline groups (0, 2) and (1, 3).

    Raises:
        ValueError: the sizes don't multiply to the world's size.
    """
    global _tp, _pp
    tp, pp = tensor_model_parallel_size, pipeline_model_parallel_size
    if tp * pp != _world.world_size:
        raise ValueError(
            f"tensor parallel size {tp} times pipeline parallel size {pp} is not the number of "
            f"processes, {_world.world_size}"
        )
    ranks = range(_world.world_size)
    _tp = _join([tuple(ranks[start : start + tp]) for start in range(0, len(ranks), tp)])
    _pp = _join([tuple(ranks[start::tp]) for start in range(tp)])


def _join(groups: list[tuple[int, ...]]) -> GroupCoordinator:
    """Make every group (all processes must take part) and return the one of this process."""
    mine = _ALONE
    for ranks in groups:
        if len(ranks) == _world.world_size:
            group = _world.group
        else:
            group = dist.new_group(list(ranks)) if len(ranks) > 1 else None
        if _world.rank in ranks:
            mine = GroupCoordinator(
                ranks=ranks,
                rank_in_group=ranks.index(_world.rank),
                group=group,
                symmetric=_symmetric_all_reduce(group),
            )
    return mine


def _symmetric_all_reduce(group: dist.ProcessGroup | None) -> SymmetricAllReduce | None:
    if group is None or dist.get_backend(group) != "nccl":
        return None
    # It imports compilers of torch, which only several GPUs need.
    from vllm.distributed.device_communicators.symmetric_memory import make_symmetric_all_reduce

    return make_symmetric_all_reduce(group, torch.device("cuda", torch.cuda.current_device()))


def model_parallel_is_initialized() -> bool:
    return _tp is not None


def get_world_group() -> GroupCoordinator:
    return _world


def get_tp_group() -> GroupCoordinator:
    """The tensor-parallel group of this process; one of size 1 before initialisation."""
    return _tp or _ALONE


def get_pp_group() -> GroupCoordinator:
    return _pp or _ALONE


def get_tensor_model_parallel_world_size() -> int:
    return get_tp_group().world_size


def get_tensor_model_parallel_rank() -> int:
    return get_tp_group().rank_in_group


def destroy_model_parallel() -> None:
    global _tp, _pp
    _tp = _pp = None


def destroy_distributed_environment() -> None:
    global _world
    if dist.is_initialized():
        dist.destroy_process_group()
    _world = _ALONE
