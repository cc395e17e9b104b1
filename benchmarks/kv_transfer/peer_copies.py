"""How one GPU should copy blocks out of another's memory: kernel shapes, copy engines, both ways.

    python benchmarks/kv_transfer/peer_copies.py [--output FILE] [--megabytes 1024]

Needs two GPUs with peer access. 1 GiB of shuffled 16-token blocks of an 8B model's shape, as pages
of 64 KiB a layer (layers outermost) and as runs of 2 MiB (blocks outermost), beside a plain peer
copy. ``read``: the GPU that gets the bytes runs the copy; ``write``: the one that has them. Prints
the quickest shape of the kernel for reading, which ``triton_movers.PEER`` holds.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import itertools
import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import triton

from vllm.v1.kv_cache.triton_movers import MoveShape, PieceTable

LAYERS, PAGE = 32, 64 << 10
REPEATS = 5
SHAPES = (1024, 2048, 4096), (4, 8), (0, 1, 2, 4, 8, 16)
"""Words of 8 bytes a program, its warps, programs an SM."""


def cases(num_blocks: int) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pieces, starts there and starts here of each arrangement."""
    rng = np.random.default_rng(1)
    there, here = (rng.permutation(num_blocks) for _ in range(2))
    layer = np.arange(LAYERS) * num_blocks * PAGE
    pages = np.array([layer, layer, np.full(LAYERS, PAGE)]).T
    block = np.array([[0, 0, LAYERS * PAGE]])
    return {
        "pages": (pages, there * PAGE, here * PAGE),
        "blocks": (block, there * LAYERS * PAGE, here * LAYERS * PAGE),
    }


def enable_peer_access() -> None:
    """Both ways; what is enabled already stays so."""
    driver = ctypes.CDLL("libcuda.so.1")
    contexts = []
    for device in range(2):
        context = ctypes.c_void_p()
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        contexts.append(context)
    for device in range(2):
        with torch.cuda.device(device):
            driver.cuCtxEnablePeerAccess(contexts[1 - device], 0)


def seconds(device: int, copy: Callable[[], None]) -> float:
    """The quickest of some, by the GPU's clock."""
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
        best = float("inf")
        for _ in range(REPEATS + 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            copy()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / 1e3)
    return best


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


class Measurement:
    """Two GPUs' memory, and what was found of copies from the first to the second."""

    def __init__(self, num_blocks: int) -> None:
        self.size = num_blocks * LAYERS * PAGE
        self.memory = [
            torch.empty(self.size, dtype=torch.int8, device=f"cuda:{i}") for i in range(2)
        ]
        self.memory[0].view(torch.int64).random_()
        for i in range(2):
            self.memory[1 - i].copy_(self.memory[i])
        enable_peer_access()
        self.cases = cases(num_blocks)
        self.found: list[dict[str, Any]] = []
        self.plain = self.size / seconds(1, lambda: self.memory[1].copy_(self.memory[0])) / 1e9

    def _note(self, what: dict[str, Any], took: float) -> None:
        self.found.append(what | {"gb_per_second": self.size / took / 1e9})
        print(json.dumps(self.found[-1]), flush=True)

    def kernels(self) -> None:
        source, target = (own.data_ptr() for own in self.memory)
        sms = torch.cuda.get_device_properties(1).multi_processor_count
        for case, (pieces, there, here) in self.cases.items():
            for words, warps, each in itertools.product(*SHAPES):
                shape = MoveShape(words=words, warps=warps, programs=each * sms)
                # Half of the shapes tell whether writing is worth while.
                for device, way in ((1, "read"), (0, "write"))[: 2 if warps == 4 else 1]:
                    with torch.cuda.device(device):
                        place = torch.device("cuda", device)
                        apart = int(np.diff(np.sort(there)).min())
                        table = PieceTable(pieces, place, shape, grain=PAGE, apart=apart)
                    took = seconds(device, partial(table.move, source, target, there, here))
                    what = {"words": words, "warps": warps, "programs": each * sms}
                    self._note({"case": case, "way": way, "by": "kernel", **what}, took)
            check(self.memory, self.cases[case])

    def engines(self) -> None:
        source, target = (own.data_ptr() for own in self.memory)
        engines = CopyEngines()
        for case, (pieces, there, here) in self.cases.items():
            lengths = np.repeat(pieces[:, 2], len(there))
            runs_there = source + (pieces[:, :1] + there).ravel()
            runs_here = target + (pieces[:, 1:2] + here).ravel()
            for device, way in ((1, "read"), (0, "write")):
                took = seconds(device, partial(engines.copy, runs_there, runs_here, lengths))
                self._note({"case": case, "way": way, "by": "engines"}, took)
            check(self.memory, self.cases[case])


def check(memory: list[torch.Tensor], case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    pieces, there, here = case
    for offset, place, length in pieces[[0, -1]].tolist():
        for start, to in zip(there[:8].tolist(), here[:8].tolist(), strict=True):
            sent = memory[0][start + offset : start + offset + length]
            came = memory[1][to + place : to + place + length]
            assert torch.equal(sent.cpu(), came.cpu()), "wrong bytes"


def best_of(found: list[dict[str, Any]]) -> dict[str, int]:
    """The shape whose slower arrangement is the quickest, reading."""
    names = ("words", "warps", "programs")
    speeds: dict[tuple[int, ...], list[float]] = {}
    for row in found:
        if row["by"] == "kernel" and row["way"] == "read":
            shape = tuple(row[name] for name in names)
            speeds.setdefault(shape, []).append(row["gb_per_second"])
    best = max(speeds, key=lambda shape: min(speeds[shape]))
    return dict(zip(names, best, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--output")
    options = parser.parse_args()
    measurement = Measurement((options.megabytes << 20) // (LAYERS * PAGE))
    for step in (measurement.kernels, measurement.engines):
        step()
        result = {
            "date": datetime.date.today().isoformat(),
            "device": f"2 x {torch.cuda.get_device_name(0)}",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "triton": triton.__version__,
            },
            "command": " ".join(["python", *sys.argv]),
            "bytes": measurement.size,
            "plain_copy_gb_per_second": measurement.plain,
            "copies": measurement.found,
            "kernel": best_of(measurement.found),
        }
        if options.output:
            with open(options.output, "w") as file:
                json.dump(result, file, indent=2)
                file.write("\n")
    print(f"plain copy {measurement.plain:.1f} GB/s; best {result['kernel']}")


if __name__ == "__main__":
    main()
