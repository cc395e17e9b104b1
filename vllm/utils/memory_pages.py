"""Giving a tensor's memory back to the system while its addresses stay valid (Linux)."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["drop_pages", "trim_heap"]


def drop_pages(tensor: torch.Tensor) -> None:
    """Forget the contents of a dense CPU tensor and free its memory; it reads as zeros afterwards.

    Whole pages only, so up to a page at either end is cleared instead.

    Raises:
        OSError: the system refuses, for locked or shared memory.
    """
    page = mmap.PAGESIZE
    start, size = tensor.data_ptr(), tensor.nbytes
    first = -(-start // page) * page
    last = (start + size) // page * page
    if last <= first:
        tensor.zero_()
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if libc.madvise(first, last - first, mmap.MADV_DONTNEED) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot give memory back: {os.strerror(number)}")
    ctypes.memset(start, 0, first - start)
    ctypes.memset(last, 0, start + size - last)


def trim_heap() -> None:
    """Give what has been freed back to the system, where the C library can; glibc keeps some."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
