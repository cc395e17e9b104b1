"""/v1/completions of a running server, through the official client."""

import json

import openai
import pytest

from tests.entrypoints.server import MODEL, Server

PROMPT = "The capital of France is"
GREEDY = {"model": MODEL, "temperature": 0}


def test_a_prompt_is_completed(client: openai.OpenAI):
    answer = client.completions.create(prompt=PROMPT, max_tokens=8, **GREEDY)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == MODEL
    assert "Paris" in answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == 13
    assert answer.system_fingerprint.startswith("vllm-")


def test_a_stream_gives_the_same_text_and_usage(client: openai.OpenAI):
    whole = client.completions.create(prompt=PROMPT, max_tokens=24, **GREEDY)
    stream = client.completions.create(
        prompt=PROMPT, max_tokens=24, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    *pieces, last = chunks
    assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert len(pieces) > 4
    assert last.choices == []
    assert last.usage.completion_tokens == 24
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_can_come_with_every_chunk(client: openai.OpenAI):
    chunks = list(
        client.completions.create(
            prompt=PROMPT,
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
            **GREEDY,
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 5


@pytest.mark.parametrize(
    ("prompt", "num_choices", "num_prompt_tokens"),
    [
        ("Hello", 1, 1),
        (["Hello", PROMPT], 2, 6),
        ([504, 3575], 1, 2),
        ([[504, 3575], [504]], 2, 3),
    ],
)
def test_prompts_come_in_four_forms(client, prompt, num_choices, num_prompt_tokens):
    answer = client.completions.create(prompt=prompt, max_tokens=2, **GREEDY)
    assert [choice.index for choice in answer.choices] == list(range(num_choices))
    assert answer.usage.prompt_tokens == num_prompt_tokens
    assert answer.usage.completion_tokens == 2 * num_choices


def test_several_prompts_and_choices_stream_under_their_own_index(client: openai.OpenAI):
    prompts = [PROMPT, "One, two, three,"]
    whole = client.completions.create(prompt=prompts, n=2, max_tokens=6, **GREEDY)
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(
        prompt=prompts, n=2, max_tokens=6, stream=True, **GREEDY
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert texts[0] == texts[1] != texts[2] == texts[3]


def test_n_gives_different_samples(client: openai.OpenAI):
    answer = client.completions.create(
        model=MODEL, prompt="Once upon a time", n=3, max_tokens=16, temperature=1.0, seed=7
    )
    assert len({choice.text for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == 48
    assert answer.usage.prompt_tokens == 4


def test_a_seed_repeats_its_sample(client: openai.OpenAI):
    def sample(seed: int) -> str:
        return (
            client.completions.create(
                model=MODEL, prompt="Once", max_tokens=12, temperature=1.0, seed=seed
            )
            .choices[0]
            .text
        )

    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_first(client: openai.OpenAI, stream: bool):
    answer = client.completions.create(
        prompt=PROMPT, max_tokens=3, echo=True, stream=stream, **GREEDY
    )
    text = "".join(c.choices[0].text for c in answer) if stream else answer.choices[0].text
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT)


def test_echo_alone_scores_the_prompt(client: openai.OpenAI):
    answer = client.completions.create(prompt=PROMPT, max_tokens=0, echo=True, logprobs=2, **GREEDY)
    choice = answer.choices[0]
    assert choice.text == PROMPT
    assert "".join(choice.logprobs.tokens) == PROMPT
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert answer.usage.completion_tokens == 0
    assert choice.logprobs.text_offset[1] == len(choice.logprobs.tokens[0])


@pytest.mark.parametrize("prompt", [PROMPT, [504, 3575, 282]])
def test_a_stream_echoes_the_same_log_probabilities(server: Server, prompt: object):
    asked = {"prompt": prompt, "max_tokens": 3, "echo": True, "logprobs": 1, "temperature": 0}
    whole = server.post("/v1/completions", asked).json()["choices"][0]
    events = server.post("/v1/completions", {**asked, "stream": True}).text.split("\n\n")
    choices = [json.loads(event[6:])["choices"][0] for event in events[:-2]]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        streamed = [value for choice in choices for value in choice["logprobs"][name]]
        assert streamed == whole["logprobs"][name]
    assert "".join(whole["logprobs"]["tokens"]) == whole["text"]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(client: openai.OpenAI, stream: bool):
    answer = client.completions.create(
        prompt=PROMPT, max_tokens=6, logprobs=3, stream=stream, **GREEDY
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    values = [value for choice in choices for value in choice.logprobs.token_logprobs]
    tops = [top for choice in choices for top in choice.logprobs.top_logprobs]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    text = "".join(choice.text for choice in choices)
    assert "".join(tokens) == text
    assert [text[a:].startswith(token) for a, token in zip(offsets, tokens, strict=True)] == [
        True
    ] * 6
    assert len(tops) == 6
    for token, value, top in zip(tokens, values, tops, strict=True):
        assert len(top) == 3
        assert max(top.values()) == top[token] == value <= 0


def test_tokens_can_be_named_by_id(server: Server):
    body = {"prompt": PROMPT, "max_tokens": 2, "logprobs": 1, "temperature": 0}
    answer = server.post(
        "/v1/completions",
        {**body, "return_tokens_as_token_ids": True, "return_token_ids": True},
    ).json()
    choice = answer["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
    ids = server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    assert choice["prompt_token_ids"] == ids


def test_prompt_log_probabilities(server: Server):
    body = {"prompt": PROMPT, "max_tokens": 1, "prompt_logprobs": 1, "temperature": 0}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    assert len(rest) == 4
    assert {"logprob", "rank", "decoded_token"} == set(next(iter(rest[0].values())))


def test_stop_strings_end_the_text(client: openai.OpenAI, server: Server):
    numbers = {"prompt": "1, 2, 3, 4, 5, 6,", "max_tokens": 40, "temperature": 0}
    choice = server.post("/v1/completions", {**numbers, "stop": ["9"]}).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "9"
    assert choice["text"].endswith("8, ")
    body = {**numbers, "stop": "9", "include_stop_str_in_output": True}
    assert server.post("/v1/completions", body).json()["choices"][0]["text"].endswith("8, 9")
    streamed = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(model=MODEL, stop=["9"], stream=True, **numbers)
    )
    assert streamed == choice["text"]


def test_stop_token_ids_and_ignore_eos(server: Server):
    ids = server.post("/tokenize", {"prompt": " Paris"}).json()["tokens"]
    body = {"prompt": PROMPT, "max_tokens": 10, "temperature": 0}
    choice = server.post("/v1/completions", {**body, "stop_token_ids": ids}).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == ids[0]
    answer = server.post("/v1/completions", {**body, "max_tokens": 60, "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 60


def test_logit_bias_and_allowed_tokens_steer(server: Server):
    (paris,) = server.post("/tokenize", {"prompt": " Paris"}).json()["tokens"]
    body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "return_token_ids": True}

    def first(**fields: object) -> int:
        return server.post("/v1/completions", {**body, **fields}).json()["choices"][0]["token_ids"][
            0
        ]

    assert first() == paris
    assert first(logit_bias={str(paris): -100}) != paris
    assert first(allowed_token_ids=[504, 505]) in (504, 505)
    assert first(bad_words=["Paris"]) != paris


def test_min_tokens_holds_stops_back(server: Server):
    body = {"prompt": "1, 2, 3, 4, 5, 6,", "max_tokens": 12, "temperature": 0, "stop": ["7"]}
    early = server.post("/v1/completions", body).json()
    late = server.post("/v1/completions", {**body, "min_tokens": 12}).json()
    assert early["usage"]["completion_tokens"] < late["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize(("side", "kept"), [(None, [3, 4]), ("left", [3, 4]), ("right", [1, 2])])
def test_prompts_can_be_truncated(server: Server, side: str | None, kept: list[int]):
    body = {
        "prompt": [1, 2, 3, 4],
        "truncate_prompt_tokens": 2,
        "truncation_side": side,
        "max_tokens": 1,
        "return_token_ids": True,
    }
    answer = server.post("/v1/completions", body).json()
    assert answer["choices"][0]["prompt_token_ids"] == kept
    assert answer["usage"]["prompt_tokens"] == 2


def test_truncation_to_what_fits_leaves_room_for_the_output(server: Server):
    body = {"prompt": [7] * 3000, "truncate_prompt_tokens": -1, "max_tokens": 4}
    usage = server.post("/v1/completions", body).json()["usage"]
    assert usage["prompt_tokens"] == 1020
    assert usage["completion_tokens"] == 4


def test_a_repeated_prompt_reports_cached_tokens(server: Server):
    body = {"prompt": list(range(100, 400)), "max_tokens": 1, "cache_salt": "cached-tokens-test"}
    server.post("/v1/completions", body)
    details = server.post("/v1/completions", body).json()["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] >= 256
    other = {**body, "cache_salt": "another"}
    details = server.post("/v1/completions", other).json()["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == 0
