"""What the input processor fills in; what it refuses is tested through ``LLM``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import EOS
from vllm import EngineArgs, SamplingParams
from vllm.errors import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor, TokenizedPrompt


@pytest.fixture(scope="module")
def processor(tiny_model: Path, tokenizer: Any) -> InputProcessor:
    config = EngineArgs(model=str(tiny_model)).create_engine_config()
    return InputProcessor(config, tokenizer)


def test_params_of_the_caller_are_not_changed(processor: InputProcessor) -> None:
    params = SamplingParams(stop_token_ids=[9], max_tokens=None, bad_words=["fox"])
    before = repr(params)
    request, text = processor.process("r", "The quick", params)
    assert repr(params) == before
    assert text == "The quick"
    assert request.sampling_params.max_tokens == 256 - len(request.prompt_token_ids)


def test_eos_ids_come_from_tokenizer_and_generation_config(processor: InputProcessor) -> None:
    def complete(**kwargs: Any) -> SamplingParams:
        return processor.process("r", [5], SamplingParams(**kwargs))[0].sampling_params

    params = complete(stop_token_ids=[9])
    assert params.eos_token_id == EOS
    assert params.stop_token_ids == [9, 3]
    assert sorted(params.all_stop_token_ids) == [EOS, 3, 9]
    params = complete(stop_token_ids=[9], ignore_eos=True)
    assert params.stop_token_ids == [9]
    assert params.all_stop_token_ids == [9]


def test_bad_words_at_the_start_of_a_text_and_after_a_space(
    processor: InputProcessor, tokenizer: Any
) -> None:
    request, _ = processor.process("r", "x", SamplingParams(bad_words=["fox", " fox"]))
    ids = request.sampling_params.bad_words_token_ids
    assert ids is not None
    assert [tokenizer.decode(sequence) for sequence in ids] == ["fox", " fox"]


def test_half_a_character_is_no_prompt(processor: InputProcessor) -> None:
    with pytest.raises(VLLMValidationError, match="surrogate") as caught:
        processor.process("r", "a \ud800 b", SamplingParams())
    assert caught.value.parameter == "prompt"


def test_a_tokenised_prompt_goes_through_as_it_is(processor: InputProcessor) -> None:
    prompt = processor.tokenize("The quick")
    request, text = processor.process("r", prompt, SamplingParams())
    assert request.prompt_token_ids == prompt.token_ids
    assert text == "The quick"
    salted = TokenizedPrompt([5, 6], None, "salt")
    assert processor.process("r", salted, SamplingParams())[0].cache_salt == "salt"
    request, _ = processor.process("r", salted, SamplingParams(), cache_salt="own")
    assert request.cache_salt == "own"
    with pytest.raises(VLLMValidationError, match="cache_salt"):
        processor.process("r", [5], SamplingParams(), cache_salt="")


def test_numpy_ids_are_ids(processor: InputProcessor) -> None:
    import numpy as np

    request, _ = processor.process("r", np.array([5, 6, 7]), SamplingParams())  # type: ignore[arg-type]
    assert request.prompt_token_ids == [5, 6, 7]


def test_without_a_tokenizer_ids_only(tiny_model: Path) -> None:
    args = EngineArgs(model=str(tiny_model), skip_tokenizer_init=True)
    processor = InputProcessor(args.create_engine_config(), None)
    request, text = processor.process("r", [5, 6], SamplingParams())
    assert text is None
    # The first id of the generation config's list is the main one then.
    assert request.sampling_params.eos_token_id == EOS
    with pytest.raises(VLLMValidationError, match="--skip-tokenizer-init"):
        processor.process("r", "text", SamplingParams())
    with pytest.raises(VLLMValidationError, match="stop needs a tokenizer"):
        processor.process("r", [5], SamplingParams(stop=["x"]))


@pytest.mark.parametrize(
    "value", [10**30, "\ud800", {"\ud800": 1}, object(), [[[["\udfff"]]]], {1: {2: -(10**20)}}]
)
def test_what_cannot_travel_is_refused_by_name(processor: InputProcessor, value: Any) -> None:
    params = SamplingParams(extra_args={"x": value})
    with pytest.raises(VLLMValidationError, match="plain JSON") as caught:
        processor.process("r", "x", params)
    assert caught.value.parameter == "vllm_xargs"


def test_depth_is_bounded_and_ordinary_depth_passes(processor: InputProcessor) -> None:
    deep: Any = 1
    for _ in range(150):
        deep = {"a": [deep]} if isinstance(deep, int) else {"a": deep}
    processor.process("r", "x", SamplingParams(extra_args={"x": deep}))
    for _ in range(60):
        deep = [deep]
    with pytest.raises(VLLMValidationError, match="levels deep"):
        processor.process("r", "x", SamplingParams(extra_args={"x": deep}))
    with pytest.raises(VLLMValidationError, match="structured_outputs is nested"):
        params = SamplingParams(structured_outputs={"json": {"items": deep}})
        processor.process("r", "x", params)


@pytest.mark.parametrize("priority", [1 << 63, -(1 << 63) - 1])
def test_priorities_are_numbers_of_64_bits(processor: InputProcessor, priority: int) -> None:
    with pytest.raises(VLLMValidationError, match="64 bits"):
        processor.process("r", "x", SamplingParams(), priority=priority)


def test_params_of_another_class_are_refused(processor: InputProcessor) -> None:
    with pytest.raises(VLLMValidationError, match="must be SamplingParams, not dict"):
        processor.process("r", "x", {"n": 1})  # type: ignore[arg-type]


def test_custom_logits_processors_check_their_own_parameters(
    tiny_model: Path, tokenizer: Any
) -> None:
    args = EngineArgs(
        model=str(tiny_model), logits_processors=["tests.worker.processors:ForceNext"]
    )
    processor = InputProcessor(args.create_engine_config(), tokenizer)
    processor.process("r", [5, 6], SamplingParams(extra_args={"force": 3}))
    with pytest.raises(VLLMValidationError, match=r"extra_args\.force") as caught:
        processor.process("r", [5, 6], SamplingParams(extra_args={"force": "three"}))
    assert caught.value.parameter == "extra_args"
