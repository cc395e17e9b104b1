"""``LLM`` over a tiny model, engine in this process."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.engine.conftest import EOS
from vllm import LLM, SamplingParams
from vllm.errors import ConfigError, EngineGenerateError, UnsupportedError, VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.sampling_params import BeamSearchParams

PROMPTS = ["The quick brown", "def main", "Größe naïve", "😀 and"]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def texts(llm: LLM, prompts: Any, params: Any) -> list[str]:
    return [out.outputs[0].text for out in llm.generate(prompts, params, use_tqdm=False)]


def test_batched_and_alone_are_equal(llm: LLM) -> None:
    together = texts(llm, PROMPTS, GREEDY)
    alone = [texts(llm, prompt, GREEDY)[0] for prompt in PROMPTS]
    assert together == alone
    assert len(set(together)) == len(PROMPTS)


def test_threads_take_turns(llm: LLM) -> None:
    expected = texts(llm, PROMPTS, GREEDY)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        got = list(pool.map(lambda prompt: texts(llm, prompt, GREEDY)[0], PROMPTS * 3))
    assert got == expected * 3


def test_text_is_the_tokens_decoded(llm: LLM, tokenizer: Any) -> None:
    for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False):
        completion = output.outputs[0]
        assert len(completion.token_ids) == 24
        context = output.prompt_token_ids
        assert context is not None
        whole = tokenizer.decode(context + completion.token_ids, skip_special_tokens=True)
        assert whole == tokenizer.decode(context, skip_special_tokens=True) + completion.text


def test_every_form_of_prompt(llm: LLM) -> None:
    text = "The quick brown"
    ids = llm.get_tokenizer().encode(text)
    expected = texts(llm, text, GREEDY)
    assert texts(llm, ids, GREEDY) == expected
    assert texts(llm, {"prompt": text}, GREEDY) == expected
    assert texts(llm, TokensPrompt(prompt_token_ids=ids), GREEDY) == expected
    assert texts(llm, [text, ids, {"prompt_token_ids": ids}], GREEDY) == expected * 3
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_params_one_per_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 5)]
    outputs = llm.generate(PROMPTS[:2], params, use_tqdm=False)
    assert [len(out.outputs[0].token_ids) for out in outputs] == [3, 5]
    assert all(out.outputs[0].finish_reason == "length" for out in outputs)
    with pytest.raises(VLLMValidationError, match="2 entries for 1 prompts"):
        llm.generate(PROMPTS[:1], params, use_tqdm=False)


def test_seeds_decide_and_n_counts_them_up(llm: LLM) -> None:
    def sample(**kwargs: Any) -> list[list[int]]:
        params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True, **kwargs)
        (output,) = llm.generate("The quick", params, use_tqdm=False)
        assert output.finished
        assert [c.index for c in output.outputs] == list(range(len(output.outputs)))
        return [c.token_ids for c in output.outputs]

    three = sample(n=3, seed=40)
    assert len({tuple(ids) for ids in three}) == 3
    assert [sample(seed=40 + i)[0] for i in range(3)] == three
    assert len(sample(n=2, seed=2**63 - 1)) == 2


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_cuts_the_text_and_ends_the_request(llm: LLM, include: bool) -> None:
    (whole,) = texts(llm, PROMPTS[0], GREEDY)
    start = len(whole) // 2
    stop = whole[start : start + 3]
    cut = whole.index(stop) + (len(stop) if include else 0)
    params = SamplingParams(
        temperature=0, max_tokens=24, ignore_eos=True, stop=[stop],
        include_stop_str_in_output=include,
    )  # fmt: skip
    (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.text == whole[:cut]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_stop_token_ids_and_eos(llm: LLM) -> None:
    (output,) = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    ids = output.outputs[0].token_ids
    stop_id = ids[5]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop_token_ids=[stop_id])
    (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.token_ids == ids[: ids.index(stop_id) + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop_id)

    only_eos = SamplingParams(temperature=0, max_tokens=5, allowed_token_ids=[EOS])
    (output,) = llm.generate(PROMPTS[0], only_eos, use_tqdm=False)
    assert output.outputs[0].token_ids == [EOS]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)
    assert output.outputs[0].text == ""
    # The second id of the generation config's list ends a sequence too, and says so.
    second = SamplingParams(temperature=0, max_tokens=5, allowed_token_ids=[3])
    (output,) = llm.generate(PROMPTS[0], second, use_tqdm=False)
    assert (output.outputs[0].token_ids, output.outputs[0].stop_reason) == ([3], 3)


def test_min_tokens_puts_eos_off(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=8, min_tokens=4, allowed_token_ids=[EOS, 3, 70]
    )
    (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    assert output.outputs[0].token_ids[:4] == [70] * 4


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=2, ignore_eos=True
    )
    (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    completion = output.outputs[0]
    assert completion.logprobs is not None
    assert output.prompt_token_ids is not None
    total = 0.0
    for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True):
        best = max(position.values(), key=lambda entry: entry.logprob)
        assert position[token_id] is best
        assert sorted(entry.rank for entry in position.values()) == [1, 2, 3]
        assert position[token_id].decoded_token == llm.get_tokenizer().decode([token_id])
        total += position[token_id].logprob
    assert completion.cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token_id, position in zip(
        output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
    ):
        assert position is not None
        assert token_id in position
        assert len(position) in (2, 3)


def test_max_tokens_none_fills_the_context(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    (output,) = llm.generate([5] * 200, params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 56
    assert output.outputs[0].finish_reason == "length"
    # One that asks for more than there is room for ends at the limit as well.
    params = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
    (output,) = llm.generate([5] * 200, params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 56


def test_a_repeated_prompt_is_found_in_the_cache(llm: LLM) -> None:
    assert llm.reset_prefix_cache()
    prompt = list(range(10, 110))
    (first,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    (second,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    (salted,) = llm.generate(
        TokensPrompt(prompt_token_ids=prompt, cache_salt="other"), GREEDY, use_tqdm=False
    )
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == 96
    assert salted.num_cached_tokens == 0
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    assert salted.outputs[0].token_ids == first.outputs[0].token_ids


def test_chat_uses_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hello"}]
    (answer,) = llm.chat(messages, GREEDY, use_tqdm=False)
    assert answer.prompt == "<|user|>hello</s><|assistant|>"
    assert answer.prompt_token_ids is not None
    assert answer.prompt_token_ids.count(EOS) == 1
    both = llm.chat([messages, messages], GREEDY, use_tqdm=False)
    assert [out.outputs[0].text for out in both] == [answer.outputs[0].text] * 2


def test_beam_search_finds_no_worse_than_greedy(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=6, ignore_eos=True)
    (output,) = llm.beam_search(["The quick"], params)
    assert len(output.sequences) == 4
    scores = [sequence.cum_logprob for sequence in output.sequences]
    assert scores == sorted(scores, reverse=True)
    greedy = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
    (best_first,) = llm.generate("The quick", greedy, use_tqdm=False)
    cumulative = best_first.outputs[0].cumulative_logprob
    assert cumulative is not None
    assert scores[0] >= cumulative - 1e-4
    prompt_ids = best_first.prompt_token_ids
    assert prompt_ids is not None
    assert all(len(s.tokens) == len(prompt_ids) + 6 for s in output.sequences)


def test_structured_output_is_followed(llm: LLM) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    params = SamplingParams(
        temperature=1.0,
        max_tokens=40,
        structured_outputs=StructuredOutputsParams(choice=["brown fox", "lazy dog"]),
    )
    for text in texts(llm, PROMPTS, params):
        assert text in ("brown fox", "lazy dog")


def test_a_grammar_that_cannot_be_compiled_fails_alone(llm: LLM) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    bad = SamplingParams(structured_outputs=StructuredOutputsParams(regex="(unclosed"))
    with pytest.raises(VLLMValidationError):
        llm.generate("x", bad, use_tqdm=False)
    assert len(texts(llm, PROMPTS, GREEDY)) == 4


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ([5] * 256, {}, r"256 tokens.*at most 256 \(max_model_len\)"),
        ([5, 100000], {}, "token id 100000, which is not in the vocabulary"),
        ([-1], {}, "token id -1"),
        ([1, 2.5], {}, "must be whole numbers"),
        (7, {}, "prompts must be a prompt"),
        ({"text": "x"}, {}, "no field 'text'"),
        ({"prompt": "x", "multi_modal_data": {}}, {}, "multi_modal_data is not supported"),
        ("x", {"logprobs": 21}, "--max-logprobs 20"),
        ("x", {"prompt_logprobs": -1}, "whole vocabulary"),
        ("x", {"allowed_token_ids": [512]}, "allowed_token_ids holds token id 512"),
        ("x", {"logit_bias": {600: 1.0}}, "logit_bias holds token id 600"),
        ("x", {"stop_token_ids": [9999]}, "stop_token_ids holds token id 9999"),
        ("x", {"max_tokens": None, "min_tokens": 400}, "min_tokens is 400"),
        ("x", {"truncate_prompt_tokens": 300}, "truncate_prompt_tokens is 300"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(
    llm: LLM, prompt: Any, params: dict[str, Any], message: str
) -> None:
    prompts = prompt if prompt == 7 else [prompt]
    with pytest.raises(VLLMValidationError, match=message) as caught:
        llm.generate(prompts, SamplingParams(**params), use_tqdm=False)
    assert "\n" not in str(caught.value)
    assert not llm.llm_engine.has_unfinished_requests()


def test_parameters_of_another_kind_are_refused(llm: LLM) -> None:
    for wrong in ((SamplingParams() for _ in range(1)), 3, {"temperature": 0}):
        with pytest.raises(VLLMValidationError, match="must be SamplingParams or a list of them"):
            llm.generate(["x"], wrong, use_tqdm=False)  # type: ignore[arg-type]
    for nothing in (None, SamplingParams()):
        with pytest.raises(VLLMValidationError, match="params must be BeamSearchParams, not"):
            llm.beam_search(["x"], nothing)  # type: ignore[arg-type]


def test_prompts_are_cut_to_their_end(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, truncate_prompt_tokens=3)
    (output,) = llm.generate([10, 11, 12, 13, 14], params, use_tqdm=False)
    assert output.prompt_token_ids == [12, 13, 14]


def test_what_this_engine_lacks_is_refused_by_name(llm: LLM) -> None:
    with pytest.raises(UnsupportedError, match="lora_request"):
        llm.generate("x", GREEDY, lora_request=object())
    with pytest.raises(UnsupportedError, match="pooling"):
        llm.embed("x")
    with pytest.raises(VLLMValidationError, match="priority 1 needs --scheduling-policy priority"):
        llm.generate("x", GREEDY, priority=[1], use_tqdm=False)


def test_unknown_arguments_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM("nowhere", max_modle_len=5)


def test_workers_are_called_by_name_or_with_a_function(llm: LLM) -> None:
    assert llm.collective_rpc("check_health", timeout=60) == [None]
    assert llm.collective_rpc(
        lambda worker, n, *, m: (worker.rank, n, m), None, (3,), {"m": 4}
    ) == [(0, 3, 4)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("_x",), "_x is not a public method of the worker"),
        (("nothing_like_it",), "no attribute 'nothing_like_it'"),
        ((7,), "method must be the name of a worker's method"),
        (("check_health", 0), r"timeout must be a number of seconds above 0 .*, not 0"),
        (("check_health", (1,)), r"timeout must be a number of seconds above 0 .*, not \(1,\)"),
    ],
)
def test_calls_of_workers_that_cannot_be_made(llm: LLM, call: Any, message: str) -> None:
    with pytest.raises((VLLMValidationError, EngineGenerateError), match=message):
        llm.collective_rpc(*call)


def test_metrics_count_what_was_done(llm: LLM) -> None:
    def value(name: str) -> int:
        return sum(m.value for m in llm.get_metrics() if m.name == name)  # type: ignore[attr-defined]

    before = {n: value(n) for n in ("vllm:generation_tokens", "vllm:prompt_tokens")}
    success = value("vllm:request_success")
    llm.generate(list(range(20, 30)), GREEDY, use_tqdm=False)
    assert value("vllm:generation_tokens") == before["vllm:generation_tokens"] + 24
    assert value("vllm:prompt_tokens") == before["vllm:prompt_tokens"] + 10
    assert value("vllm:request_success") == success + 1


def test_request_metrics_are_in_order(llm: LLM) -> None:
    begin = time.time()
    (output,) = llm.generate("The quick", GREEDY, use_tqdm=False)
    metrics = output.metrics
    assert metrics is not None
    assert begin <= metrics.arrival_time <= time.time()
    assert 0 < metrics.queued_ts <= metrics.scheduled_ts < metrics.first_token_ts
    assert metrics.first_token_ts < metrics.last_token_ts
    assert metrics.num_generation_tokens == 24
    assert metrics.first_token_latency > 0
