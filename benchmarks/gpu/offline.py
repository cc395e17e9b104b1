"""Runs an offline benchmark several times, each in a fresh process, and keeps what it found.

    python benchmarks/gpu/offline.py --bench bench_offline.py --output FILE -- TAG ARGS ... [-- ...]

Each group after ``--`` is a tag and the benchmark's arguments; ``cold:`` before a tag clears
Triton's cache first. The benchmark prints ``RESULT {json}``. The run's own rate of an 8192-cubed
bf16 product, before and after, stands beside it: a prompt's speed follows the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_MATMUL = """
import torch
from triton.testing import do_bench
x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
ms = do_bench(lambda: x @ x, return_mode="median", rep=400)
print(torch.cuda.get_device_name(), torch.__version__, 2 * 8192**3 / ms / 1e9, sep="|")
"""


def matmul() -> tuple[str, str, float]:
    """Device, torch's version and TFLOP/s."""
    text = subprocess.run(
        [sys.executable, "-c", _MATMUL], check=True, capture_output=True, text=True
    ).stdout
    device, version, rate = text.strip().rsplit("\n", 1)[-1].split("|")
    return device, version, round(float(rate), 1)


def groups(words: list[str]) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            found.append([])
        else:
            found[-1].append(word)
    return [group for group in found if group]


def run(bench: str, tag: str, arguments: list[str]) -> dict[str, Any]:
    cold = tag.startswith("cold:")
    cache = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    if cold:
        shutil.rmtree(cache, ignore_errors=True)
    command = [sys.executable, bench, "--tag", tag.removeprefix("cold:"), *arguments]
    with tempfile.TemporaryFile("w+") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        log.seek(0)
        lines = log.read().splitlines()
    for line in lines:
        if line.startswith("RESULT "):
            row = json.loads(line.removeprefix("RESULT "))
            phases = [text.rpartition("] ")[2] for text in lines if "Start-up: " in text]
            return row | {"arguments": arguments, "cold": cold, "phases": phases}
    print("\n".join(lines[-25:]), file=sys.stderr)
    return {"tag": tag, "arguments": arguments, "cold": cold, "failed": True}


def main() -> None:
    words = sys.argv[1:]
    cut = words.index("--")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bench", required=True, help="path of bench_offline.py")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(words[:cut])
    device, version, before = matmul()
    result: dict[str, Any] = {
        "command": f"python benchmarks/gpu/offline.py {' '.join(words)}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device,
        "versions": {"torch": version, "python": platform.python_version()},
        "matmul_tflop_s": [before],
        "rows": [],
    }
    for tag, *arguments in groups(words[cut + 1 :]):
        row = run(args.bench, tag, arguments)
        result["rows"].append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "phases"}), flush=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    result["matmul_tflop_s"].append(matmul()[2])
    print("matmul TFLOP/s before and after", result["matmul_tflop_s"])
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
