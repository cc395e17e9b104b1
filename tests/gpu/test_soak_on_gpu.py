"""Five minutes of whatever clients do, on a GPU: all ends, nothing is left, memory stays."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import psutil
import pytest
import torch

from tests.engine.conftest import ENGINE_ARGS, make_tokenizer
from tests.engine.test_soak import run_one
from tests.gpu.conftest import SHAPE
from tests.worker.driver import make_hf_model
from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

pytestmark = pytest.mark.gpu

REQUESTS_PER_SECOND = 40
MIB = 1 << 20


@pytest.fixture
def soaked(tmp_path) -> str:
    make_hf_model(**SHAPE).save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    return str(tmp_path)


def device_memory(pid: int) -> int:
    """Bytes of the device that a process holds."""
    pynvml = pytest.importorskip("pynvml")
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
    held = {p.pid: p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    return held[pid]


def memory(engine: AsyncLLM) -> list[int]:
    """Of this process, of the engine's, and of the engine's on the device."""
    pids = [psutil.Process().pid, engine.client.pid]
    return [psutil.Process(pid).memory_info().rss for pid in pids] + [device_memory(pids[1])]


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_every_request_ends_and_memory_stays(soaked: str, request) -> None:
    seconds = request.config.getoption("--soak-seconds", 300.0)
    args = AsyncEngineArgs(
        model=soaked,
        **{
            **ENGINE_ARGS,
            "max_model_len": 320,
            "scheduling_policy": "priority",
            "max_num_seqs": 32,
            # Far less than so many requests want: many are preempted.
            "num_gpu_blocks_override": 24,
            "max_num_queued_reqs": 60,
            "block_size": 32,
            "max_num_batched_tokens": 256,
        },
    )
    engine = AsyncLLM.from_engine_args(args)
    generator = random.Random(11)
    running: set[asyncio.Task[str]] = set()
    results: Counter[str] = Counter()
    loop = asyncio.get_running_loop()
    begin, count, warm = loop.time(), 0, None
    try:
        while (elapsed := loop.time() - begin) < seconds:
            if warm is None and elapsed > 0.3 * seconds:
                warm = memory(engine)
            own = random.Random(generator.random())
            running.add(asyncio.create_task(run_one(engine, f"r{count % 500}", own)))
            count += 1
            await asyncio.sleep(generator.expovariate(REQUESTS_PER_SECOND))
            for task in [task for task in running if task.done()]:
                results[task.result()] += 1
                running.remove(task)
        async with asyncio.timeout(60):
            results.update(await asyncio.gather(*running))
            await engine.wait_for_requests_to_drain()
            while await engine.client.call_utility("get_request_counts") != [0, 0]:
                await asyncio.sleep(0.05)
        assert results.total() == count
        assert results["finished"] > 10 * seconds, results
        assert results["left"] > seconds, results
        assert results["timed out"] > 0.1 * seconds, results
        await engine.client.call_utility("check_integrity")
        # Only where no block is held.
        assert await engine.reset_prefix_cache()
        counters = engine.stat_loggers.prometheus
        assert counters._preemptions._value.get() > 20
        assert counters._running._value.get() == 0
        after = memory(engine)
        print(f"{count} requests, {dict(results)}, preemptions "
              f"{counters._preemptions._value.get()}, memory {warm} -> {after}")  # fmt: skip
        for before, now in zip(warm, after, strict=True):
            assert now - before < 0.01 * before, (warm, after)
    finally:
        engine.shutdown()
