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
from vllm.distributed.kv_transfer.transport.port import TransferPort
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
SECRET = b"of both sides"
SEEDS = {"p": 1, "d": 100}


@dataclass(frozen=True)
class Case:
    """What is measured."""

    devices: tuple[str, str]
    layout: str
    path: str
    shape: Shape
    source_ranks: int = 1
    """Tensor-parallel size of the side that is read, all of it on one device."""
    slots: int | None = None
    slot_bytes: int | None = None
    threads: int = NixlSettings().num_threads

    @property
    def num_used(self) -> int:
        return (self.shape.megabytes << 20) // (LAYERS * self.shape.page_bytes)

    @property
    def settings(self) -> NixlSettings:
        slots = {} if self.slots is None else {"staging_slots": self.slots}
        return NixlSettings(transfer_path=self.path, staging_slot_bytes=self.slot_bytes, **slots)

    def config(self, ranks: int) -> KVCacheConfig:
        spec = FullAttentionSpec(
            block_size=BLOCK,
            num_kv_heads=self.shape.heads // ranks,
            head_size=self.shape.head_size,
            dtype="bfloat16",
        )
        names = [f"layer.{i}" for i in range(LAYERS)]
        layout = KVCacheLayout(self.layout)
        num_blocks = self.num_used + 2
        tensors = place_layers([names], dict.fromkeys(names, spec), layout, num_blocks)
        groups = [KVCacheGroupSpec(names, spec)]
        return KVCacheConfig(num_blocks, tensors, groups, kv_cache_layout=layout)


def filled(config: KVCacheConfig, device: str, seed: int) -> Any:
    cache = allocate_kv_cache(config, device)
    backing = cache.backing
    if device == "cpu":
        advise_huge_pages(backing.data_ptr(), backing.numel())
    generator = torch.Generator(device).manual_seed(seed)
    backing.view(torch.int64).random_(generator=generator)
    return cache


def make_side(
    case: Case,
    shard: Shard,
    engine_id: str,
    device: str,
    answers: dict[int, bytes],
    port: TransferPort | None = None,
) -> tuple[Any, Any, bytes]:
    """A cache, its worker, and the worker's handshake; over NIXL where no port is given."""
    if device != "cpu":
        torch.cuda.set_device(device)
    config = case.config(shard.tp_size)
    seed = SEEDS[engine_id] + shard.rank
    cache = filled(config, device, seed)
    backing = cache.backing
    settings = case.settings
    if port is None:
        name = f"agent-{os.getpid()}-{case.layout}-{case.path}-{seed}"
        port = PeerMemoryPort(name, num_threads=case.threads)
    base = backing.data_ptr()
    port.register([(base + r.offset, r.size_bytes) for r in regions(config)], device)
    ring = make_ring(backing, settings)
    assert ring is not None
    port.register([ring.region], device)
    descriptor = describe(config, base)
    local = LocalSide(
        engine_id=engine_id,
        session="s",
        secret=SECRET,
        shard=shard,
        descriptor=descriptor,
        total_heads={layer.name: case.shape.heads for layer in descriptor.layers},
        factors={},
        device=device,
        ring=ring.shape,
    )
    worker, payload = make_worker(
        local,
        settings,
        port,
        lambda host, address, rank, timeout: answers[rank],
        ring=ring,
    )
    return cache, worker, payload


def serve(case: Case, rank: int, pipe: Any) -> None:
    shard = Shard(tp_size=case.source_ranks, rank=rank)
    _cache, worker, payload = make_side(case, shard, "p", case.devices[0], {})
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
        time.sleep(0.0001)
    raise TimeoutError(request_id)


def receive_of(case: Case, number: int, there: list[int], here: list[int]) -> Receive:
    num_tokens = case.num_used * BLOCK
    params = RemoteParams(
        do_remote_prefill=True,
        remote_engine_id="p",
        remote_session="s",
        remote_request_id=f"r{number}",
        remote_host="p-host",
        remote_port=1,
        tp_size=case.source_ranks,
        remote_block_ids=[there],
        remote_num_tokens=num_tokens,
        remote_lease_slot=number,
    )
    params.remote_seal = params.sealed_by(SECRET)
    return Receive(
        request_id=f"r{number}",
        params=params,
        block_ids=(here,),
        first_token=0,
        num_tokens=num_tokens,
    )


def check_bytes(case: Case, cache: Any, there: list[int], here: list[int]) -> None:
    heads = case.shape.heads // case.source_ranks
    for rank in range(case.source_ranks):
        truth = filled(case.config(case.source_ranks), case.devices[1], SEEDS["p"] + rank)
        own = slice(rank * heads, (rank + 1) * heads)
        for name in ("layer.0", f"layer.{LAYERS - 1}"):
            # As whole numbers: some of these bits are no number at all.
            sent = truth[name][there].view(torch.int16)
            came = cache[name][here][:, own].view(torch.int16)
            assert torch.equal(sent, came), f"{case}: wrong bytes"


def measure(case: Case) -> dict[str, Any]:
    # Processes start soon, from one that has imported torch, and without CUDA's state.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    pipes, processes, answers = [], [], {}
    for rank in range(case.source_ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(case, rank, theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)
    for rank, pipe in enumerate(pipes):
        answers[rank] = pipe.recv()
    cache, worker, _ = make_side(case, Shard(), "d", case.devices[1], answers)
    ids = list(range(1, case.num_used + 1))
    times: list[float] = []
    inside: list[dict[str, float]] = []
    for repeat in range(case.shape.repeats):
        there = random.Random(repeat).sample(ids, case.num_used)
        here = random.Random(-1).sample(ids, case.num_used)
        for pipe in pipes:
            pipe.send((repeat, there))
        for pipe in pipes:
            pipe.recv()
        receive = receive_of(case, repeat, there, here)
        time.sleep(0.02)
        begin = time.perf_counter()
        worker.submit(NixlStepMetadata(receives=[receive]))
        wait_for(worker, f"r{repeat}")
        times.append(time.perf_counter() - begin)
        inside.append(worker.take_stats() or {})
    check_bytes(case, cache, there, here)
    worker.close()
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    return report(case, times, inside)


def report(case: Case, times: list[float], inside: list[dict[str, float]]) -> dict[str, Any]:
    prefix = "transfers_by_"
    ways = [next(key for key in stats if key.startswith(prefix))[len(prefix) :] for stats in inside]
    # Of the last run: by then the plan has seen how the ways do here.
    way, last = ways[-1], inside[-1]
    best = min(range(len(times)), key=lambda i: times[i])
    costs = HOST_COPIES if case.devices[0] == "cpu" else NVLINK
    size = case.num_used * LAYERS * case.shape.page_bytes
    direct = case.num_used * (1 if case.layout[0] == "B" else LAYERS) * case.source_ranks
    chunk = case.slot_bytes or costs.slot_bytes
    predicted = route(costs, direct, size, chunk, mapped=way == "mapped")
    return {
        "layout": case.layout,
        "asked": case.path,
        "source_ranks": case.source_ranks,
        "way": way,
        "ways": ways,
        "regions": len(regions(case.config(case.source_ranks))),
        "descriptors": int(last.get("transfer_descriptors", 0)),
        "predicted_ms": round(predicted.seconds.get(way, 0) * 1e3, 2),
        "ms": round(times[best] * 1e3, 2),
        "ms_in_the_transfer_thread": round(inside[best]["transfer_seconds"] * 1e3, 2),
        "ms_until_posted": round(inside[best]["transfer_post_seconds"] * 1e3, 2),
        "ms_of_the_check": round(inside[best]["transfer_check_seconds"] * 1e3, 2),
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
    parser.add_argument("--source-ranks", type=int, default=1, help="of the side that is read")
    parser.add_argument("--slots", type=int, help="of the staging rings")
    parser.add_argument("--slot-bytes", type=int)
    parser.add_argument("--threads", type=int, default=NixlSettings().num_threads, help="of NIXL")
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
            found.append(
                measure(
                    Case(
                        devices,
                        layout,
                        path,
                        shape,
                        options.source_ranks,
                        options.slots,
                        options.slot_bytes,
                        options.threads,
                    )
                )
            )
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
