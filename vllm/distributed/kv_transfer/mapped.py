"""Copies out of a peer's GPU memory that is mapped here: by a kernel, or by the copy engines.

Owns the choice between the two, run by run lengths. Knows addresses and plans; no message, no peer.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from vllm.distributed.kv_transfer.plan import TransferPlan, UnitBlocks
from vllm.distributed.kv_transfer.staging import Done, TableMovers

__all__ = ["CopyEngines", "MappedMemory"]

ENGINE_RUN_BYTES = 512 << 10
"""From this length on the copy engines are quicker than a kernel, and leave the SMs to others."""
_STREAM_ORDER = 1
_BESIDE_KERNELS = 1


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes; the hints are for managed memory."""

    _fields_ = [
        ("order", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("target_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    ]


class CopyEngines:
    """Many copies by one call of CUDA's driver.

    Raises:
        OSError, AttributeError: there is no driver, or one before CUDA 12.8.
    """

    def __init__(self) -> None:
        self._call = ctypes.CDLL("libcuda.so.1").cuMemcpyBatchAsync
        self._attributes = _Attributes(order=_STREAM_ORDER, flags=_BESIDE_KERNELS)
        self._first = ctypes.c_size_t(0)

    def copy(self, sources: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> None:
        """Queue runs (addresses and bytes) on the current stream, which is not the default one.

        Raises:
            RuntimeError: CUDA refuses them.
        """
        arrays = [np.ascontiguousarray(own, np.uint64) for own in (targets, sources, lengths)]
        failed = ctypes.c_size_t()
        error = self._call(
            *(ctypes.c_void_p(array.ctypes.data) for array in arrays),
            ctypes.c_size_t(len(lengths)),
            ctypes.byref(self._attributes),
            ctypes.byref(self._first),
            ctypes.c_size_t(1),
            ctypes.byref(failed),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
        if error:
            raise RuntimeError(f"cuMemcpyBatchAsync: error {error} at run {failed.value}")


class MappedMemory:
    """What a rank of a peer has, where it can be read here.

    Args:
        source: address here of its cache.
        target: address of the own cache, on ``device``.
    """

    def __init__(
        self,
        plan: TransferPlan,
        movers: Sequence[TableMovers],
        source: int,
        target: int,
        device: torch.device,
    ) -> None:
        self._plan = plan
        self._movers = movers
        self._source = source
        self._target = target
        self._device = device
        self._engines: CopyEngines | None = None
        with contextlib.suppress(OSError, AttributeError):
            self._engines = CopyEngines()

    def copy(self, units: Sequence[UnitBlocks]) -> Done:
        """Queue the copies of a request's units on the current stream."""
        for movers, table, own in zip(self._movers, self._plan.tables, units, strict=True):
            if not len(own):
                continue
            if self._engines is not None and table.bytes_per_unit >= ENGINE_RUN_BYTES * len(
                table.lanes
            ):
                sources, targets, lengths = table.runs(own)
                self._engines.copy(sources + self._source, targets + self._target, lengths)
                continue
            movers.copy.move(
                self._source,
                self._target,
                table.starts("source", own.source_blocks, own.source_parts),
                table.starts("target", own.target_blocks, own.target_parts),
            )
        return Done(self._device)
