"""Host cost of the KV cache core: hashing, prefix lookup, blocks, scheduler steps. One core.

    python benchmarks/kv_cache/bench_core.py [--save] [--repeat N]

The first figures are the best of N runs, those of steps the median of 32 N steps. The last column
is the aim. ``--save`` writes results/cpu_kv_core.json.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import machine

BLOCK = 16
PREFIX_TOKENS = 100_000
RUNNING = 256


def best(repeat: int, run: Callable[[], Any], prepare: Callable[[], Any] | None = None) -> float:
    """Seconds of the fastest of ``repeat`` calls of ``run``."""
    fastest = float("inf")
    for _ in range(repeat):
        if prepare is not None:
            prepare()
        start = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def make_request(name: str, prompt: list[int], max_tokens: int = 1 << 20) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def make_scheduler(num_blocks: int, max_num_batched_tokens: int, max_model_len: int) -> Scheduler:
    hf_config = SimpleNamespace(vocab_size=50_000)
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=8, head_size=128, dtype="bfloat16")
    return Scheduler(
        VllmConfig(
            model_config=ModelConfig(
                model="none",
                model_path="none",
                tokenizer="none",
                hf_config=hf_config,  # type: ignore[arg-type]
                hf_text_config=hf_config,  # type: ignore[arg-type]
                architecture="none",
                dtype_name="bfloat16",
                max_model_len=max_model_len,
            ),
            scheduler_config=SchedulerConfig(
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_seqs=RUNNING,
                max_model_len=max_model_len,
            ),
            cache_config=CacheConfig(enable_prefix_caching=True),
        ),
        KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        None,
        BLOCK,
    )


def measure_hashing(repeat: int) -> dict[str, float]:
    """Million tokens a second, from a list of ints to the list of block hashes."""
    tokens = [random.randrange(50_000) for _ in range(PREFIX_TOKENS)]
    request = make_request("r", tokens)
    rates = {}
    for name in ("sha256", "xxhash", "sha256_cbor"):
        hasher = get_request_block_hasher(BLOCK, name)
        seconds = best(repeat, lambda hasher=hasher: hasher(request))  # type: ignore[misc]
        rates[name] = PREFIX_TOKENS / seconds / 1e6
    return rates


def measure_blocks(repeat: int) -> dict[str, float]:
    """Nanoseconds a block to take 10,000 of them and to give them back, findable or not."""
    count = 10_000
    request = make_request("r", [1] * (count * BLOCK))
    request.block_hashes = [i.to_bytes(32, "little") for i in range(count)]
    figures = {}
    for findable in (False, True):
        pool = BlockPool(count + 1, enable_caching=True)
        taking = giving = float("inf")
        for run in range(repeat + 1):
            start = time.perf_counter()
            blocks = pool.get_new_blocks(count)
            middle = time.perf_counter()
            if findable:
                pool.cache_full_blocks(request, blocks, 0, count, BLOCK, 0)
            blocks.reverse()
            before = time.perf_counter()
            pool.free_blocks(blocks)
            giving = min(giving, time.perf_counter() - before)
            # From the second run on, findable blocks have to be forgotten when they are taken.
            if run:
                taking = min(taking, middle - start)
        kind = "findable" if findable else "fresh"
        figures[f"take {kind}"] = taking / count * 1e9
        figures[f"give back {kind}"] = giving / count * 1e9
    return figures


def measure_prefix(repeat: int) -> dict[str, float]:
    """Milliseconds to look up, and to take, a cached prefix of 100,000 tokens."""
    scheduler = make_scheduler(8_000, 1 << 17, 1 << 17)
    manager = scheduler.kv_cache_manager
    tokens = [random.randrange(50_000) for _ in range(PREFIX_TOKENS + 1)]

    def fresh() -> Request:
        request = make_request("r", tokens)
        request.set_block_hasher(scheduler.block_hasher)  # type: ignore[arg-type]
        return request

    first = fresh()
    assert manager.allocate_slots(first, first.num_tokens) is not None
    manager.free(first)
    request = fresh()
    lookup = best(repeat, lambda: manager.get_computed_blocks(request))
    blocks, num_tokens = manager.get_computed_blocks(request)
    assert num_tokens == PREFIX_TOKENS
    taking = best(
        repeat,
        lambda: manager.allocate_slots(request, 1, num_tokens, blocks),
        lambda: manager.free(request),
    )
    return {"lookup": lookup * 1e3, "take": taking * 1e3}


def measure_steps(repeat: int) -> dict[str, float]:
    """Microseconds of ``schedule`` and ``update_from_output`` with 256 requests decoding."""
    scheduler = make_scheduler(RUNNING * 64, 1 << 17, 1 << 14)
    for i in range(RUNNING):
        # Lengths differ, so that each step some requests begin a block.
        prompt = [random.randrange(50_000) for _ in range(200 + i % BLOCK)]
        scheduler.add_request(make_request(f"request-{i}", prompt))

    scheduling: list[float] = []
    updating: list[float] = []

    def run_steps(count: int) -> None:
        for _ in range(count):
            start = time.perf_counter()
            output = scheduler.schedule()
            scheduling.append(time.perf_counter() - start)
            ids = list(output.num_scheduled_tokens)
            result = ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={},
                sampled_token_ids=[[random.randrange(50_000)] for _ in ids],
            )
            start = time.perf_counter()
            scheduler.update_from_output(output, result)
            updating.append(time.perf_counter() - start)

    run_steps(2)
    gc.collect()
    gc.freeze()
    scheduling.clear()
    updating.clear()
    run_steps(repeat * 32)
    return {
        "schedule": statistics.median(scheduling) * 1e6,
        "update": statistics.median(updating) * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="keep the figures under results/")
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args()
    random.seed(0)
    hashing = measure_hashing(args.repeat)
    blocks = measure_blocks(args.repeat)
    prefix = measure_prefix(args.repeat)
    steps = measure_steps(args.repeat)
    rows: list[tuple[str, float, str, str]] = [
        *(
            (f"hash, {name}", rate, "Mtok/s", ">= 25" if name != "sha256_cbor" else "")
            for name, rate in hashing.items()
        ),
        *((f"block, {name}", value, "ns", "<= 300") for name, value in blocks.items()),
        ("prefix of 100k tokens, look up", prefix["lookup"], "ms", "<= 2"),
        ("prefix of 100k tokens, take", prefix["take"], "ms", ""),
        (f"{RUNNING} running, schedule()", steps["schedule"], "us", "<= 150"),
        (f"{RUNNING} running, update_from_output()", steps["update"], "us", ""),
    ]
    identity = machine.identity()
    print(", ".join(f"{name} {value}" for name, value in identity.items()), f"block size {BLOCK}")
    for name, value, unit, target in rows:
        print(f"{name:42s} {value:10.2f} {unit:7s} {target}")
    if args.save:
        figures = {
            name: {"value": round(value, 2), "unit": unit, "aim": target}
            for name, value, unit, target in rows
        }
        command = f"python benchmarks/kv_cache/bench_core.py --repeat {args.repeat}"
        machine.save("cpu_kv_core", command, identity | {"block_size": BLOCK} | figures)


if __name__ == "__main__":
    main()
