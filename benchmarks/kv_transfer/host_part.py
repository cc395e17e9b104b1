"""What the host does for a load over mapped memory before the kernel that copies is launched.

    python benchmarks/kv_transfer/host_part.py [--output FILE] [--blocks 512] [--repeats 50]

Two workers in this process, as connectors use them, over the in-memory port, with as many layers
and shuffled blocks as an 8B model's prompt of 8,192 tokens has, but small pages: the host's part
depends on their number only. Memory counts as mapped, and everything is done as on a GPU but for
three calls of CUDA: the upload of the starts, the launch, the event behind it. From the order to
load until all is launched; a load comes 20 ms after the one before, as the processor's caches have
then forgotten how it goes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import sys
import time
from typing import Any

import nixl_read
import numpy as np
import torch

from vllm.distributed.kv_transfer import staging
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import LeaseStart, NixlStepMetadata
from vllm.distributed.kv_transfer.transport.memory import MemoryFabric, MemoryPort
from vllm.v1.kv_cache import triton_movers
from vllm.v1.kv_cache.rearrange import Shard

_WARM_UP = 10
_PAUSE = 0.02


class MappedPort(MemoryPort):
    """All memory of this process can be read by this process."""

    def mapped(self, peer: str, address: int) -> int | None:
        return address


class Launches:
    """In the place of the kernel: counts what would be launched."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: tuple[int]) -> Launches:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.count += 1


def mover(pieces: np.ndarray, device: torch.device, **kwargs: Any) -> triton_movers.PieceTable:
    del kwargs["of_peer"]
    return triton_movers.PieceTable(pieces, device, triton_movers.PEER, **kwargs)


def measure(layout: str, num_blocks: int, repeats: int, launches: Launches) -> dict[str, Any]:
    """Microseconds from the order until all is launched."""
    page = nixl_read.BLOCK * 2 * 8 * 2
    megabytes = num_blocks * nixl_read.LAYERS * page >> 20
    shape = nixl_read.Shape(heads=1, head_size=8, megabytes=megabytes, repeats=repeats)
    case = nixl_read.Case(("cpu", "cpu"), layout, "mapped", shape)
    assert case.num_used == num_blocks, "--blocks must be a multiple of 64"
    fabric = MemoryFabric()
    # Both caches stay here as long as the workers do.
    _there, p, payload = nixl_read.make_side(
        case, Shard(), "p", "cpu", {}, MappedPort(fabric, f"{layout} p")
    )
    _here, d, _ = nixl_read.make_side(
        case, Shard(), "d", "cpu", {0: payload}, MappedPort(fabric, f"{layout} d")
    )
    ids = list(range(1, num_blocks + 1))
    found: list[float] = []
    before = launches.count
    for number in range(repeats + _WARM_UP):
        there = random.Random(number).sample(ids, num_blocks)
        here = random.Random(-1).sample(ids, num_blocks)
        start = LeaseStart(slot=number, block_ids=(there,))
        p.submit(NixlStepMetadata(leases={f"r{number}": start}))
        receive = nixl_read.receive_of(case, number, there, here)
        time.sleep(_PAUSE)
        d.submit(NixlStepMetadata(receives=[receive]))
        time.sleep(_PAUSE)
        nixl_read.wait_for(d, f"r{number}")
        stats = d.take_stats() or {}
        found.append(stats["transfer_post_seconds"] * 1e6)
    assert launches.count - before == len(found), "a load was not launched as one kernel"
    for worker in (d, p):
        worker.close()
    found = sorted(found[_WARM_UP:])
    return {
        "layout": layout,
        "blocks": num_blocks,
        "least_us": round(found[0]),
        "first_quartile_us": round(found[len(found) // 4]),
        "median_us": round(statistics.median(found)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--layouts", default="LBHNC,BLHNC,BHLNC")
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(1)
    launches = Launches()
    triton_movers._piece_kernel = launches
    staging.make_mover = mover
    rows = []
    for layout in options.layouts.split(","):
        rows.append(measure(layout, options.blocks, options.repeats, launches))
        print(json.dumps(rows[-1]), flush=True)
    if options.output:
        result = {
            "date": datetime.date.today().isoformat(),
            "device": f"CPU, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "command": " ".join(["python", *sys.argv]),
            "loads": rows,
        }
        with open(options.output, "w") as file:
            json.dump(result, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
