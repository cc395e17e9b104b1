"""The arithmetic behind the figures of ``vllm bench serve``, and the lengths of its prompts."""

import pytest

from vllm.benchmarks.client import Outcome, request_body
from vllm.benchmarks.datasets import Sample, random_samples
from vllm.benchmarks.metrics import parse_goodput, parse_metrics, parse_percentiles, summarize
from vllm.transformers_utils.model_path import resolve_model_path
from vllm.transformers_utils.tokenizer import get_tokenizer

SAMPLE = Sample(prompt="p", prompt_len=10, output_len=3)


def outcome(start: float, ttft: float, itl: list[float], **changes) -> Outcome:
    return Outcome(
        sample=SAMPLE,
        start=start,
        end=start + ttft + sum(itl),
        ttft=ttft,
        itl=itl,
        output_tokens=len(itl) + 1,
        **changes,
    )


def test_figures():
    outcomes = [
        outcome(0.0, 0.1, [0.02, 0.04]),
        outcome(1.0, 0.3, [0.01, 0.01]),
        outcome(0.0, 0.0, [], error="status 500"),
    ]
    result = summarize(outcomes, 2.0, percentiles=[50.0], goodput={})
    assert (result["completed"], result["failed"]) == (2, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (20, 6)
    assert result["request_throughput"] == 1.0
    assert result["output_throughput"] == 3.0
    assert result["total_token_throughput"] == 13.0
    assert result["mean_ttft_ms"] == pytest.approx(200)
    assert result["mean_tpot_ms"] == pytest.approx((30 + 10) / 2)
    assert result["median_itl_ms"] == pytest.approx((10 + 20) / 2)
    assert result["mean_e2el_ms"] == pytest.approx((160 + 320) / 2)
    assert result["p50_e2el_ms"] == result["median_e2el_ms"]
    assert result["request_goodput"] is None
    assert result["max_concurrent_requests"] == 1


def test_a_single_token_has_no_time_per_token():
    result = summarize([outcome(0.0, 0.1, [])], 1.0, percentiles=[99.0], goodput={"tpot": 0.001})
    assert result["mean_tpot_ms"] == 0
    assert result["request_goodput"] == 1.0


def test_goodput_needs_every_limit():
    outcomes = [outcome(0.0, 0.1, [0.02]), outcome(0.0, 0.3, [0.02]), outcome(0.0, 0.1, [0.5])]
    limits = parse_goodput(["ttft:200", "tpot:50"])
    assert summarize(outcomes, 1.0, percentiles=[], goodput=limits)["request_goodput"] == 1.0


def test_nothing_succeeded():
    result = summarize([outcome(0, 0, [], error="x")], 1.0, percentiles=[99.0], goodput={})
    assert (result["completed"], result["output_throughput"], result["p99_ttft_ms"]) == (0, 0, 0)


def test_lists_of_options():
    assert parse_metrics(None) == ["ttft", "tpot", "itl"]
    assert parse_metrics("e2el, ttft") == ["e2el", "ttft"]
    assert parse_percentiles("50,99.9") == [50.0, 99.9]


def test_bodies():
    body = request_body(SAMPLE, chat=False, model="m", sampling={"temperature": 0})
    assert (body["prompt"], body["max_tokens"], body["temperature"]) == ("p", 3, 0)
    body = request_body(SAMPLE, chat=True, model="m", sampling={})
    assert body["messages"] == [{"role": "user", "content": "p"}]
    assert "prompt" not in body


@pytest.fixture(scope="module")
def tokenizer():
    return get_tokenizer(str(resolve_model_path("smollm2")))


class TestRandomPrompts:
    def test_have_the_length_asked_for(self, tokenizer):
        samples = random_samples(tokenizer, count=20, input_len=64, output_len=7)
        lengths = [len(tokenizer.encode(sample.prompt)) for sample in samples]
        assert lengths == [sample.prompt_len for sample in samples]
        assert sum(length == 64 for length in lengths) >= 19
        assert {sample.output_len for sample in samples} == {7}

    def test_differ_from_each_other_and_between_seeds(self, tokenizer):
        def prompts(seed):
            samples = random_samples(tokenizer, count=4, input_len=32, output_len=1, seed=seed)
            return [sample.prompt for sample in samples]

        assert len(set(prompts(0) + prompts(1))) == 8
        assert prompts(3) == prompts(3)

    def test_spread_within_the_ratio(self, tokenizer):
        samples = random_samples(
            tokenizer, count=40, input_len=40, output_len=40, range_ratio=0.5, seed=1
        )
        for lengths in ([s.prompt_len for s in samples], [s.output_len for s in samples]):
            assert min(lengths) >= 19
            assert max(lengths) <= 61
            assert len(set(lengths)) > 10

    def test_share_a_prefix(self, tokenizer):
        samples = random_samples(
            tokenizer, count=3, input_len=10, output_len=1, prefix_len=30, seed=2
        )
        heads = {tuple(tokenizer.encode(sample.prompt)[:25]) for sample in samples}
        assert len(heads) == 1
        assert all(abs(sample.prompt_len - 40) <= 1 for sample in samples)
