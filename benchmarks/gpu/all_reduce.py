"""Sums over the GPUs of this host: through memory that all see, and through NCCL.

    torchrun --nproc-per-node 2 benchmarks/gpu/all_reduce.py [--output FILE]

Microseconds of one sum of bf16 rows of 4,096, inside a captured graph of 50 of them.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    symmetric = make_symmetric_all_reduce(dist.group.WORLD, device)
    result: dict[str, dict[str, float]] = {}
    for rows in (1, 8, 32, 128, 256, 512):
        # What travels does not matter, and sums of sums of anything else would overflow.
        tensor = torch.zeros(rows, 4096, device=device, dtype=torch.bfloat16)
        row = {"nccl": microseconds(lambda tensor=tensor: dist.all_reduce(tensor))}
        if symmetric is not None and symmetric.takes(tensor):
            expected = torch.full_like(tensor, 3.0)
            given = torch.full_like(tensor, 1.0 + rank)
            assert torch.equal(symmetric.all_reduce(given), expected)
            row["symmetric"] = microseconds(lambda tensor=tensor: symmetric.all_reduce(tensor))
        result[f"{rows} rows"] = row
    if rank == 0:
        print(json.dumps(result, indent=1), flush=True)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
