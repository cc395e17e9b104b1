"""``AsyncLLM``: streams, aborts, slow readers, limits and a dying engine."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.engine.conftest import ENGINE_ARGS
from vllm import AsyncEngineArgs, SamplingParams
from vllm.errors import ConfigError, EngineDeadError, QueueFullError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.reader import get_metrics_snapshot

pytestmark = pytest.mark.asyncio(loop_scope="module")


# Room for requests that have not ended by the time that a test goes on, however late it does.
LONG = 600
ENDLESS = 3900
LONG_ARGS = {**ENGINE_ARGS, "hf_overrides": {"max_position_embeddings": 4000}}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engine(tiny_model: Path) -> AsyncIterator[AsyncLLM]:
    args = AsyncEngineArgs(
        model=str(tiny_model), scheduling_policy="priority", max_num_queued_reqs=64, **LONG_ARGS
    )
    engine = AsyncLLM.from_engine_args(args)
    yield engine
    engine.shutdown()


def params(kind: RequestOutputKind = RequestOutputKind.DELTA, **kwargs: Any) -> SamplingParams:
    defaults = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    return SamplingParams(output_kind=kind, **{**defaults, **kwargs})


async def collect(engine: AsyncLLM, prompt: Any, own: SamplingParams, **kwargs: Any) -> Any:
    return [output async for output in engine.generate(prompt, own, "r", **kwargs)]


async def test_deltas_add_up_to_the_whole(engine: AsyncLLM) -> None:
    long = {"max_tokens": LONG}
    deltas = await collect(engine, "The quick", params(logprobs=1, **long))
    cumulative = await collect(engine, "The quick", params(RequestOutputKind.CUMULATIVE, **long))
    (final,) = await collect(engine, "The quick", params(RequestOutputKind.FINAL_ONLY, **long))
    assert len(deltas) > 5
    text = final.outputs[0].text
    assert "".join(out.outputs[0].text for out in deltas) == text
    assert cumulative[-1].outputs[0].text == text
    assert all(text.startswith(out.outputs[0].text) for out in cumulative)
    assert [i for out in deltas for i in out.outputs[0].token_ids] == final.outputs[0].token_ids
    assert sum(len(out.outputs[0].logprobs) for out in deltas) == LONG
    assert [out.finished for out in deltas] == [False] * (len(deltas) - 1) + [True]
    assert deltas[-1].outputs[0].finish_reason == "length"


async def test_stream_interval_thins_the_stream(engine: AsyncLLM) -> None:
    outputs = await collect(engine, "The quick", params(stream_interval=10))
    seen = list(itertools.accumulate(len(out.outputs[0].token_ids) for out in outputs))
    # A reader that comes late finds several outputs as one.
    assert set(seen) <= {1, 11, 21, 24} and seen[-1] == 24


async def test_many_streams_at_once_with_one_id(engine: AsyncLLM) -> None:
    prompts = [[10 + i, 20, 30] for i in range(40)]
    alone = [await collect(engine, prompt, params()) for prompt in prompts[:4]]
    together = await asyncio.gather(*(collect(engine, prompt, params()) for prompt in prompts))

    def ids(outputs: list[RequestOutput]) -> list[int]:
        return [token for out in outputs for token in out.outputs[0].token_ids]

    assert [ids(outputs) for outputs in together[:4]] == [ids(outputs) for outputs in alone]
    assert all(len(ids(outputs)) == 24 for outputs in together)


async def test_n_streams_each_sequence_and_ends_once(engine: AsyncLLM) -> None:
    own = params(n=3, temperature=1.0, seed=5)
    outputs = await collect(engine, "The quick", own)
    texts = ["", "", ""]
    for output in outputs:
        for completion in output.outputs:
            texts[completion.index] += completion.text
    assert [out.finished for out in outputs] == [False] * (len(outputs) - 1) + [True]
    own = params(RequestOutputKind.FINAL_ONLY, n=3, temperature=1.0, seed=5)
    (final,) = await collect(engine, "The quick", own)
    assert [completion.text for completion in final.outputs] == texts


async def test_a_slow_reader_gets_merged_outputs(engine: AsyncLLM) -> None:
    stream = engine.generate("The quick", params(logprobs=0, max_tokens=LONG), "slow")
    first = await anext(stream)
    while engine.get_num_unfinished_requests():
        await asyncio.sleep(0.01)
    rest = [output async for output in stream]
    assert len(rest) == 1
    assert rest[0].finished
    tokens = first.outputs[0].token_ids + rest[0].outputs[0].token_ids
    assert len(tokens) == LONG
    assert len(rest[0].outputs[0].logprobs) == len(rest[0].outputs[0].token_ids)


async def test_leaving_a_stream_gives_its_blocks_back(engine: AsyncLLM) -> None:
    for count in (1, 3):
        stream = engine.generate([9] * 100, params(max_tokens=ENDLESS - 100, n=count), "left")
        await anext(stream)
        await stream.aclose()
    task = asyncio.create_task(collect(engine, [9] * 100, params(max_tokens=ENDLESS - 100)))
    while not engine.get_num_unfinished_requests():
        await asyncio.sleep(0)
    task.cancel()
    assert engine.get_num_unfinished_requests() <= 1
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.get_num_unfinished_requests() == 0
    # Only an engine without requests gives all its blocks back to be forgotten.
    async with asyncio.timeout(60):
        while not await engine.reset_prefix_cache():
            await asyncio.sleep(0.01)
    await engine.client.call_utility("check_integrity")
    assert await engine.reset_prefix_cache()


async def test_abort_by_id_ends_the_stream(engine: AsyncLLM) -> None:
    stream = engine.generate("x", params(max_tokens=ENDLESS), "by-id")
    outputs = [await anext(stream)]
    await engine.abort("by-id")
    outputs += [output async for output in stream]
    assert outputs[-1].finished
    assert outputs[-1].outputs[0].finish_reason == "abort"
    await engine.abort(["by-id", "unknown"])


async def test_wrong_requests_raise_and_leave_nothing(engine: AsyncLLM) -> None:
    with pytest.raises(VLLMValidationError, match="max_model_len"):
        await collect(engine, [5] * 5000, params())
    with pytest.raises(VLLMValidationError, match="--kv-transfer-config"):
        await collect(engine, "x", params(), kv_transfer_params={"do_remote_decode": True})
    assert engine.get_num_unfinished_requests() == 0


async def test_what_slipped_past_the_front_end_ends_one_request_only(engine: AsyncLLM) -> None:
    bad = params()
    bad.top_p = 7.0
    good = asyncio.create_task(collect(engine, "The quick", params()))
    with pytest.raises(VLLMValidationError, match="top_p"):
        await collect(engine, "x", bad)
    assert (await good)[-1].finished


async def test_the_waiting_queue_has_a_limit_and_priority_reorders(engine: AsyncLLM) -> None:
    await engine.pause_generation()
    order: list[int] = []

    async def run(index: int) -> None:
        own = params(RequestOutputKind.FINAL_ONLY, max_tokens=8)
        await collect(engine, "x", own, priority=-index)
        order.append(index)

    tasks = [asyncio.create_task(run(index)) for index in range(64)]
    while engine.get_num_unfinished_requests() < 64:
        await asyncio.sleep(0)
    assert await engine.is_paused()
    with pytest.raises(QueueFullError):
        await collect(engine, "x", params())
    await engine.resume_generation()
    await asyncio.gather(*tasks)
    # The engine runs 8 at a time: the last come are the most urgent, and so the first served.
    assert set(order[:8]) == set(range(56, 64))
    assert set(order[-8:]) == set(range(8))


def gauge(name: str) -> float:
    (value,) = [metric.value for metric in get_metrics_snapshot() if metric.name == f"vllm:{name}"]
    return value


async def test_pausing_ends_holds_or_awaits_what_is_in_flight(engine: AsyncLLM) -> None:
    own = params(max_tokens=LONG)

    async def begin() -> asyncio.Task[Any]:
        task = asyncio.create_task(collect(engine, "The quick", own))
        while await engine.client.call_utility("get_request_counts") != [1, 0]:
            await asyncio.sleep(0)
        return task

    aborted = await begin()
    await engine.pause_generation()
    assert (await aborted)[-1].outputs[0].finish_reason == "abort"
    # No step follows while the engine is paused, and yet nothing runs any more.
    assert gauge("num_requests_running") == gauge("kv_cache_usage_perc") == 0
    waiting = asyncio.create_task(collect(engine, "x", params()))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await engine.resume_generation()
    assert (await waiting)[-1].finished

    held = await begin()
    await engine.pause_generation(mode="keep")
    assert not held.done()
    await engine.resume_generation()
    assert (await held)[-1].outputs[0].finish_reason == "length"

    finished = await begin()
    await engine.pause_generation(mode="wait")
    assert (await finished)[-1].outputs[0].finish_reason == "length"
    await engine.resume_generation()
    with pytest.raises(VLLMValidationError, match="abort, wait or keep"):
        await engine.pause_generation(mode="stop")


async def test_drain_waits_for_what_is_in_flight(engine: AsyncLLM) -> None:
    assert await engine.wait_for_requests_to_drain(0.1)
    task = asyncio.create_task(collect(engine, "x", params(max_tokens=LONG)))
    while not engine.get_num_unfinished_requests():
        await asyncio.sleep(0)
    assert not await engine.wait_for_requests_to_drain(0.001)
    assert await engine.wait_for_requests_to_drain(60)
    assert (await task)[-1].finished


async def test_facts_and_metrics(engine: AsyncLLM) -> None:
    from prometheus_client import generate_latest

    assert engine.facts.num_gpu_blocks > 1
    assert engine.facts.startup_seconds
    await engine.check_health()
    assert engine.is_running
    assert not engine.errored
    text = generate_latest().decode()
    assert f'num_gpu_blocks="{engine.facts.num_gpu_blocks}"' in text
    assert "vllm:generation_tokens_total" in text
    await engine.do_log_stats()


async def test_a_dead_engine_fails_all_requests(tiny_model: Path) -> None:
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(tiny_model), **LONG_ARGS))
    own = params(max_tokens=ENDLESS)
    tasks = [asyncio.create_task(collect(engine, "x", own)) for _ in range(3)]
    while engine.get_num_unfinished_requests() < 3:
        await asyncio.sleep(0)
    os.kill(engine.client.pid, signal.SIGKILL)
    for task in tasks:
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await task
    with pytest.raises(EngineDeadError):
        await collect(engine, "x", own)
    with pytest.raises(EngineDeadError):
        await engine.check_health()
    with pytest.raises(EngineDeadError):
        await engine.reset_prefix_cache()
    assert engine.errored
    assert isinstance(engine.dead_error, EngineDeadError)
    engine.shutdown()
    engine.shutdown()


async def test_in_process_mode_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(ConfigError, match="VLLM_ENABLE_V1_MULTIPROCESSING"):
        AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(tiny_model)))


async def test_the_front_end_imports_no_torch() -> None:
    code = (
        "import sys; import vllm.v1.engine.async_llm, vllm.entrypoints.llm; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
