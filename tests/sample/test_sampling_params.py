"""Every bad value is one clear line that names its field; good ones come to one form."""

import math

import msgspec
import pytest

from vllm.errors import UnsupportedError, VLLMValidationError
from vllm.sampling_params import (
    BeamSearchParams,
    SamplingParams,
    SamplingType,
    StructuredOutputsParams,
)

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", [0, -1, 1.0, True, "2", None, 10**9]),
        ("temperature", [-0.1, NAN, INF, "1", True, None, [1]]),
        ("top_p", [0, 0.0, -1, 1.01, NAN, INF, "1", False]),
        ("top_k", [-2, 1.5, NAN, "3", True]),
        ("min_p", [-0.1, 1.1, NAN, "0"]),
        ("presence_penalty", [-2.01, 2.01, NAN, -INF, "0"]),
        ("frequency_penalty", [-2.01, 2.01, NAN, INF, {}]),
        ("repetition_penalty", [0, -1, NAN, INF, "1"]),
        ("seed", [1.5, "1", NAN, True, 1 << 64]),
        ("max_tokens", [0, -1, 1.5, NAN, "3", True]),
        ("min_tokens", [-1, 17, 1.5, None, "0"]),
        ("logprobs", [-2, 1.5, "3", NAN]),
        ("prompt_logprobs", [-2, 0.5, "3"]),
        ("truncate_prompt_tokens", [0, -2, 1.5, "3"]),
        ("stream_interval", [0, -1, 1.5]),
        ("stop", [3, [3], [""], "", {"a": 1}, [None], "a\ud800"]),
        ("stop_token_ids", ["1", [1.5], [-1], 5, [True], [None]]),
        ("allowed_token_ids", [[], [-1], "12", 3]),
        ("bad_words", [[""], 5, [1]]),
        (
            "logit_bias",
            [[1], {"x": 1}, {-1: 1}, {1: NAN}, {1: INF}, {1: "a"}, {1.5: 1}, {"9" * 5000: 1}],
        ),
        ("ignore_eos", [1, "true", None]),
        ("detokenize", [0, None]),
        ("skip_special_tokens", ["yes"]),
        ("include_stop_str_in_output", [1]),
        ("skip_reading_prefix_cache", [1, "no"]),
        ("output_kind", [0, "delta"]),
        ("structured_outputs", ["json", 3, {"nothing": 1}, {}, {"json": {}, "regex": "a"}]),
        ("extra_args", [[], "x"]),
    ],
)
def test_a_bad_value_names_its_field(field, values):
    for value in values:
        with pytest.raises(VLLMValidationError) as caught:
            SamplingParams(**{field: value})
        assert caught.value.parameter == field, value
        assert field in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize("field", ["stop", "bad_words"])
def test_strings_that_are_searched_at_every_token_are_bounded(field):
    SamplingParams(**{field: [f"{i:08}" for i in range(4096)]})
    for value in ([f"s{i}" for i in range(4097)], "x" * 32_769):
        with pytest.raises(VLLMValidationError, match=f"{field} must be at most 4096 strings") as e:
            SamplingParams(**{field: value})
        assert e.value.parameter == field


def test_values_come_to_one_form():
    params = SamplingParams(
        stop="end",
        bad_words="no",
        top_k=-1,
        seed=-1,
        logprobs=True,
        prompt_logprobs=False,
        logit_bias={"7": 300, 8: -300},
        allowed_token_ids=(3, 3, 4),
        temperature=1,
        structured_outputs={"json_object": True},
    )
    assert params.stop == ["end"] and params.bad_words == ["no"]
    assert params.top_k == 0 and params.seed is None
    assert params.logprobs == 1 and params.prompt_logprobs is None
    assert params.logit_bias == {7: 100.0, 8: -100.0}
    assert params.allowed_token_ids == [3, 4]
    assert isinstance(params.temperature, float)
    assert params.structured_outputs == StructuredOutputsParams(json_object=True)


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature):
    params = SamplingParams(temperature=temperature, top_p=0.5, top_k=7, min_p=0.2, seed=3)
    assert params.sampling_type is SamplingType.GREEDY
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.0, 1.0, 0, 0.0)


def test_sampling_types():
    assert SamplingParams().sampling_type is SamplingType.RANDOM
    assert SamplingParams(seed=0).sampling_type is SamplingType.RANDOM_SEED


def test_edges_are_allowed():
    SamplingParams(top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2, min_tokens=16)
    SamplingParams(max_tokens=None, min_tokens=10**6, logprobs=-1, prompt_logprobs=0)
    SamplingParams(truncate_prompt_tokens=-1, stop=[], bad_words=[], stop_token_ids=[])


def test_fields_that_exclude_each_other():
    with pytest.raises(VLLMValidationError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)
    with pytest.raises(VLLMValidationError, match="prompt_logprobs"):
        SamplingParams(prompt_logprobs=1, skip_reading_prefix_cache=False)


def test_from_optional_takes_none_as_the_default():
    params = SamplingParams.from_optional(temperature=None, top_p=0.5, stop=None, max_tokens=None)
    assert params == SamplingParams(top_p=0.5)
    with pytest.raises(VLLMValidationError, match="top_q"):
        SamplingParams.from_optional(top_q=1)


def test_a_clone_shares_nothing():
    params = SamplingParams(stop=["a"], logit_bias={1: 2.0}, extra_args={"k": [1]})
    clone = params.clone()
    assert clone == params
    assert isinstance(clone.stop, list) and clone.logit_bias and clone.extra_args
    clone.stop.append("b")
    clone.logit_bias[2] = 1.0
    clone.extra_args["k"].append(2)
    assert params == SamplingParams(stop=["a"], logit_bias={1: 2.0}, extra_args={"k": [1]})


def test_survives_the_way_to_the_engine():
    params = SamplingParams(
        temperature=0.3,
        stop=["a"],
        logit_bias={1: 2.0},
        structured_outputs=StructuredOutputsParams(json={"type": "object"}),
    )
    params.all_stop_token_ids = [4]
    data = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(data, type=SamplingParams) == params


@pytest.mark.parametrize(
    ("ignore_eos", "stop_ids", "all_stop_ids"),
    [(False, [9, 5, 6], [9, 5, 6, 2]), (True, [9], [9])],
)
def test_ids_that_end_a_request(ignore_eos, stop_ids, all_stop_ids):
    params = SamplingParams(stop_token_ids=[9], ignore_eos=ignore_eos)
    params.update_from_generation_config({"eos_token_id": [2, 5, 6]}, eos_token_id=2)
    assert params.eos_token_id == 2
    assert params.stop_token_ids == stop_ids
    assert params.all_stop_token_ids == all_stop_ids


def test_without_a_tokenizer_the_first_listed_id_is_the_eos():
    params = SamplingParams()
    params.update_from_generation_config({"eos_token_id": [5, 6]})
    assert (params.eos_token_id, params.stop_token_ids) == (5, [6])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"json": {}, "choice": ["a"]},
        {"json": 3},
        {"regex": ""},
        {"choice": []},
        {"choice": ["a", 3]},
        {"grammar": 5},
        {"json_object": False},
    ],
)
def test_a_constraint_is_exactly_one(fields):
    with pytest.raises(VLLMValidationError) as caught:
        StructuredOutputsParams(**fields)
    assert "structured_outputs" in str(caught.value)


def test_what_cannot_be_kept_to_is_refused():
    with pytest.raises(UnsupportedError, match="whitespace_pattern"):
        StructuredOutputsParams(json={}, whitespace_pattern=" ")


@pytest.mark.parametrize(
    "fields",
    [{"beam_width": 0}, {"max_tokens": 0}, {"temperature": NAN}, {"length_penalty": INF}],
)
def test_beam_search_parameters(fields):
    with pytest.raises(VLLMValidationError, match=next(iter(fields))):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **fields})
