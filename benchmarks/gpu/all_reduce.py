"""Sums over the GPUs of this host: by words into each other's memory, by reading it, by NCCL.

    torchrun --nproc-per-node 2 benchmarks/gpu/all_reduce.py [--output FILE]

Microseconds of one sum of bf16 rows of 4,096, inside a captured graph of 50 of them; of a sum with
the residual and the norm behind it, in one kernel and in two; and of two halves of 128,256 logits
put together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from vllm import _custom_ops as ops
from vllm.distributed.device_communicators.symmetric_memory import make_symmetric_all_reduce

COUNT = 50


def microseconds(reduce) -> float:
    graph = torch.cuda.CUDAGraph()
    reduce()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(COUNT):
            reduce()
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / COUNT * 1e3)
    return round(statistics.median(times), 2)


def check(reduce, rows: int, rank: int, world: int) -> None:
    """Sums of whole numbers, which rounding leaves alone, several times over."""
    for turn in range(6):
        given = torch.arange(rows * 4096, device="cuda").view(rows, 4096) % 61 + turn + rank
        expected = world * (given - rank) + world * (world - 1) // 2
        assert torch.equal(reduce(given.bfloat16()), expected.bfloat16())


def check_norm(symmetric, rows: int) -> None:
    """One kernel gives what two give, up to the rounding of the result."""
    residual, weight = (
        torch.randn(rows, 4096).cuda().bfloat16(),
        torch.randn(4096).cuda().bfloat16(),
    )
    dist.broadcast(residual, 0)
    dist.broadcast(weight, 0)
    given = torch.randn(rows, 4096, device="cuda").bfloat16()
    expected, expected_residual = symmetric.all_reduce(given.clone()), residual.clone()
    ops.fused_add_rms_norm(expected, expected_residual, weight, 1e-5)
    if symmetric.add_rms_norm(given, residual, weight, 1e-5):
        assert torch.equal(residual, expected_residual)
        torch.testing.assert_close(given, expected, rtol=2**-7, atol=1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    symmetric = make_symmetric_all_reduce(dist.group.WORLD, device)
    world = dist.get_world_size()
    weight = torch.ones(4096, device=device, dtype=torch.bfloat16)
    result: dict[str, dict[str, float]] = {}
    for rows in (1, 8, 32, 64, 128, 256, 512):
        # What travels does not matter, and sums of sums of anything else would overflow.
        tensor = torch.zeros(rows, 4096, device=device, dtype=torch.bfloat16)
        residual = torch.zeros_like(tensor)
        row = {"nccl": microseconds(lambda t=tensor: dist.all_reduce(t))}
        if symmetric is not None:
            for name, sums in symmetric.ways().items():
                if sums.takes(tensor):
                    check(sums.all_reduce, rows, rank, world)
                    row[name] = microseconds(lambda t=tensor, f=sums.all_reduce: f(t))

            def in_two(t=tensor, r=residual) -> None:
                symmetric.all_reduce(t)
                ops.fused_add_rms_norm(t, r, weight, 1e-5)

            row["sum, then norm"] = microseconds(in_two)
            check_norm(symmetric, rows)
            if symmetric.add_rms_norm(tensor, residual, weight, 1e-5):
                row["sum and norm"] = microseconds(
                    lambda t=tensor, r=residual: symmetric.add_rms_norm(t, r, weight, 1e-5)
                )
        if rows <= 64:
            part = torch.randn(rows, 128256 // world, device=device).bfloat16()
            parts = [torch.empty_like(part) for _ in range(world)]

            def gather(part=part, parts=parts) -> torch.Tensor:
                dist.all_gather(parts, part)
                return torch.cat(parts, dim=1)

            row["logits, nccl"] = microseconds(gather)
            if symmetric is not None and symmetric.joins(part, -1):
                assert torch.equal(symmetric.all_gather(part), gather())
                row["logits"] = microseconds(lambda p=part: symmetric.all_gather(p))
        result[f"{rows} rows"] = row
    if rank == 0:
        print(json.dumps(result, indent=1), flush=True)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
