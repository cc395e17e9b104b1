"""Moves runs of bytes between two places in memory by tables that are made once.

A *piece* is a run of bytes that every unit has; where units start on either side comes with each
call. Gathering blocks into a buffer, scattering them out of one, and copying them between two
caches are such moves. Knows addresses only: no layer, no format, no peer. On the CPU the copies
are C++'s, on a GPU all of a call is one kernel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch

from vllm import _extension

__all__ = ["PieceMover", "make_mover"]


class PieceMover(ABC):
    """Moves the pieces of units.

    Args:
        pieces: int64 ``(pieces, 3)``: offset from the unit's start there, offset from its start
            here, bytes. Pieces here do not overlap.
    """

    def __init__(self, pieces: np.ndarray) -> None:
        self._pieces = np.ascontiguousarray(pieces, dtype=np.int64).reshape(-1, 3)

    @abstractmethod
    def move(
        self,
        source: int,
        target: int,
        source_starts: np.ndarray,
        target_starts: np.ndarray,
        *,
        streams: bool = False,
    ) -> None:
        """Copy every piece of every unit; both addresses plus starts are on this device.

        Args:
            source, target: addresses that starts count from.
            source_starts, target_starts: int64 ``(units,)``, bytes.
            streams: what is written is not read soon (a hint).
        """


class _CpuMover(PieceMover):
    def move(
        self,
        source: int,
        target: int,
        source_starts: np.ndarray,
        target_starts: np.ndarray,
        *,
        streams: bool = False,
    ) -> None:
        there = np.ascontiguousarray(source_starts, dtype=np.int64)
        here = np.ascontiguousarray(target_starts, dtype=np.int64)
        assert there.shape == here.shape
        if _extension.kernels is not None:
            _extension.kernels.move_pieces(
                source, target, there.ctypes.data, here.ctypes.data, len(there),
                self._pieces.ctypes.data, len(self._pieces), int(streams),
            )  # fmt: skip
            return
        import ctypes

        for start, to in zip(there.tolist(), here.tolist(), strict=True):
            for offset, place, length in self._pieces.tolist():
                ctypes.memmove(target + to + place, source + start + offset, length)


class _CudaMover(PieceMover):
    def __init__(
        self, pieces: np.ndarray, device: torch.device, of_peer: bool, grain: int, apart: int
    ) -> None:
        from vllm.v1.kv_cache.triton_movers import LOCAL, PEER, PieceTable

        super().__init__(pieces)
        shape = PEER if of_peer else LOCAL
        self._table = PieceTable(self._pieces, device, shape, grain=grain, apart=apart)

    def move(
        self,
        source: int,
        target: int,
        source_starts: np.ndarray,
        target_starts: np.ndarray,
        *,
        streams: bool = False,
    ) -> None:
        self._table.move(source, target, source_starts, target_starts)


def make_mover(
    pieces: Any, device: torch.device | str, *, grain: int, apart: int, of_peer: bool = False
) -> PieceMover:
    """A mover on ``device``; on a GPU its moves are queued on the current stream.

    Args:
        grain: bytes that every start is a multiple of, on both sides.
        apart: bytes from one unit to the next there, where they are neighbours.
        of_peer: the source lies in another GPU's memory.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _CpuMover(pieces)
    return _CudaMover(pieces, device, of_peer, grain, apart)
