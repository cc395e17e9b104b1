"""CUDA's way of copying, and the one upload of a step.

Everything runs on the current stream. What the host writes for the device lies in pinned memory,
which a copy that is still under way reads: nothing is written where a copy may not have ended.
On a CPU device, where Triton's interpreter stands in for a GPU in tests, copies are done at once.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm.v1.worker.device import DeviceLayer, HostBuffer

__all__ = ["CUDADeviceLayer", "PackedUpload", "SampleCopies", "SampleCopy"]

# Sections begin at multiples of 16 bytes, which kernels are compiled for.
_ALIGN_WORDS = 4


class _Event:
    """A CUDA event; on a CPU device everything has happened already."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def record(self) -> None:
        if self._event is not None:
            self._event.record()

    def synchronize(self) -> None:
        if self._event is not None:
            self._event.synchronize()


def _pinned(shape: tuple[int, ...] | int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")


class _MirroredBuffer(HostBuffer):
    """Pinned memory with a copy on the device; ``device_view`` brings that up to date."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._hold(_pinned(shape, dtype, device))
        self.mirror = torch.zeros(shape, dtype=dtype, device=device)

    def device_view(self, n: int) -> torch.Tensor:
        return self.mirror[:n].copy_(self.cpu[:n])


class CUDADeviceLayer(DeviceLayer):
    pin_memory = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def make_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> HostBuffer:
        return _MirroredBuffer(shape, dtype, self.device)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def to_host(self, tensor: torch.Tensor) -> np.ndarray:
        return tensor.cpu().numpy()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class SampleCopy:
    """Samples on their way to the host."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._tensor = _pinned(size, torch.int64, device)
        self._done = _Event(device)
        self._count = 0

    def start(self, sampled: torch.Tensor) -> None:
        self._count = sampled.shape[0]
        self._tensor[: self._count].copy_(sampled, non_blocking=True)
        self._done.record()

    def wait(self) -> np.ndarray:
        """int64 ``(n,)``, valid until the next ``start``."""
        self._done.synchronize()
        return self._tensor.numpy()[: self._count]


class SampleCopies:
    """Two copies that take turns, as steps do."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._turns = [SampleCopy(size, device), SampleCopy(size, device)]

    def start(self, sampled: torch.Tensor) -> SampleCopy:
        self._turns.reverse()
        self._turns[0].start(sampled)
        return self._turns[0]


class _Pinned:
    """One half of a ``PackedUpload``."""

    def __init__(self, words: int, device: torch.device) -> None:
        self.tensor = _pinned(words, torch.int32, device)
        self.array = self.tensor.numpy()
        self.copied = _Event(device)


class PackedUpload:
    """Everything a step's host side has to tell the device, in one copy.

    ``begin``, then ``put`` each array, then ``send``; the offsets that ``put`` returns are those
    of the words in ``device_words`` afterwards. Two pinned buffers take turns.
    """

    def __init__(self, words: int, device: torch.device) -> None:
        self._device = device
        self._pinned = [_Pinned(words, device), _Pinned(words, device)]
        self.device_words = torch.zeros(words, dtype=torch.int32, device=device)
        """int32; floats are found in it by ``view(torch.float32)``."""
        self._used = 0

    def begin(self, words: int) -> None:
        """Start an upload of at most ``words`` words, alignment apart."""
        self._pinned.reverse()
        self._pinned[0].copied.synchronize()
        needed = words + 16 * _ALIGN_WORDS
        if needed > self.device_words.shape[0]:
            self.device_words = torch.zeros(2 * needed, dtype=torch.int32, device=self._device)
        if needed > self._pinned[0].array.size:
            self._pinned[0] = _Pinned(2 * needed, self._device)
        self._used = 0

    def put(self, array: np.ndarray) -> int:
        """Add an int32 or float32 array; returns the offset of its first word."""
        offset = self._used
        target = self._pinned[0].array[offset : offset + array.size]
        if array.dtype == np.float32:
            target.view(np.float32)[:] = array
        else:
            target[:] = array
        self._used = -(-(offset + array.size) // _ALIGN_WORDS) * _ALIGN_WORDS
        return offset

    def send(self) -> None:
        pinned = self._pinned[0]
        self.device_words[: self._used].copy_(pinned.tensor[: self._used], non_blocking=True)
        pinned.copied.record()

    def words(self, offset: int, count: int) -> torch.Tensor:
        """int32 ``(count,)`` on the device, valid until the next ``send``."""
        return self.device_words[offset : offset + count]

    def floats(self, offset: int, count: int) -> torch.Tensor:
        """float32 ``(count,)`` on the device, valid until the next ``send``."""
        return self.device_words.view(torch.float32)[offset : offset + count]
