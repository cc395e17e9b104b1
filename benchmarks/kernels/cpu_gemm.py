"""Packed products against torch's (oneDNN) and against a streaming read of the same bytes.

    python benchmarks/kernels/cpu_gemm.py [--dtype bfloat16] [--model smollm2]

One line per number of rows: all linear layers of one model once, so that the weights come from
memory as they do in a decode step. GB/s counts weight bytes, GF/s two operations per weight.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vllm import _custom_ops as ops

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import machine

# (out, in) of each product of a layer, number of layers, the head.
MODELS = {
    "smollm2": ([(960, 576), (576, 576), (3072, 576), (576, 1536)], 30, (49152, 576)),
    "llama-1b": ([(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)], 4, (32000, 2048)),
}


def seconds(step: Callable[[], None], repeats: int) -> float:
    """Best of ``repeats`` runs: other processes only ever add time."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--model", default="smollm2", choices=list(MODELS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 256, 1024])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--isa", default=ops.isa())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ops.set_num_threads(args.threads)
    ops.set_isa(args.isa)
    dtype = getattr(torch, args.dtype)
    shapes, layers, head = MODELS[args.model]
    all_shapes = [*shapes * layers, head]
    weights = [torch.randn(n, k).mul_(k**-0.5).to(dtype) for n, k in all_shapes]
    packed = [ops.pack_weight(weight) for weight in weights]
    numbers = sum(n * k for n, k in all_shapes)
    gigabytes = numbers * dtype.itemsize / 1e9
    stream = machine.stream_read_gb_s()
    print(f"{args.isa}, {args.dtype}, {args.threads} threads, {gigabytes:.3f} GB of weights")
    print(f"streaming read {stream:.1f} GB/s")
    print("   rows |  ours: ms   GB/s  GF/s  of stream | torch: ms   GB/s  GF/s | speed-up")
    for rows in args.rows:
        inputs = {k: torch.randn(rows, k).to(dtype) for _, k in all_shapes}
        repeats = max(2, args.repeats if rows < 256 else args.repeats // 2)

        def ours(inputs: dict[int, torch.Tensor] = inputs) -> None:
            for weight in packed:
                ops.linear(inputs[weight.k], weight)

        def theirs(inputs: dict[int, torch.Tensor] = inputs) -> None:
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)

        a, b = seconds(ours, repeats), seconds(theirs, repeats)
        flops = 2e-9 * rows * numbers
        print(
            f"{rows:7d} | {a * 1e3:9.2f} {gigabytes / a:6.1f} {flops / a:5.0f} "
            f"{gigabytes / a / stream:9.2f}  | {b * 1e3:9.2f} {gigabytes / b:6.1f} {flops / b:5.0f}"
            f" | {b / a:7.2f}"
        )


if __name__ == "__main__":
    main()
