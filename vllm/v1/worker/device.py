"""The few places where a device's own way of copying shows: buffers and transfers.

The runner and the batch write numpy arrays and ask this layer for the tensor that the device
reads. On the CPU both are the same memory. Knows nothing of models, requests or caches.
"""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["CPUDeviceLayer", "DeviceLayer", "HostBuffer"]


class HostBuffer:
    """A host array with the tensor that shows it to the device.

    ``np`` is what the host writes. ``device_view(n)`` makes the first ``n`` entries of dim 0
    visible on the device and returns them.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._hold(torch.zeros(shape, dtype=dtype))

    def _hold(self, memory: torch.Tensor) -> None:
        self.cpu = self._view = memory
        self._shown = memory.shape[0]
        self.np: np.ndarray = memory.numpy()

    def device_view(self, n: int) -> torch.Tensor:
        return self.host_view(n)

    def host_view(self, n: int) -> torch.Tensor:
        """The first ``n`` entries as the host sees them."""
        if self._shown != n:
            self._shown, self._view = n, self.cpu[:n]
        return self._view


class DeviceLayer:
    """What the runner asks of a device. ``device`` is where the model and the caches live."""

    device: torch.device
    pin_memory: bool = False

    def make_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> HostBuffer:
        raise NotImplementedError

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """The values of ``array`` as a tensor on the device."""
        raise NotImplementedError

    def to_host(self, tensor: torch.Tensor) -> np.ndarray:
        """The values of ``tensor``, once the device has computed them."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""


class CPUDeviceLayer(DeviceLayer):
    """The CPU: every transfer is a view of the same memory."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def make_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> HostBuffer:
        return HostBuffer(shape, dtype)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array)

    def to_host(self, tensor: torch.Tensor) -> np.ndarray:
        return tensor.numpy()
