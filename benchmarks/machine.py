"""What this machine can do at best, measured beside every figure: streaming reads and bf16 GEMM.

python benchmarks/machine.py
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
GIB = 1 << 30


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def stream_read_gb_s(repeats: int = 5) -> float:
    """GB/s of reading 1 GiB once with a thread on each core, the best of ``repeats``."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "stream_read.so"
        subprocess.run(
            [
                "gcc",
                "-O3",
                "-march=native",
                "-fopenmp",
                "-shared",
                "-fPIC",
                "-o",
                str(library),
                str(HERE / "stream_read.c"),
            ],
            check=True,
        )
        read = ctypes.CDLL(str(library)).stream_read
        read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        read.restype = ctypes.c_uint64
        data = np.ones(GIB // 8, dtype=np.uint64)
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            total = read(data.ctypes.data, data.size, num_cores())
            best = min(best, time.perf_counter() - start)
        assert total == data.size, "the read was optimised away"
    return GIB / best / 1e9


def bf16_gemm_gflop_s(size: int = 2048, repeats: int = 5) -> float:
    """GFLOP/s of a ``size``-cubed bf16 matrix product by torch, the best of ``repeats``."""
    import torch

    torch.set_num_threads(num_cores())
    a = torch.randn(size, size, dtype=torch.bfloat16)
    b = torch.randn(size, size, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def identity() -> dict[str, object]:
    """Date, processor and versions; for figures that depend on neither of the machine's rates."""
    import vllm

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_name(),
        "cores": num_cores(),
        "python": platform.python_version(),
        "vllm": vllm.__version__,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def gpu_identity(*packages: str) -> dict[str, object]:
    """Command, date, GPU and versions, those of ``packages`` too; for figures taken on one GPU."""
    import torch

    script = Path(sys.argv[0]).resolve().relative_to(HERE.parent)
    return {
        "command": " ".join(["python", str(script), *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in ("triton", *packages)},
        },
    }


def describe() -> dict[str, object]:
    """The machine and its two rates, to be kept beside a figure."""
    import torch

    return identity() | {
        "torch": torch.__version__,
        "stream_read_gb_s": round(stream_read_gb_s(), 2),
        "bf16_gemm_gflop_s": round(bf16_gemm_gflop_s(), 1),
    }


def results_path(name: str) -> Path:
    return HERE / "results" / f"{name}.json"


def load(name: str) -> dict[str, object]:
    """What :func:`save` has kept under this name; nothing where there is none."""
    path = results_path(name)
    return json.loads(path.read_text()) if path.exists() else {}


def save(name: str, command: str, result: dict[str, object]) -> None:
    """Write ``result`` as benchmarks/results/<name>.json, with the command that gave it."""
    path = results_path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"command": command} | result, indent=2) + "\n")


if __name__ == "__main__":
    print(json.dumps(describe(), indent=2))
