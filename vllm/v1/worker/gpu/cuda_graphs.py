"""Steps as CUDA graphs: one for each of a few sizes, memory shared.

A decode step's graph holds the model, its output head and the plain draw; a small step with prompts
is the model alone. A step runs the smallest graph that it fits in; what fills that up has no length
and is stored nowhere. Knows nothing of batches or scheduling.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

__all__ = [
    "CapturedStep",
    "StepGraphs",
    "capturing",
    "decode_graph_sizes",
    "prompt_graph_sizes",
]

R = TypeVar("R")

_PROMPT_SIZES = (2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 64, 32, 16)
# Tokens times the weights of a layer: on one H100, launching a layer one by one takes the host
# half a millisecond, in which the products of so much are done (benchmarks/gpu/first_token.py).
_LARGEST_PROMPT_WORK = 1.75e11


@dataclass(slots=True)
class CapturedStep:
    """What a captured step leaves, until any graph runs again. Each graph has its own.

    ``hidden`` ``(size, hidden)``, ``logits`` ``(size, V)``.
    """

    hidden: torch.Tensor
    logits: torch.Tensor


def decode_graph_sizes(largest: int) -> list[int]:
    """Requests: 1, 2, 4, then multiples of 8, and ``largest`` itself; descending."""
    sizes = {size for size in (1, 2, 4, *range(8, largest + 1, 8)) if size < largest}
    return sorted(sizes | {largest}, reverse=True)


def prompt_graph_sizes(max_num_tokens: int, weights_per_layer: float) -> list[int]:
    """Tokens of the steps with prompts that are shorter on the device than to launch; descending.

    Args:
        max_num_tokens: of any step.
        weights_per_layer: how many numbers a layer's weights are on this worker, on average.
    """
    largest = min(max_num_tokens, _LARGEST_PROMPT_WORK / weights_per_layer)
    return [size for size in _PROMPT_SIZES if size <= largest]


class StepGraphs(Generic[R]):
    """Captured on request, replayed on the current stream.

    What a replay returns is the graph's own, and stays until any graph runs again.
    """

    def __init__(self) -> None:
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, R]] = {}

    def capture(
        self, sizes: list[int], make_step: Callable[[int], Callable[[], R]], pool: Any
    ) -> None:
        """Capture ``make_step(size)()`` for each size, largest first: the others fit in its memory.

        Each step runs once before its capture, which compiles and sets up what it needs.

        Args:
            pool: what ``capturing`` yields; graphs that share one take turns.
        """
        for size in sizes:
            run = make_step(size)
            run()
            graph = torch.cuda.CUDAGraph()
            # NCCL's own thread asks for events meanwhile, which no other mode allows.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            step = run()
            graph.capture_end()
            self._graphs[size] = graph, step

    def __bool__(self) -> bool:
        return bool(self._graphs)

    def replay(self, size: int) -> R:
        graph, step = self._graphs[size]
        graph.replay()
        return step

    def clear(self) -> None:
        self._graphs.clear()


@contextmanager
def capturing() -> Iterator[Any]:
    """On a stream for captures; yields the memory that graphs captured inside share."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), _no_collection():
        yield torch.cuda.graph_pool_handle()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    # What steps took on that stream before they were captured, no other stream could use.
    torch.cuda.empty_cache()


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
