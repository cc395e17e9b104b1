"""A minute and a half of whatever clients do: everything ends, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engine.conftest import ENGINE_ARGS, VOCAB_SIZE
from vllm import AsyncEngineArgs, SamplingParams
from vllm.errors import QueueFullError
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM

SECONDS = 90
WARM_UP_SECONDS = 25
REQUESTS_PER_SECOND = 12
MIB = 1 << 20


def random_params(generator: random.Random) -> SamplingParams:
    options: dict[str, Any] = {
        "max_tokens": generator.choice((1, 8, 40, 120)),
        "temperature": generator.choice((0.0, 0.8)),
        "ignore_eos": generator.random() < 0.7,
        "output_kind": generator.choice(list(RequestOutputKind)),
    }
    kind = generator.randrange(6)
    if kind == 0:
        options |= {"n": 2, "temperature": 0.9, "seed": 5}
    elif kind == 1:
        options["logprobs"] = 3
    elif kind == 2:
        options["prompt_logprobs"] = 1
    elif kind == 3:
        options |= {"repetition_penalty": 1.2, "top_k": 20, "top_p": 0.9}
    elif kind == 4:
        options["structured_outputs"] = StructuredOutputsParams(regex="[a-z]{4,30}")
    return SamplingParams(**options)


def random_prompt(generator: random.Random) -> list[int]:
    shared = [7] * generator.choice((0, 0, 32, 64))
    length = generator.choice((1, 5, 30, 90))
    return shared + [generator.randrange(4, VOCAB_SIZE) for _ in range(length)]


async def run_one(engine: AsyncLLM, name: str, generator: random.Random) -> str:
    """One client; what became of its request."""
    ends_after = generator.choice((None, None, None, 1, 5))
    ends_in = generator.choice((None, None, None, 0.05, 0.5))
    stream = engine.generate(
        random_prompt(generator),
        random_params(generator),
        name,
        priority=generator.randrange(3),
    )
    count = 0
    try:
        async with asyncio.timeout(ends_in), aclosing(stream):
            async for output in stream:
                count += 1
                if output.finished:
                    return "finished"
                if count == ends_after:
                    return "left"
    except TimeoutError:
        return "timed out"
    except QueueFullError:
        return "refused"
    raise AssertionError(f"request {name} ended without a last output")


@pytest.mark.slow
async def test_every_request_ends_and_the_pool_is_as_it_was(tiny_model: Path) -> None:
    args = AsyncEngineArgs(
        model=str(tiny_model),
        **{
            **ENGINE_ARGS,
            "scheduling_policy": "priority",
            "max_num_queued_reqs": 40,
            # Room for the longest request and little more: some are preempted.
            "num_gpu_blocks_override": 20,
            "max_num_batched_tokens": 64,
        },
    )
    engine = AsyncLLM.from_engine_args(args)
    processes = [psutil.Process(), psutil.Process(engine.client.pid)]
    generator = random.Random(11)
    tasks: list[asyncio.Task[str]] = []
    loop = asyncio.get_running_loop()
    begin = loop.time()
    warm: list[int] = []
    try:
        while (elapsed := loop.time() - begin) < SECONDS:
            if elapsed > WARM_UP_SECONDS and not warm:
                warm = [process.memory_info().rss for process in processes]
            own = random.Random(generator.random())
            tasks.append(asyncio.create_task(run_one(engine, f"r{len(tasks) % 50}", own)))
            await asyncio.sleep(generator.expovariate(REQUESTS_PER_SECOND))
        async with asyncio.timeout(60):
            results = Counter(await asyncio.gather(*tasks))
            await engine.wait_for_requests_to_drain()
            while await engine.client.call_utility("get_request_counts") != [0, 0]:
                await asyncio.sleep(0.05)
        assert results["finished"] > 100, results
        assert results["left"] > 20, results
        assert results["timed out"] > 20, results
        await engine.client.call_utility("check_integrity")
        # Only where no block is held.
        assert await engine.reset_prefix_cache()
        counters = engine.stat_loggers.prometheus
        assert counters._preemptions._value.get() > 0
        assert counters._running._value.get() == 0
        for process, before in zip(processes, warm, strict=True):
            growth = process.memory_info().rss - before
            assert growth < max(8 * MIB, 0.02 * before), (process, growth / MIB)
    finally:
        engine.shutdown()
