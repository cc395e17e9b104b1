"""The default model, whole: it answers in English, in text and in chat."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def smollm2() -> Iterator[LLM]:
    # float32: in bfloat16 rounding decides between this model's near ties.
    with LLM(
        "smollm2", dtype="float32", max_model_len=1024, kv_cache_memory_bytes=128 << 20
    ) as llm:
        yield llm


def test_it_answers_in_english(smollm2: LLM) -> None:
    (output,) = smollm2.generate("The capital of France is", GREEDY, use_tqdm=False)
    assert "Paris" in output.outputs[0].text


def test_it_chats_and_stops_by_itself(smollm2: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    (output,) = smollm2.chat(messages, GREEDY, use_tqdm=False)
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"
    assert "<|im_end|>" not in output.outputs[0].text


def test_stop_string_and_bad_words(smollm2: LLM) -> None:
    prompt = "The capital of France is"
    params = SamplingParams(temperature=0, max_tokens=24, stop=["aris"])
    (output,) = smollm2.generate(prompt, params, use_tqdm=False)
    assert output.outputs[0].text.endswith("P")
    assert output.outputs[0].stop_reason == "aris"
    params = SamplingParams(temperature=0, max_tokens=24, bad_words=["Paris"])
    (output,) = smollm2.generate(prompt, params, use_tqdm=False)
    assert "Paris" not in output.outputs[0].text


def test_json_by_schema(smollm2: LLM) -> None:
    import json

    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "large": {"type": "boolean"}},
        "required": ["city", "large"],
        "additionalProperties": False,
    }
    params = SamplingParams(
        temperature=0, max_tokens=64, structured_outputs=StructuredOutputsParams(json=schema)
    )
    messages = [{"role": "user", "content": "Name a city, as JSON."}]
    (output,) = smollm2.chat(messages, params, use_tqdm=False)
    answer = json.loads(output.outputs[0].text)
    assert set(answer) == {"city", "large"}


def test_emoji_arrive_whole(smollm2: LLM) -> None:
    params = SamplingParams(
        temperature=0,
        max_tokens=24,
        structured_outputs=StructuredOutputsParams(regex="😀🎉 (日本|Größe)"),
    )
    (output,) = smollm2.generate("Emoji:", params, use_tqdm=False)
    assert output.outputs[0].text in ("😀🎉 日本", "😀🎉 Größe")
