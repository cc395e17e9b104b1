"""NIXL transfers of a request's blocks between two processes, by the workers that connectors use.

    python benchmarks/kv_transfer/nixl_read.py [--device cuda] [--output FILE]

CPU: 256 MiB of KV in pages of 16 KiB a block and layer (32 layers), beside one-thread memcpy. GPUs:
1 GiB in blocks of 16 tokens of an 8B model's shape from one GPU to another, beside a plain peer
copy. Block ids are shuffled; each layout by descriptors and by the way that the plan chooses.
The time is from the order to load until the lease has been confirmed. Best of several runs, as
everything else that runs only adds time. Bytes are compared afterwards.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from vllm.distributed.kv_transfer.costs import HOST_COPIES, NVLINK, route
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.assembly import make_ring, make_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import (
    LeaseStart,
    NixlSettings,
    NixlStepMetadata,
    Receive,
    RemoteParams,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.peers import LocalSide
from vllm.distributed.kv_transfer.transport.peer_memory import PeerMemoryPort
from vllm.utils.huge_pages import advise_huge_pages
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.descriptors import describe
from vllm.v1.kv_cache.placement import place_layers
from vllm.v1.kv_cache.rearrange import Shard
from vllm.v1.kv_cache.runs import regions
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

LAYERS, BLOCK = 32, 16


@dataclass(frozen=True)
class Shape:
    heads: int
    head_size: int
    megabytes: int
    repeats: int

    @property
    def page_bytes(self) -> int:
        return BLOCK * self.heads * 2 * self.head_size * 2


SHAPES = {
    "cpu": Shape(heads=4, head_size=64, megabytes=256, repeats=7),
    "cuda": Shape(heads=8, head_size=128, megabytes=1024, repeats=12),
}
LAYOUTS = ("LBHNC", "LBNHC", "BLHNC", "BHLNC")
SECRET = b"of both sides"


def make_config(shape: Shape, layout: str, num_blocks: int) -> KVCacheConfig:
    spec = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=shape.heads, head_size=shape.head_size, dtype="bfloat16"
    )
    names = [f"layer.{i}" for i in range(LAYERS)]
    specs = dict.fromkeys(names, spec)
    tensors = place_layers([names], specs, KVCacheLayout(layout), num_blocks)
    groups = [KVCacheGroupSpec(names, spec)]
    return KVCacheConfig(num_blocks, tensors, groups, kv_cache_layout=KVCacheLayout(layout))


def filled(config: KVCacheConfig, device: str, seed: int) -> Any:
    cache = allocate_kv_cache(config, device)
    backing = cache.backing
    if device == "cpu":
        advise_huge_pages(backing.data_ptr(), backing.numel())
    generator = torch.Generator(device).manual_seed(seed)
    backing.view(torch.int64).random_(generator=generator)
    return cache


def make_side(
    config: KVCacheConfig, device: str, seed: int, path: str, answers: dict[str, bytes]
) -> tuple[Any, Any, bytes]:
    """A cache, its worker, and the worker's handshake."""
    if device != "cpu":
        torch.cuda.set_device(device)
    cache = filled(config, device, seed)
    backing = cache.backing
    settings = NixlSettings(transfer_path=path)
    port = PeerMemoryPort(f"agent-{os.getpid()}-{config.kv_cache_layout}-{path}-{seed}")
    base = backing.data_ptr()
    port.register([(base + r.offset, r.size_bytes) for r in regions(config)], device)
    ring = make_ring(backing, settings)
    assert ring is not None
    port.register([ring.region], device)
    descriptor = describe(config, base)
    heads = {layer.name: layer.head_axis.count for layer in descriptor.layers if layer.head_axis}
    local = LocalSide(
        engine_id="p" if seed == 1 else "d",
        session="s",
        secret=SECRET,
        shard=Shard(),
        descriptor=descriptor,
        total_heads=dict(heads),
        factors={},
        device=device,
        ring=ring.shape,
    )
    worker, payload = make_worker(
        local, settings, port, lambda host, *_: answers[host], backing=backing, ring=ring
    )
    return cache, worker, payload


def serve(config: KVCacheConfig, device: str, path: str, pipe: Any) -> None:
    _cache, worker, payload = make_side(config, device, 1, path, {})
    pipe.send(payload)
    while (order := pipe.recv()) is not None:
        slot, blocks = order
        start = LeaseStart(slot=slot, block_ids=(blocks,))
        worker.submit(NixlStepMetadata(leases={f"r{slot}": start}))
        pipe.send("leased")
    worker.close()


def wait_for(worker: Any, request_id: str) -> None:
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        results = worker.take_results()
        assert not results.failed_recving, "the load has failed"
        if request_id in results.finished_recving:
            return
        time.sleep(0.0002)
    raise TimeoutError(request_id)


def measure(devices: tuple[str, str], layout: str, path: str, shape: Shape) -> dict[str, Any]:
    num_used = (shape.megabytes << 20) // (LAYERS * shape.page_bytes)
    config = make_config(shape, layout, num_used + 2)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(config, devices[0], path, theirs))
    process.start()
    answers = {"p-host": ours.recv()}
    cache, worker, _ = make_side(config, devices[1], 2, path, answers)
    ids = list(range(1, num_used + 1))
    times: list[float] = []
    taken: list[str] = []
    stats: dict[str, float] = {}
    for repeat in range(shape.repeats):
        there = random.Random(repeat).sample(ids, num_used)
        here = random.Random(-1).sample(ids, num_used)
        ours.send((repeat, there))
        ours.recv()
        params = RemoteParams(
            do_remote_prefill=True,
            remote_engine_id="p",
            remote_session="s",
            remote_request_id=f"r{repeat}",
            remote_host="p-host",
            remote_port=1,
            remote_block_ids=[there],
            remote_num_tokens=num_used * BLOCK,
            remote_lease_slot=repeat,
        )
        params.remote_seal = params.sealed_by(SECRET)
        receive = Receive(
            request_id=f"r{repeat}",
            params=params,
            block_ids=(here,),
            first_token=0,
            num_tokens=num_used * BLOCK,
        )
        time.sleep(0.02)
        begin = time.perf_counter()
        worker.submit(NixlStepMetadata(receives=[receive]))
        wait_for(worker, f"r{repeat}")
        times.append(time.perf_counter() - begin)
        stats = worker.take_stats() or {}
        taken.append(
            next(k for k in stats if k.startswith("transfers_by_"))[len("transfers_by_") :]
        )
    truth = filled(config, devices[1], 1)
    for name in ("layer.0", f"layer.{LAYERS - 1}"):
        # As whole numbers: some of these bits are no number at all.
        sent, came = (c[name][ids].view(torch.int16) for c, ids in ((truth, there), (cache, here)))
        assert torch.equal(sent, came), f"{layout}: wrong bytes"
    # Of the last run: by then the plan has seen how the ways do here.
    ways = [taken[-1]]
    worker.close()
    ours.send(None)
    process.join()
    costs = HOST_COPIES if devices[0] == "cpu" else NVLINK
    size = num_used * LAYERS * shape.page_bytes
    direct = num_used * (1 if layout[0] == "B" else LAYERS)
    predicted = route(costs, direct, size, costs.slot_bytes, mapped=ways == ["mapped"])
    return {
        "layout": layout,
        "asked": path,
        "way": ways[0],
        "ways": taken,
        "regions": len(regions(config)),
        "descriptors": int(stats.get("transfer_descriptors", 0)),
        "predicted_ms": round(predicted.seconds.get(ways[0], 0) * 1e3, 2),
        "ms": round(min(times) * 1e3, 2),
        "median_ms": round(sorted(times)[len(times) // 2] * 1e3, 2),
        "gb_per_second": size / min(times) / 1e9,
    }


def plain_copy(devices: tuple[str, str], shape: Shape) -> float:
    """GB/s of one large copy: one-thread memcpy, or from one GPU to the other."""
    torch.set_num_threads(1)
    source = torch.ones(shape.megabytes << 20, dtype=torch.int8, device=devices[0])
    target = torch.zeros_like(source, device=devices[1])
    best = float("inf")
    for _ in range(shape.repeats):
        for device in set(devices) - {"cpu"}:
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        target.copy_(source)
        for device in set(devices) - {"cpu"}:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return source.numel() / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--megabytes", type=int)
    parser.add_argument("--layouts", default="LBHNC,BLHNC,BHLNC")
    parser.add_argument("--paths", default="descriptors,staging,auto")
    parser.add_argument("--output")
    options = parser.parse_args()
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    shape = SHAPES[options.device]
    if options.megabytes:
        shape = Shape(shape.heads, shape.head_size, options.megabytes, shape.repeats)
    devices = ("cpu", "cpu") if options.device == "cpu" else ("cuda:0", "cuda:1")
    before = plain_copy(devices, shape)
    found = []
    for layout in options.layouts.split(","):
        for path in options.paths.split(","):
            found.append(measure(devices, layout, path, shape))
            print(json.dumps(found[-1]), flush=True)
    plain = max(before, plain_copy(devices, shape))
    device = f"CPU, {os.cpu_count()} cores"
    if options.device == "cuda":
        device = f"2 x {torch.cuda.get_device_name(0)}"
    result = {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "nixl": importlib.metadata.version(
                "nixl-cu12" if options.device == "cpu" else "nixl-cu13"
            ),
        },
        "command": " ".join(["python", *sys.argv]),
        "bytes": shape.megabytes << 20,
        "plain_copy_gb_per_second": plain,
        "reads": [{**read, "of_plain_copy": read["gb_per_second"] / plain} for read in found],
    }
    for read in result["reads"]:
        print(f"{read['layout']} {read['asked']:12} {read['way']:12} {read['of_plain_copy']:.2f}")
    print(f"plain copy {plain:.1f} GB/s")
    if options.output:
        with open(options.output, "w") as file:
            json.dump(result, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
