"""NIXL READ of a request's blocks between two processes, beside one-thread memcpy.

    python benchmarks/kv_transfer/nixl_read.py [--json FILE]

256 MiB of KV in pages of 16 KiB a block and layer (32 layers), shuffled block ids, by the plan that
connectors use. Best of several runs, as everything else that runs only adds time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import random
import sys
import time
from typing import Any

import torch

from vllm.distributed.kv_transfer.plan import plan_transfer
from vllm.distributed.kv_transfer.transport.nixl import NixlPort
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.descriptors import CacheDescriptor, describe
from vllm.v1.kv_cache.placement import place_layers
from vllm.v1.kv_cache.rearrange import Shard
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

LAYERS, BLOCK = 32, 16
REPEATS = 5


def make_config(layout: str, num_blocks: int) -> KVCacheConfig:
    # 4 heads of 64, float16: 16 KiB a block and layer.
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=4, head_size=64, dtype="float16")
    names = [f"layer.{i}" for i in range(LAYERS)]
    specs = dict.fromkeys(names, spec)
    tensors = place_layers([names], specs, KVCacheLayout(layout), num_blocks)
    groups = [KVCacheGroupSpec(names, spec)]
    return KVCacheConfig(num_blocks, tensors, groups, kv_cache_layout=KVCacheLayout(layout))


def own(layout: str, num_blocks: int, seed: int) -> tuple[Any, NixlPort, CacheDescriptor]:
    config = make_config(layout, num_blocks)
    cache = allocate_kv_cache(config)
    cache.backing.random_(-128, 127, generator=torch.Generator().manual_seed(seed))
    base = cache.backing.data_ptr()
    port = NixlPort(f"agent-{os.getpid()}-{layout}-{seed}")
    port.register([(base, cache.backing.numel())], "cpu")
    return cache, port, describe(config, base)


def serve(layout: str, num_blocks: int, pipe: Any) -> None:
    _cache, port, descriptor = own(layout, num_blocks, 1)
    pipe.send((port.metadata(), descriptor.to_json()))
    while not pipe.poll(0.0005):
        port.take_notifications()
    port.close()


def measure(layout: str, megabytes: int) -> dict[str, Any]:
    num_used = (megabytes << 20) // (LAYERS * 16384)
    num_blocks = num_used + 2
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(layout, num_blocks, theirs)
    )
    process.start()
    metadata, text = ours.recv()
    cache, port, descriptor = own(layout, num_blocks, 2)
    source = CacheDescriptor.from_json(text)
    heads: dict[str, int | None] = {layer.name: 4 for layer in descriptor.layers}
    plan = plan_transfer(source, descriptor, Shard(), Shard(), heads)
    peer = port.connect(metadata)
    rows = plan.rows("target"), plan.rows("source")
    rows[0][:, 0] += descriptor.base
    rows[1][:, 0] += source.base
    local, remote = port.prepare(None, rows[0]), port.prepare(peer, rows[1])
    ids = list(range(1, num_used + 1))
    best = float("inf")
    for repeat in range(REPEATS):
        shuffled = (
            random.Random(repeat).sample(ids, num_used),
            random.Random(-1).sample(ids, num_used),
        )
        begin = time.perf_counter()
        units = plan.units([shuffled[0]], [shuffled[1]], num_used * BLOCK)
        copy = port.read(
            local, plan.indices(units, "target"), remote, plan.indices(units, "source")
        )
        while not port.poll(copy):
            pass
        best = min(best, time.perf_counter() - begin)
    size = plan.num_bytes(units)
    ours.send("done")
    process.join()
    port.close()
    del cache
    return {
        "layout": layout,
        "regions": 1 if layout[0] == "B" else LAYERS,
        "descriptors": plan.num_descriptors(units),
        "bytes": size,
        "gb_per_second": size / best / 1e9,
    }


def memcpy(megabytes: int) -> float:
    torch.set_num_threads(1)
    source = torch.ones(megabytes << 20, dtype=torch.int8)
    target = torch.zeros_like(source)
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - begin)
    return source.numel() / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--json")
    options = parser.parse_args()
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
    before = memcpy(options.megabytes)
    found = [measure(layout, options.megabytes) for layout in ("LBHNC", "BLHNC", "BHLNC")]
    plain = max(before, memcpy(options.megabytes))
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"CPU, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": " ".join(["python", *sys.argv]),
        "memcpy_gb_per_second": plain,
        "reads": [{**read, "of_memcpy": read["gb_per_second"] / plain} for read in found],
    }
    print(json.dumps(result, indent=2))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
