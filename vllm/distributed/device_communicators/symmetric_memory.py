"""Sums over the GPUs of one host through memory that all of them see.

The sums of decodes take one kernel that writes into the others' memory (``peer_words``), those of
some hundred rows more one in which every GPU reads the others' parts; NCCL needs several times as
long for them. Large ones are NCCL's business. NVLink multicast is not used.
"""

from __future__ import annotations

import hashlib
import socket

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

import vllm.envs as envs
from vllm.distributed.device_communicators.peer_words import AREA_BYTES, PeerWords
from vllm.logger import init_logger

__all__ = ["SymmetricAllReduce", "make_symmetric_all_reduce"]

logger = init_logger(__name__)

# Above this NCCL, which sends each byte once, is faster.
_MAX_BYTES = 4 << 20
_DTYPES = (torch.bfloat16, torch.float32)
_ALIGN_BYTES = 16


class _PeerReads:
    """In-place sums of up to 4 MiB by torch's operators.

    Two ranks read each other's whole input. More of them sum a share each, so that all see the
    same bits whatever the order of their sums.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._name = group.group_name
        self._reads_all = group.size() == 2
        self._buffer = symmetric_memory.empty(_MAX_BYTES, dtype=torch.uint8, device=device)
        symmetric_memory.rendezvous(self._buffer, group)

    def takes(self, tensor: torch.Tensor) -> bool:
        return (
            tensor.nbytes <= _MAX_BYTES
            and tensor.dtype in _DTYPES
            and tensor.is_contiguous()
            and tensor.nbytes % _ALIGN_BYTES == 0
            and tensor.data_ptr() % _ALIGN_BYTES == 0
            and tensor.numel() > 0
        )

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        place = self._buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        if self._reads_all:
            return torch.ops.symm_mem.one_shot_all_reduce_copy_out(
                place, tensor, "sum", self._name, tensor
            )
        place.copy_(tensor)
        torch.ops.symm_mem.two_shot_all_reduce_(place, "sum", self._name)
        return tensor.copy_(place)


def _make_peer_words(group: dist.ProcessGroup, device: torch.device) -> PeerWords:
    area = symmetric_memory.empty(AREA_BYTES // 4, dtype=torch.int32, device=device)
    PeerWords.clear(area)
    # No rank writes into another's area before that is clear: all meet in the rendezvous.
    torch.cuda.synchronize(device)
    handle = symmetric_memory.rendezvous(area, group)
    areas = [handle.get_buffer(rank, area.shape, area.dtype) for rank in range(group.size())]
    areas[group.rank()] = area
    return PeerWords.of(group.rank(), areas)


class SymmetricAllReduce:
    """In-place sums over the ranks of ``group``, each in the way that is fastest for its size, and
    what else ``peer_words`` does.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._words = _make_peer_words(group, device)
        self._reads = _PeerReads(group, device)

    def ways(self) -> dict[str, PeerWords | _PeerReads]:
        """By name, the fastest for small tensors first; each ``takes`` some and sums them."""
        return {"words": self._words, "reads": self._reads}

    def takes(self, tensor: torch.Tensor) -> bool:
        return self._words.takes(tensor) or self._reads.takes(tensor)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor``, which ``takes`` accepts, in place; it comes back."""
        way = self._words if self._words.takes(tensor) else self._reads
        return way.all_reduce(tensor)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> bool:
        """See ``GroupCoordinator.add_rms_norm``."""
        takes = self._words.takes_norm(x, residual, weight)
        if takes:
            self._words.add_rms_norm(x, residual, weight, eps)
        return takes

    def joins(self, tensor: torch.Tensor, dim: int) -> bool:
        """Whether ``all_gather`` takes ``tensor``."""
        return dim in (-1, 1) and self._words.takes_join(tensor)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's (T, n), side by side in rank order."""
        return self._words.all_gather(tensor)


def make_symmetric_all_reduce(
    group: dist.ProcessGroup, device: torch.device
) -> SymmetricAllReduce | None:
    """For the NCCL group ``group``; None where its GPUs do not see each other's memory, or
    VLLM_ALLREDUCE_USE_SYMM_MEM is 0. All ranks call it, and all get one or none does.
    """
    # Asked of all in any case: NCCL connects the ranks here, before the model runs between sums.
    if not _all_agree(envs.VLLM_ALLREDUCE_USE_SYMM_MEM, group, device):
        return None
    host = int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:7])
    mine = torch.tensor([host, device.index], device=device)
    places = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(places, mine, group=group)
    hosts, indices = torch.stack(places).T.tolist()
    if len(set(hosts)) > 1:
        return None
    others = [index for index in indices if index != device.index]
    able = len(others) == group.size() - 1 and all(
        torch.cuda.can_device_access_peer(device, index) for index in others
    )
    if not _all_agree(able, group, device):
        return None
    made, reason = None, ""
    try:
        made = SymmetricAllReduce(group, device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    if _all_agree(made is not None, group, device):
        return made
    logger.info("Sums of all sizes go through NCCL: no symmetric memory (%s)", reason or "a peer")
    return None


def _all_agree(yes: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    flag = torch.tensor([int(yes)], device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
    return bool(flag.item())
