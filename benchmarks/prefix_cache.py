"""Time to the first token of a 1,000-token prompt, cold and with its prefix in the cache.

python benchmarks/prefix_cache.py [--model smollm2]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import httpx
import machine
from server import serve


def ttft(client: httpx.Client, model: str, prompt: list[int]) -> float:
    """Seconds until the first streamed chunk."""
    body = {"model": model, "prompt": prompt, "max_tokens": 2, "stream": True, "temperature": 0}
    start = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                return time.perf_counter() - start
    raise RuntimeError("the stream held no token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prefix", type=int, default=1000, help="shared prefix tokens")
    parser.add_argument("--suffix", type=int, default=8, help="tokens that differ")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    rng = random.Random(0)
    tokens = lambda count: [rng.randrange(100, 49000) for _ in range(count)]  # noqa: E731
    cold: list[float] = []
    warm: list[float] = []
    with (
        serve(args.model, "--dtype", "bfloat16", "--kv-cache-memory-bytes", "1073741824") as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        ttft(client, args.model, tokens(64))
        for _ in range(args.repeats):
            prefix = tokens(args.prefix)
            cold.append(ttft(client, args.model, prefix + tokens(args.suffix)))
            warm.append(ttft(client, args.model, prefix + tokens(args.suffix)))
    result = machine.describe() | {
        "model": args.model,
        "ttft_cold_ms": round(statistics.median(cold) * 1e3, 1),
        "ttft_warm_ms": round(statistics.median(warm) * 1e3, 1),
        "warm_over_cold": round(statistics.median(warm) / statistics.median(cold), 3),
    }
    machine.save("cpu_prefix_cache", "python benchmarks/prefix_cache.py", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
