"""Time until ``vllm serve`` answers, on the second start, and its resident memory.

python benchmarks/startup.py [--model smollm2] [--kv-gib 1]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import httpx
import machine
from server import serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--kv-gib", type=float, default=1.0, help="KV cache asked for")
    args = parser.parse_args()
    flags = ["--dtype", "bfloat16", "--kv-cache-memory-bytes", str(int(args.kv_gib * (1 << 30)))]

    ready: list[float] = []
    for start in range(3):
        with serve(args.model, *flags) as server:
            ready.append(round(server.ready_s, 2))
            if start:
                body = {"model": args.model, "prompt": "The sea is", "max_tokens": 64}
                for _ in range(4):
                    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            memory = server.memory()
    result = machine.describe() | {
        "model": args.model,
        "ready_s_first_start": ready[0],
        "ready_s_later_starts": ready[1:],
        "kv_cache_asked_mb": round(args.kv_gib * (1 << 30) / 1e6, 1),
        **memory,
    }
    machine.save("cpu_startup", "python benchmarks/startup.py", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
