"""Device memory that can be given back and had again at the same addresses (CUDA on Linux).

Addresses are reserved once; physical memory is mapped below them and unmapped. Captured graphs,
views and kernels that were told an address stay right. Talks to the driver, and knows nothing of
what the bytes are.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache
from typing import Any

import torch

from vllm.errors import CapacityError, VLLMError
from vllm.utils.system import format_bytes

__all__ = ["HostCopy", "RemappableMemory"]

# Physical memory comes in pieces of this size, so that what is mapped can follow what is used.
_PIECE_BYTES = 256 << 20
_OUT_OF_MEMORY = 2
_PINNED, _ON_DEVICE, _READ_AND_WRITE = 1, 1, 3


class _Location(ctypes.Structure):
    """``CUmemLocation`` of the driver's API; so are the names below."""

    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Flags(ctypes.Structure):
    _fields_ = [
        ("compression_type", ctypes.c_ubyte),
        ("gpu_direct_rdma_capable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _Properties(ctypes.Structure):
    """``CUmemAllocationProp``."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_meta_data", ctypes.c_void_p),
        ("flags", _Flags),
    ]


class _Access(ctypes.Structure):
    """``CUmemAccessDesc``."""

    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


_SIGNATURES: dict[str, list[Any]] = {
    "cuMemGetAllocationGranularity": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int],
    "cuMemAddressReserve": [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint64
    ],
    "cuMemAddressFree": [ctypes.c_uint64, ctypes.c_size_t],
    "cuMemCreate": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint64],
    "cuMemRelease": [ctypes.c_uint64],
    "cuMemMap": [
        ctypes.c_uint64, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint64
    ],
    "cuMemSetAccess": [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t],
    "cuMemUnmap": [ctypes.c_uint64, ctypes.c_size_t],
    "cuMemHostRegister_v2": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint],
    "cuMemHostUnregister": [ctypes.c_void_p],
}  # fmt: skip


class _DriverError(VLLMError):
    def __init__(self, name: str, status: int, text: str) -> None:
        super().__init__(f"{name} of the CUDA driver failed: {text}")
        self.status = status


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    for name, types in _SIGNATURES.items():
        getattr(driver, name).argtypes = types
    return driver


def _call(name: str, *arguments: Any) -> None:
    driver = _driver()
    status = getattr(driver, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(status, ctypes.byref(text))
        words = text.value.decode() if text.value else f"status {status}"
        raise _DriverError(name, status, words)


class _Reservation:
    """Addresses, and which of them have memory; both end with the last tensor that shows them."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._location = _Location(_ON_DEVICE, device.index)
        self._properties = _Properties(type=_PINNED, location=self._location)
        step = ctypes.c_size_t()
        _call(
            "cuMemGetAllocationGranularity", ctypes.byref(step), ctypes.byref(self._properties), 0
        )
        self.granularity = step.value
        self.size = -(-size // step.value) * step.value
        start = ctypes.c_uint64()
        _call("cuMemAddressReserve", ctypes.byref(start), self.size, 0, 0, 0)
        self.start = start.value
        self.pieces: list[tuple[int, int]] = []
        """Address and size of what is mapped, ascending."""
        self._end = weakref.finalize(self, _free, self.start, self.size, self.pieces)
        # At the end of a process the driver does it, and may be gone already.
        self._end.atexit = False
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|i1",
            "data": (self.start, False),
            "version": 3,
        }

    @property
    def mapped(self) -> int:
        """Bytes from the start that have memory."""
        return sum(size for _, size in self.pieces)

    def map(self, end: int) -> None:
        """Have memory for the first ``end`` bytes, or as much as before if there is too little."""
        before = len(self.pieces)
        try:
            while (at := self.mapped) < end:
                size = min(_PIECE_BYTES, self.size - at)
                handle = ctypes.c_uint64()
                _call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(self._properties), 0)
                try:
                    _call("cuMemMap", self.start + at, size, 0, handle, 0)
                finally:
                    # What is mapped stays until it is unmapped.
                    _call("cuMemRelease", handle)
                self.pieces.append((self.start + at, size))
                access = _Access(self._location, _READ_AND_WRITE)
                _call("cuMemSetAccess", self.start + at, size, ctypes.byref(access), 1)
        except _DriverError:
            _unmap(self.pieces, before)
            raise


def _unmap(pieces: list[tuple[int, int]], keep: int = 0) -> None:
    while len(pieces) > keep:
        _call("cuMemUnmap", *pieces.pop())


def _free(start: int, size: int, pieces: list[tuple[int, int]]) -> None:
    torch.cuda.synchronize()
    _unmap(pieces)
    _call("cuMemAddressFree", start, size)


class RemappableMemory:
    """``tensor``, 1-D int8 of ``size`` bytes, whose memory comes and goes while addresses stay.

    Nothing may read or write where no memory is. Addresses and memory end once neither this
    object nor any view of the tensor is left.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        torch.cuda.init()
        self._device = device
        self._reservation = _Reservation(size, device)
        # A tensor cannot be made of addresses without memory.
        self.map(min(size, 1))
        self.tensor = torch.as_tensor(self._reservation, device=device)

    def map(self, end: int | None = None) -> None:
        """Have memory for the first ``end`` bytes (all of them by default); its contents are
        undefined where there was none.

        Raises:
            CapacityError: the device has not so much memory left; what was mapped stays.
        """
        reservation = self._reservation
        end = reservation.size if end is None else end
        if end <= reservation.mapped:
            return
        torch.cuda.empty_cache()
        try:
            reservation.map(end)
        except _DriverError as error:
            if error.status != _OUT_OF_MEMORY:
                raise
            free, _ = torch.cuda.mem_get_info(self._device)
            raise CapacityError(
                f"{format_bytes(end - reservation.mapped)} are needed on "
                f"{torch.cuda.get_device_name(self._device)} and {format_bytes(free)} are free: "
                "end other programs on it, then try again"
            ) from error

    def unmap(self) -> None:
        """Give all memory back, once the device has done what was asked of it."""
        torch.cuda.synchronize(self._device)
        _unmap(self._reservation.pieces)


class HostCopy:
    """The bytes of a dense tensor of the device, in pinned memory of the host until ``free``."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._bytes = torch.empty(tensor.nbytes, dtype=torch.int8)
        try:
            # Not through torch, which rounds pinned memory up to a power of two and keeps it.
            _call("cuMemHostRegister_v2", self._bytes.data_ptr(), self._bytes.nbytes, 0)
        except _DriverError as error:
            raise CapacityError(
                f"{format_bytes(tensor.nbytes)} of the host's memory cannot be pinned ({error})"
            ) from error
        self._bytes.copy_(tensor.view(torch.int8))

    def copy_to(self, tensor: torch.Tensor) -> None:
        """Fill ``tensor``, of as many bytes."""
        tensor.view(torch.int8).copy_(self._bytes)
        torch.cuda.synchronize(tensor.device)

    def free(self) -> None:
        _call("cuMemHostUnregister", self._bytes.data_ptr())
        del self._bytes
