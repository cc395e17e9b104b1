"""What a GPU's worker gives back to sleep and has again to wake: the pool, and the weights.

Owns where both lie. Weights are moved into one region whose addresses stay, so that views and
captured graphs remain right when they come back from the host.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from vllm.utils.cuda_memory import HostCopy, RemappableMemory

__all__ = ["SleepMemory", "move_weights", "weights_size"]

# What kernels and the tensor-copy engine may expect of an address.
_ALIGN_BYTES = 512


def _tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor that is held by the model or by what it holds, in modules or elsewhere."""
    seen = {id(model)}
    todo: list[Any] = [model]
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            yield item
        # A function's globals are not the model's.
        function = isinstance(item, FunctionType)
        for other in item.__closure__ or () if function else gc.get_referents(item):
            if id(other) not in seen and not isinstance(other, type | ModuleType):
                seen.add(id(other))
                todo.append(other)


@dataclass(slots=True)
class _Storage:
    """Bytes that one or more tensors show; ``offset`` is their place in the region."""

    bytes: torch.UntypedStorage
    offset: int
    tensors: list[torch.Tensor] = field(default_factory=list)


def _storages(model: nn.Module, device_type: str) -> list[_Storage]:
    found: dict[int, _Storage] = {}
    end = 0
    for tensor in _tensors_of(model):
        storage = tensor.untyped_storage()
        if tensor.device.type != device_type or not storage.nbytes():
            continue
        known = found.get(storage.data_ptr())
        if known is None:
            known = found[storage.data_ptr()] = _Storage(storage, end)
            end = -(-(end + storage.nbytes()) // _ALIGN_BYTES) * _ALIGN_BYTES
        if all(tensor is not other for other in known.tensors):
            known.tensors.append(tensor)
    return list(found.values())


def weights_size(model: nn.Module, device_type: str) -> int:
    """Bytes that ``move_weights`` needs."""
    storages = _storages(model, device_type)
    return storages[-1].offset + storages[-1].bytes.nbytes() if storages else 0


def move_weights(
    model: nn.Module, region: torch.Tensor, use: Callable[[int], None] | None = None
) -> None:
    """Let all tensors of ``model`` on the region's device show ``region``, with their values.

    Tensors that share memory do so afterwards.

    Args:
        region: 1-D int8, ``weights_size`` bytes at least.
        use: called with the end of what is written next, before it is.
    """
    storages = _storages(model, region.device.type)
    storages.reverse()
    while storages:
        storage = storages.pop()
        size = storage.bytes.nbytes()
        if use is not None:
            use(storage.offset + size)
        place = region[storage.offset : storage.offset + size]
        whole = torch.empty(0, dtype=torch.int8, device=region.device)
        place.copy_(whole.set_(storage.bytes))
        for tensor in storage.tensors:
            first = tensor.storage_offset() * tensor.element_size()
            rest = place[first : size - (size - first) % tensor.element_size()]
            tensor.data = rest.view(tensor.dtype).as_strided(tensor.size(), tensor.stride())


class SleepMemory:
    """The memory of one worker that sleeps."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: RemappableMemory | None = None
        self._weights: RemappableMemory | None = None
        self._host: HostCopy | None = None
        self._has_pool = True

    def allocate_pool(self, size: int) -> torch.Tensor:
        """1-D int8, cleared.

        Raises:
            CapacityError: the device has not so much memory.
        """
        self._pool = RemappableMemory(size, self._device)
        self._pool.map()
        return self._pool.tensor.zero_()

    def take_weights(self, model: nn.Module) -> None:
        """Move the weights of ``model`` to where they can be given back."""
        memory = RemappableMemory(weights_size(model, self._device.type), self._device)
        # Piece by piece: what has been moved is freed before more is needed.
        move_weights(model, memory.tensor, memory.map)
        self._weights = memory
        torch.cuda.empty_cache()

    def release_pool(self) -> None:
        assert self._pool is not None
        self._pool.unmap()
        self._has_pool = False

    def restore_pool(self) -> bool:
        """Have the pool's memory again, cleared; False where it was there."""
        assert self._pool is not None
        if self._has_pool:
            return False
        self._pool.map()
        self._pool.tensor.zero_()
        self._has_pool = True
        return True

    def offload_weights(self) -> None:
        """Keep the weights on the host and give their memory on the device back.

        Raises:
            CapacityError: the host cannot pin so much; the weights are where they were.
        """
        assert self._weights is not None
        self._host = HostCopy(self._weights.tensor)
        self._weights.unmap()

    def restore_weights(self) -> None:
        """Copy the weights back from the host, if that is where they are."""
        if self._host is None:
            return
        assert self._weights is not None
        self._weights.map()
        self._host.copy_to(self._weights.tensor)
        self._host.free()
        self._host = None

    @property
    def is_awake(self) -> bool:
        """Pool and weights, if there are any, are where they belong."""
        return self._has_pool and self._host is None

    def drop_weights(self) -> None:
        """Forget the weights; their memory is freed with the model that shows it."""
        self._weights = None
