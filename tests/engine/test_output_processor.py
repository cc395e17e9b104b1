"""Engine outputs become ``RequestOutput``: merging, sequences of one request, errors, times."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vllm import SamplingParams
from vllm.errors import EngineGenerateError, QueueFullError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.output_processor import OutputProcessor, OutputQueue, error_of
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.stats import IterationStats

DELTA, CUMULATIVE = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE


def add(
    processor: OutputProcessor,
    n: int = 1,
    queue: OutputQueue | None = None,
    user_id: str = "user",
    **kwargs: Any,
) -> list[str]:
    params = SamplingParams(n=n, **kwargs)
    request = EngineCoreRequest(f"{user_id}-0", [5, 6], params, arrival_time=100.0)
    if n == 1:
        processor.add_request(user_id, request, "ab", queue=queue)
        return [request.request_id]
    parent = ParentRequest(request.request_id, params)
    children = [parent.child_request(request, index) for index in range(n)]
    for index, child in enumerate(children):
        processor.add_request(user_id, child, "ab", parent=parent, index=index, queue=queue)
    return [child.request_id for child in children]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text).ids


def test_a_stop_string_ends_the_request_here_and_in_the_engine(tokenizer: Any) -> None:
    processor = OutputProcessor(tokenizer)
    (engine_id,) = add(processor, stop=["X"])
    output = EngineCoreOutput(engine_id, ids_of(tokenizer, "aXb"))
    processed = processor.process_outputs([output])
    (request_output,) = processed.request_outputs
    assert request_output.request_id == "user"
    assert request_output.outputs[0].text == "a"
    assert request_output.outputs[0].stop_reason == "X"
    assert request_output.outputs[0].token_ids == ids_of(tokenizer, "aX")
    assert processed.reqs_to_abort == [engine_id]
    # Tokens that were under way already come to nobody.
    assert processor.process_outputs([output]).request_outputs == []
    assert not processor.has_unfinished_requests()


def test_cumulative_shows_all_sequences(tokenizer: Any) -> None:
    processor = OutputProcessor(tokenizer)
    first, second = add(processor, n=2, output_kind=CUMULATIVE)
    outputs = [
        EngineCoreOutput(first, ids_of(tokenizer, "a")),
        EngineCoreOutput(second, ids_of(tokenizer, "b")),
        EngineCoreOutput(second, ids_of(tokenizer, "c"), finish_reason=FinishReason.LENGTH),
        EngineCoreOutput(first, ids_of(tokenizer, "d"), finish_reason=FinishReason.LENGTH),
    ]
    shown = processor.process_outputs(outputs).request_outputs
    assert [[c.text for c in out.outputs] for out in shown] == [
        ["a"],
        ["a", "b"],
        ["a", "bc"],
        ["ad", "bc"],
    ]
    assert [out.finished for out in shown] == [False, False, False, True]


def test_one_failed_sequence_ends_its_request_once(tokenizer: Any) -> None:
    async def run() -> None:
        processor = OutputProcessor(tokenizer)
        queue = OutputQueue(DELTA)
        first, second = add(processor, n=2, queue=queue, output_kind=DELTA)
        stats = IterationStats()
        failure = EngineCoreOutput(
            first, [], finish_reason=FinishReason.ERROR, error="full", error_type="QueueFullError"
        )
        processed = processor.process_outputs([failure, EngineCoreOutput(second, [5])], stats=stats)
        assert processed.reqs_to_abort == [second]
        assert processed.request_outputs == []
        with pytest.raises(QueueFullError, match="full"):
            await queue.get()
        assert len(processor) == 0
        assert stats.rejections == {"max_num_queued_reqs": 1}

    asyncio.run(run())


def test_unknown_errors_are_generate_errors() -> None:
    for error_type in (None, "NoSuchError", "__all__"):
        output = EngineCoreOutput("a", [], error="why", error_type=error_type)
        assert isinstance(error_of(output), EngineGenerateError)


def completion(text: str, ids: list[int], index: int = 0, **kwargs: Any) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        prompt=None,
        prompt_token_ids=[1],
        prompt_logprobs=None,
        outputs=[CompletionOutput(index=index, text=text, token_ids=ids, logprobs=[{}])],
        finished=False,
        **kwargs,
    )


@pytest.mark.parametrize(
    ("kind", "texts", "ids"),
    [(DELTA, ["ab", "x"], [1, 2]), (CUMULATIVE, ["b", "x"], [2])],
)
def test_a_queue_merges_what_is_not_fetched(
    kind: RequestOutputKind, texts: list[str], ids: list[int]
) -> None:
    async def run() -> None:
        queue = OutputQueue(kind)
        assert queue.get_nowait() is None
        queue.put(completion("a", [1]))
        queue.put(completion("x", [9], index=1))
        queue.put(completion("b", [2], num_cached_tokens=7))
        output = await queue.get()
        assert [c.text for c in output.outputs] == texts
        assert output.outputs[0].token_ids == ids
        assert len(output.outputs[0].logprobs or []) == len(ids)
        assert output.num_cached_tokens == 7
        assert queue.get_nowait() is None

    asyncio.run(run())


def test_an_error_replaces_what_waits() -> None:
    async def run() -> None:
        queue = OutputQueue(DELTA)
        queue.put(completion("a", [1]))
        queue.put(EngineGenerateError("bad"))
        with pytest.raises(EngineGenerateError):
            await queue.get()

    asyncio.run(run())


def test_abort_tells_the_queue_and_the_engine(tokenizer: Any) -> None:
    async def run() -> None:
        processor = OutputProcessor(tokenizer)
        queue = OutputQueue(DELTA)
        engine_ids = add(processor, n=2, queue=queue, output_kind=DELTA)
        processor.process_outputs([EngineCoreOutput(engine_ids[0], ids_of(tokenizer, "a"))])
        known, rest = processor.abort_requests(processor.engine_ids_of(["user", "other"]))
        assert sorted(known) == engine_ids
        assert rest == []
        output = await queue.get()
        assert output.finished
        assert {c.finish_reason for c in output.outputs} == {"abort"}
        assert processor.abort_requests(engine_ids) == ([], [])

    asyncio.run(run())


def test_prompt_tokens_are_counted_by_where_their_kv_came_from(tokenizer: Any) -> None:
    stats = IterationStats()
    processor = OutputProcessor(tokenizer)
    (engine_id,) = add(processor, max_tokens=3)
    first = EngineCoreOutput(engine_id, [70], num_cached_tokens=2, num_external_tokens=1)
    processor.process_outputs([first], 1.0, stats)
    sources = stats.prompt_tokens
    assert (sources.external_kv_transfer, sources.local_cache_hit) == (1, 1)
    assert sources.local_compute == 0


def test_times_of_a_request(tokenizer: Any) -> None:
    processor = OutputProcessor(tokenizer)
    (engine_id,) = add(processor, max_tokens=3)
    events = [
        EngineCoreEvent(EngineCoreEventType.QUEUED, 10.0),
        EngineCoreEvent(EngineCoreEventType.SCHEDULED, 11.0),
    ]
    steps = [
        (13.0, EngineCoreOutput(engine_id, [70], events=events, num_cached_tokens=1)),
        (14.0, EngineCoreOutput(engine_id, [71])),
        (16.0, EngineCoreOutput(engine_id, [72], finish_reason=FinishReason.LENGTH)),
    ]
    collected = []
    for timestamp, output in steps:
        stats = IterationStats(now=90.0 + timestamp)
        processor.process_outputs([output], timestamp, stats)
        collected.append(stats)
    assert collected[0].time_to_first_tokens == [3.0]
    assert collected[0].num_prompt_tokens == 2
    assert collected[0].prompt_tokens.local_cache_hit == 1
    assert collected[0].prompt_tokens.local_compute == 1
    assert collected[1].inter_token_latencies == [1.0]
    (finished,) = collected[2].finished_requests
    assert finished.queued_time == 1.0
    assert finished.prefill_time == 2.0
    assert finished.decode_time == 3.0
    assert finished.inference_time == 5.0
    assert finished.e2e_latency == 6.0
    assert finished.mean_time_per_output_token == 1.5
    assert finished.num_generation_tokens == 3
    assert collected[2].n_params == [1]
    assert collected[2].max_num_generation_tokens == [3]
