"""The runner computes what transformers computes, however requests are batched and cut up."""

import itertools
import random

import numpy as np
import pytest
import torch

from tests.worker.driver import MAX_LEN, VOCAB, hf_greedy
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.worker import prompt_logprobs

PROMPTS = {
    "a": [3, 14, 15, 92, 65],
    "b": list(range(20, 61)),
    "c": [7],
    "d": [(i * 37) % VOCAB for i in range(75)],
}
COUNT = 12


@pytest.fixture(scope="module")
def expected(hf_model):
    return {req_id: hf_greedy(hf_model, prompt, COUNT) for req_id, prompt in PROMPTS.items()}


def outputs(driver):
    return {req_id: request.output for req_id, request in driver.requests.items()}


def add_all(driver, **params):
    for req_id, prompt in PROMPTS.items():
        driver.add(req_id, prompt, **params)


def test_the_reference_is_worth_comparing_with(expected):
    assert all(len(set(tokens)) > 3 for tokens in expected.values())


@pytest.mark.parametrize("req_id", PROMPTS)
def test_one_request_alone(driver, expected, req_id):
    driver.add(req_id, PROMPTS[req_id])
    driver.run({req_id: COUNT})
    assert outputs(driver) == {req_id: expected[req_id]}


def test_all_in_one_batch(driver, expected):
    add_all(driver)
    driver.run(dict.fromkeys(PROMPTS, COUNT))
    assert outputs(driver) == expected


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_prompts_in_chunks_beside_decodes(driver, expected, chunk):
    add_all(driver)
    driver.run(dict.fromkeys(PROMPTS, COUNT), chunk=chunk)
    assert outputs(driver) == expected


def test_requests_come_and_go(driver, expected):
    driver.add("a", PROMPTS["a"])
    driver.add("b", PROMPTS["b"])
    driver.run({"a": 3, "b": 2})
    driver.add("d", PROMPTS["d"])
    driver.step({"d": 30, "b": 1, "a": 1})
    done = driver.requests["a"].output
    driver.finish("a")
    driver.add("c", PROMPTS["c"])
    driver.run({"c": COUNT, "b": COUNT, "d": COUNT}, chunk=20)
    assert done == expected["a"][:4]
    assert outputs(driver) == {req_id: expected[req_id] for req_id in "bcd"}


def test_a_request_left_out_of_steps_goes_on_where_it_was(driver, expected):
    add_all(driver)
    driver.run(dict.fromkeys(PROMPTS, 3))
    driver.run({"b": 9, "c": 5})
    driver.run(dict.fromkeys(PROMPTS, COUNT))
    assert outputs(driver) == expected


@pytest.mark.parametrize("chunk", [1 << 30, 10])
def test_preempted_requests_are_recomputed(driver, expected, chunk):
    add_all(driver)
    driver.run(dict.fromkeys(PROMPTS, 5), chunk=chunk)
    driver.preempt("b")
    driver.preempt("d")
    driver.run({"a": 8, "c": 7})
    driver.run(dict.fromkeys(PROMPTS, COUNT), chunk=chunk)
    assert outputs(driver) == expected


def test_a_request_preempted_and_resumed_within_one_step(driver, expected):
    add_all(driver)
    driver.run(dict.fromkeys(PROMPTS, 5))
    driver.preempt("d")
    driver.run(dict.fromkeys(PROMPTS, COUNT))
    assert outputs(driver) == expected


@pytest.mark.parametrize("params", [{}, {"repetition_penalty": 1.3, "temperature": 0.9, "seed": 4}])
def test_samples_that_the_scheduler_did_not_take_are_drawn_again(driver, params):
    """As when a transfer into the blocks of a running request has failed."""
    driver.add("b", PROMPTS["b"], **params)
    driver.run({"b": COUNT})
    wanted = driver.requests["b"].output
    driver.finish("b")

    driver.add("b", PROMPTS["b"], **params)
    driver.add("a", PROMPTS["a"])
    driver.run({"b": 5, "a": 3})
    request = driver.requests["b"]
    del request.output[3:]
    request.computed = 20
    driver.run({"b": 6, "a": 6})
    del request.output[4:]
    driver.preempt("b")
    driver.run({"a": 8})
    driver.run({"b": COUNT})
    assert request.output == wanted


def test_a_request_aborted_in_the_middle_of_its_prompt(driver, expected):
    driver.add("d", PROMPTS["d"])
    driver.add("a", PROMPTS["a"])
    driver.step({"d": 20, "a": 5})
    driver.finish("d")
    driver.run({"a": COUNT})
    assert outputs(driver) == {"a": expected["a"]}


def test_the_same_id_again_is_a_new_request(driver, expected):
    driver.add("a", PROMPTS["b"])
    driver.run({"a": 2})
    driver.finish("a")
    driver.add("a", PROMPTS["a"])
    driver.run({"a": COUNT})
    assert outputs(driver) == {"a": expected["a"]}


def test_a_prefix_already_in_the_cache_is_not_computed_again(driver, expected):
    driver.add("d", PROMPTS["d"])
    driver.run({"d": 1})
    size = driver.block_size
    shared = 64 // size
    driver.add("again", PROMPTS["d"])
    again = driver.requests["again"]
    again.blocks = driver.requests["d"].blocks[:shared].copy()
    again.computed = shared * size
    driver.run({"again": COUNT})
    assert again.output == expected["d"]
    again.blocks = again.blocks[shared:]


def test_a_request_that_fills_the_context(driver, hf_model):
    prompt = [(i * 11) % VOCAB for i in range(MAX_LEN - 2)]
    driver.add("long", prompt)
    driver.run({"long": 3})
    assert driver.requests["long"].output == hf_greedy(hf_model, prompt, 3)


def test_nothing_is_sampled_before_the_prompt_ends(driver):
    driver.add("d", PROMPTS["d"])
    result = driver.step({"d": 74})
    assert result.sampled_token_ids == [[]]
    result = driver.step({"d": 1})
    assert len(result.sampled_token_ids[0]) == 1


@pytest.mark.parametrize("limits", [{}, {"top_p": 0.8}, {"top_k": 20, "min_p": 0.01}])
def test_a_seed_does_not_depend_on_batch_chunks_or_preemption(driver, limits):
    params = {"temperature": 1.0, "seed": 1234, **limits}
    driver.add("d", PROMPTS["d"], **params)
    driver.run({"d": COUNT})
    alone = driver.requests["d"].output
    driver.finish("d")

    driver.add("x", PROMPTS["b"], temperature=1.0)
    driver.add("d", PROMPTS["d"], **params)
    driver.add("y", PROMPTS["a"])
    driver.run({"x": 1, "y": 1})
    driver.run({"x": 4, "d": 5, "y": 6}, chunk=13)
    driver.preempt("d")
    driver.run({"x": COUNT, "d": COUNT}, chunk=40)
    assert driver.requests["d"].output == alone
    assert len(set(alone)) > 3


def test_requests_without_a_seed_differ(driver):
    for req_id in "pqr":
        driver.add(req_id, PROMPTS["a"], temperature=2.0)
    driver.run(dict.fromkeys("pqr", COUNT))
    assert len({tuple(tokens) for tokens in outputs(driver).values()}) == 3


def test_logprobs_match_transformers(driver, hf_model):
    driver.add("a", PROMPTS["a"], logprobs=4)
    driver.add("b", PROMPTS["b"])
    driver.add("c", PROMPTS["c"], logprobs=0)
    for _ in range(3):
        before = {req_id: request.tokens for req_id, request in driver.requests.items()}
        result = driver.step({req_id: driver.pending(req_id) for req_id in "abc"})
        assert result.logprobs.keys() == {"a", "c"}
        for req_id, width in (("a", 5), ("c", 1)):
            with torch.no_grad():
                logits = hf_model(torch.tensor([before[req_id]])).logits[0, -1]
            expected = logits.log_softmax(dim=-1)
            ids, values, ranks = result.logprobs[req_id]
            assert ids.shape == values.shape == (1, width)
            assert ids[0, 0] == driver.requests[req_id].output[-1]
            assert ranks.tolist() == [1]
            np.testing.assert_allclose(values[0], expected[ids[0]], atol=1e-3)


@pytest.mark.parametrize("chunk", [1 << 30, 17])
@pytest.mark.parametrize("count", [0, 3, -1])
def test_prompt_logprobs_match_transformers(driver, hf_model, monkeypatch, chunk, count):
    # Logits of ten positions at a time.
    monkeypatch.setattr(prompt_logprobs, "_LOGITS_BYTES", 4 * VOCAB * 10)
    prompt = PROMPTS["d"]
    driver.add("d", prompt, prompt_logprobs=count)
    driver.add("a", PROMPTS["a"])
    found = {}
    while driver.pending("d"):
        assert not found
        result = driver.step({r: min(chunk, driver.pending(r)) for r in "ad"})
        found.update(result.prompt_logprobs_dict)
        if driver.requests["d"].output:
            break
    assert found.keys() == {"d"}
    ids, values, ranks = found["d"]
    width = 1 + (VOCAB if count == -1 else count)
    assert ids.shape == values.shape == (len(prompt) - 1, width)
    with torch.no_grad():
        expected = hf_model(torch.tensor([prompt])).logits[0, :-1].log_softmax(dim=-1)
    np.testing.assert_allclose(values, expected.gather(1, torch.from_numpy(ids).long()), atol=1e-3)
    assert ids[:, 0].tolist() == prompt[1:]
    own = expected.gather(1, torch.tensor(prompt[1:])[:, None])
    assert ranks.tolist() == ((expected > own).sum(dim=1) + 1).tolist()


def test_prompt_logprobs_survive_preemption_within_the_prompt(driver, hf_model):
    prompt = PROMPTS["d"]
    driver.add("d", prompt, prompt_logprobs=0)
    driver.step({"d": 30})
    driver.preempt("d")
    driver.step({"d": 50})
    result = driver.step({"d": 25})
    with torch.no_grad():
        expected = hf_model(torch.tensor([prompt])).logits[0, :-1].log_softmax(dim=-1)
    own = expected.gather(1, torch.tensor(prompt[1:])[:, None])
    np.testing.assert_allclose(result.prompt_logprobs_dict["d"].logprobs, own, atol=1e-3)


def test_penalties_count_prompt_and_output_across_steps(driver, hf_model):
    driver.add("b", PROMPTS["b"], repetition_penalty=1.4, frequency_penalty=0.5)
    driver.add("a", PROMPTS["a"])
    driver.run({"a": COUNT, "b": 4})
    driver.preempt("b")
    driver.run({"b": COUNT})
    tokens = list(PROMPTS["b"])
    with torch.no_grad():
        for _ in range(COUNT):
            logits = hf_model(torch.tensor([tokens])).logits[0, -1]
            seen = torch.tensor(sorted(set(tokens)))
            values = logits[seen]
            logits[seen] = torch.where(values > 0, values / 1.4, values * 1.4)
            counts = torch.bincount(torch.tensor(tokens[41:] or [0]), minlength=VOCAB)
            logits -= 0.5 * (counts if tokens[41:] else 0)
            tokens.append(int(logits.argmax()))
    assert driver.requests["b"].output == tokens[41:]


def test_bad_words_of_one_and_several_tokens(driver, expected):
    first, second, third = expected["a"][:3]
    params = {"bad_words": ["x"]}
    driver.add("a", PROMPTS["a"], **params)
    driver.requests["a"].params.bad_words_token_ids = [[first, second, third]]
    driver.add("b", PROMPTS["b"], **params)
    driver.requests["b"].params.bad_words_token_ids = [[expected["b"][0]]]
    driver.run({"a": 3, "b": COUNT})
    assert driver.requests["a"].output[:2] == [first, second]
    assert driver.requests["a"].output[2] != third
    assert expected["b"][0] not in driver.requests["b"].output


def test_min_tokens_hold_off_the_stop_tokens(driver, expected):
    stop = expected["a"][0]
    driver.add("a", PROMPTS["a"], min_tokens=3)
    driver.requests["a"].params.all_stop_token_ids = [stop]
    driver.add("b", PROMPTS["a"], min_tokens=1)
    driver.requests["b"].params.eos_token_id = stop
    driver.add("c", PROMPTS["a"])
    driver.requests["c"].params.eos_token_id = stop
    driver.run({"a": 4, "b": 2, "c": 1})
    assert stop not in driver.requests["a"].output[:3]
    assert driver.requests["b"].output[0] != stop
    assert driver.requests["c"].output[0] == stop


def test_logit_bias_and_allowed_ids(driver):
    driver.add("a", PROMPTS["a"], logit_bias={5: 100.0})
    driver.add("b", PROMPTS["b"], allowed_token_ids=[8, 9])
    driver.add("c", PROMPTS["c"])
    driver.run({"a": 2, "b": 3, "c": 1})
    assert driver.requests["a"].output == [5, 5]
    assert set(driver.requests["b"].output) <= {8, 9}


def test_rows_without_a_choice_fail_alone(driver, expected):
    driver.add("a", PROMPTS["a"])
    driver.add("b", PROMPTS["b"], allowed_token_ids=[8], bad_words=["x"])
    driver.requests["b"].params.bad_words_token_ids = [[8]]
    result = driver.step({"a": 5, "b": 41})
    assert result.request_errors.keys() == {"b"}
    assert result.sampled_token_ids[result.req_id_to_index["b"]] == []
    driver.finish("b")
    driver.run({"a": COUNT})
    assert driver.requests["a"].output == expected["a"]


def test_grammar_masks_reach_their_rows_only(driver, expected):
    words = -(-VOCAB // 32)
    mask = np.zeros((1, words), dtype=np.int32)
    mask[0, 2] = 1 << 3  # token 67
    add_all(driver)
    driver.step(
        {"a": 5, "b": 20, "c": 1, "d": 75},
        GrammarOutput(structured_output_request_ids=["d"], grammar_bitmask=mask),
    )
    assert driver.requests["d"].output == [67]
    assert driver.requests["b"].output == []
    assert driver.requests["a"].output == expected["a"][:1]
    assert driver.requests["c"].output == expected["c"][:1]


def test_a_step_without_work_returns_nothing(driver):
    result = driver.step({})
    assert result.req_ids == []


@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_gives_the_same_tokens(driver, expected, seed):
    """Random chunks, pauses, preemptions and re-entries of eight requests over four prompts."""
    rng = random.Random(seed)
    for req_id in [f"{name}{i}" for name in PROMPTS for i in range(2)]:
        driver.add(req_id, PROMPTS[req_id[0]])
    while True:
        running = [r for r, request in driver.requests.items() if len(request.output) < COUNT]
        if not running:
            break
        if rng.random() < 0.1:
            driver.preempt(rng.choice(running))
        chosen = rng.sample(running, rng.randint(1, len(running)))
        driver.step({r: rng.randint(1, min(40, driver.pending(r))) for r in chosen})
    assert outputs(driver) == {req_id: expected[req_id[0]] for req_id in driver.requests}


def test_rows_do_not_depend_on_the_order_in_which_requests_leave(driver):
    """The ranks of a model add their rows up, and a set has another order in each process."""
    rows = []
    for leaving in itertools.permutations("bdf"):
        for req_id in "abcdef":
            driver.add(req_id, [1, 2, 3])
        driver.step(dict.fromkeys("abcdef", 3))
        for req_id in leaving:
            driver.finish(req_id)
        driver.finished = dict.fromkeys(leaving)
        driver.add("x", [4, 5])
        driver.step({"a": 1, "c": 1, "e": 1, "x": 2})
        rows.append(dict(driver.worker.model_runner.batch.req_id_to_index))
        for req_id in "acex":
            driver.finish(req_id)
        driver.step({})
    assert all(row == rows[0] for row in rows)
