"""Paged attention on the CPU: GB/s of K and V read in decode, GFLOP/s in prefill, beside torch's.

    python benchmarks/kernels/cpu_attention.py [--threads 1]

torch's scaled_dot_product_attention gets K and V contiguous and already gathered, repeated for the
query heads by its own grouped-query mode, so its figures leave out what a paged cache costs it.
With --threads 1 times are of the thread's own clock, which other processes disturb less.
"""

import argparse
import time
from collections.abc import Callable

import torch

from vllm import _custom_ops as ops


def best_seconds(step: Callable[[], None], threads: int, repeats: int = 7) -> float:
    clock = time.thread_time if threads == 1 else time.perf_counter
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        step()
        best = min(best, clock() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--isa", default=ops.isa())
    args = parser.parse_args()
    ops.set_isa(args.isa)
    ops.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    q, k, d, n = args.heads, args.kv_heads, args.head_size, args.block_size
    print(f"{args.isa}, {args.dtype}, {args.threads} threads, {q}/{k} heads of {d}, blocks of {n}")
    print("requests x new tokens, context |  ours: us     GB/s   GF/s | torch: us | speed-up")
    shapes = [(1, 1, 300), (1, 1, 4096), (8, 1, 512), (32, 1, 512)]
    for requests, new, before in [*shapes, (1, 256, 0), (1, 1024, 0), (1, 128, 896), (4, 1024, 0)]:
        length = new + before
        pages = -(-length // n)
        cache = torch.randn(requests * pages, k, n, 2 * d).to(dtype)
        table = torch.randperm(requests * pages, dtype=torch.int32).view(requests, pages)
        starts = torch.arange(requests + 1, dtype=torch.int32) * new
        lengths = torch.full((requests,), length, dtype=torch.int32)
        query = torch.randn(requests * new, q, d).to(dtype)
        out = torch.empty_like(query)

        def ours(
            query: torch.Tensor = query,
            cache: torch.Tensor = cache,
            out: torch.Tensor = out,
            tables: tuple[torch.Tensor, ...] = (starts, lengths, table),
        ) -> None:
            ops.paged_attention(query, cache, out, *tables, d**-0.5)

        dense = query.view(requests, new, q, d).transpose(1, 2)
        key, value = torch.randn(2, requests, k, length, d).to(dtype).unbind(0)
        mask = torch.ones(new, length, dtype=torch.bool).tril(before) if before else None

        def theirs(
            dense: torch.Tensor = dense,
            key: torch.Tensor = key,
            value: torch.Tensor = value,
            mask: torch.Tensor | None = mask,
            causal: bool = before == 0,
        ) -> None:
            torch.nn.functional.scaled_dot_product_attention(
                dense, key, value, attn_mask=mask, is_causal=causal, enable_gqa=True
            )

        a, b = best_seconds(ours, args.threads), best_seconds(theirs, args.threads)
        gigabytes = requests * length * k * 2 * d * dtype.itemsize / 1e9
        pairs = requests * new * (before + (new + 1) / 2)
        gigaflops = 4e-9 * pairs * q * d
        print(
            f"{requests:4d} x {new:5d}, {before:5d}           | {a * 1e6:9.0f} {gigabytes / a:8.1f}"
            f" {gigaflops / a:6.0f} | {b * 1e6:9.0f} | {b / a:7.2f}"
        )


if __name__ == "__main__":
    main()
