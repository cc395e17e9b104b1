"""Decode steps as CUDA graphs: one for each of a few numbers of requests, memory shared.

A graph holds the model, its output head and the plain draw. A step runs the smallest one that it
fits in; requests that fill it up have no length. Knows nothing of batches or scheduling.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["CapturedStep", "DecodeGraphs", "capture_sizes"]


@dataclass(slots=True)
class CapturedStep:
    """What a captured step leaves, until any graph runs again. Each graph has its own.

    ``hidden`` ``(size, hidden)``, ``logits`` ``(size, V)``.
    """

    hidden: torch.Tensor
    logits: torch.Tensor


def capture_sizes(largest: int) -> list[int]:
    """1, 2, 4, then multiples of 8, and ``largest`` itself; descending."""
    sizes = {size for size in (1, 2, 4, *range(8, largest + 1, 8)) if size < largest}
    return sorted(sizes | {largest}, reverse=True)


class DecodeGraphs:
    """Captured on request, replayed on the current stream."""

    def __init__(self) -> None:
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, CapturedStep]] = {}

    def capture(
        self, sizes: list[int], make_step: Callable[[int], Callable[[], CapturedStep]]
    ) -> None:
        """Capture ``make_step(size)()`` for each size, largest first: the others fit in its memory.

        Each step runs once before its capture, which compiles and sets up what it needs.
        """
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), _no_collection():
            for size in sizes:
                run = make_step(size)
                run()
                graph = torch.cuda.CUDAGraph()
                # NCCL's own thread asks for events meanwhile, which no other mode allows.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                step = run()
                graph.capture_end()
                self._graphs[size] = graph, step
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

    def __bool__(self) -> bool:
        return bool(self._graphs)

    def replay(self, size: int) -> CapturedStep:
        graph, step = self._graphs[size]
        graph.replay()
        return step

    def clear(self) -> None:
        self._graphs.clear()


@contextmanager
def _no_collection() -> Iterator[None]:
    """A collection in the middle of a capture might free what a graph must not see freed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
