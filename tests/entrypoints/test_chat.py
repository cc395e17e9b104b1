"""/v1/chat/completions of a running server, through the official client."""

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from tests.entrypoints.server import MODEL, Server

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
GREEDY = {"model": MODEL, "temperature": 0}
COLOURS = ["red", "green"]
PAINT = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paint a wall",
        "parameters": {
            "type": "object",
            "properties": {
                "colour": {"type": "string", "enum": COLOURS},
                "coats": {"type": "integer", "minimum": 1, "maximum": 3},
            },
            "required": ["colour", "coats"],
            "additionalProperties": False,
        },
    },
}
STOP = {"type": "function", "function": {"name": "stop"}}


def test_a_question_is_answered(client: openai.OpenAI):
    answer = client.chat.completions.create(messages=QUESTION, max_tokens=24, **GREEDY)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert "Paris" in choice.message.content
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_gives_the_same_text_and_usage(client: openai.OpenAI):
    asked = {"messages": QUESTION, "max_completion_tokens": 24, **GREEDY}
    whole = client.chat.completions.create(**asked)
    first, *pieces, last = client.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **asked
    )
    assert first.choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == whole.choices[0].message.content
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


def test_the_bytes_of_a_stream_are_events(server: Server):
    body = {"messages": QUESTION, "max_tokens": 4, "stream": True, "temperature": 0}
    response = server.post("/v1/chat/completions", body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, end = response.text.split("\n\n")
    assert end == ""
    assert events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (
        len(chunks) - 1
    )
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(client: openai.OpenAI, stream: bool):
    answer = client.chat.completions.create(
        messages=QUESTION, max_tokens=4, logprobs=True, top_logprobs=2, stream=stream, **GREEDY
    )
    if stream:
        choices = [chunk.choices[0] for chunk in answer if chunk.choices[0].logprobs]
        text = "".join(choice.delta.content or "" for choice in choices)
    else:
        choices = [answer.choices[0]]
        text = choices[0].message.content
    entries = [entry for choice in choices for entry in choice.logprobs.content]
    assert "".join(entry.token for entry in entries) == text
    for entry in entries:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob >= entry.top_logprobs[1].logprob
        assert bytes(entry.bytes).decode() == entry.token


def test_n_choices_stream_side_by_side(client: openai.OpenAI):
    asked = {"model": MODEL, "messages": QUESTION, "n": 2, "max_tokens": 8, "seed": 3}
    whole = client.chat.completions.create(**asked)
    texts = {0: "", 1: ""}
    roles = []
    for chunk in client.chat.completions.create(stream=True, **asked):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role else []
    assert sorted(roles) == [0, 1]
    assert texts == {choice.index: choice.message.content for choice in whole.choices}


def test_content_may_be_a_list_of_text_parts(client: openai.OpenAI, server: Server):
    parts = [
        {"type": "text", "text": "What is the capital"},
        {"type": "text", "text": "of France?"},
    ]
    listed = server.post("/tokenize", {"messages": [{"role": "user", "content": parts}]}).json()
    text = "What is the capital\nof France?"
    plain = server.post("/tokenize", {"messages": [{"role": "user", "content": text}]}).json()
    assert listed["tokens"] == plain["tokens"]
    client.chat.completions.create(
        messages=[{"role": "user", "content": parts}], max_tokens=1, **GREEDY
    )


def test_the_final_message_can_be_continued(client: openai.OpenAI):
    messages = [*QUESTION, {"role": "assistant", "content": "The capital of France is"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    answer = client.chat.completions.create(
        messages=messages, max_tokens=4, extra_body={**extra, "echo": True}, **GREEDY
    )
    assert answer.choices[0].message.content.startswith("The capital of France is Paris")


def test_token_ids_and_prompt_text_can_be_returned(server: Server):
    body = {
        "messages": QUESTION,
        "max_tokens": 3,
        "temperature": 0,
        "return_token_ids": True,
        "return_prompt_text": True,
        "prompt_logprobs": 0,
    }
    answer = server.post("/v1/chat/completions", body).json()
    tokens = server.post("/tokenize", {"messages": QUESTION}).json()["tokens"]
    assert answer["prompt_token_ids"] == tokens
    assert answer["prompt_text"].endswith("<|im_start|>assistant\n")
    assert len(answer["prompt_logprobs"]) == len(tokens)
    text = server.post("/detokenize", {"tokens": answer["choices"][0]["token_ids"]}).json()
    assert text["prompt"] == answer["choices"][0]["message"]["content"]


# Structured output


class Colour(BaseModel):
    name: Literal["red", "green"]
    warm: bool


def test_the_clients_parser_gets_what_its_schema_says(client: openai.OpenAI):
    answer = client.chat.completions.parse(
        messages=[{"role": "user", "content": "Describe a colour."}],
        response_format=Colour,
        max_tokens=60,
        **GREEDY,
    )
    assert isinstance(answer.choices[0].message.parsed, Colour)


def test_json_objects_are_json(client: openai.OpenAI):
    answer = client.chat.completions.create(
        messages=[{"role": "user", "content": 'Reply with {"a": 1}'}],
        response_format={"type": "json_object"},
        max_tokens=60,
        **GREEDY,
    )
    choice = answer.choices[0]
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    ("constraint", "allowed"),
    [
        ({"choice": ["yes", "no"]}, {"yes", "no"}),
        ({"regex": "(12|34)"}, {"12", "34"}),
        ({"grammar": 'root ::= "up" | "down"'}, {"up", "down"}),
    ],
)
def test_structured_outputs(client: openai.OpenAI, constraint: dict, allowed: set[str]):
    answer = client.chat.completions.create(
        messages=QUESTION,
        max_tokens=8,
        extra_body={"structured_outputs": constraint},
        **GREEDY,
    )
    assert answer.choices[0].message.content in allowed


# Tools


def test_required_tools_are_called(client: openai.OpenAI):
    answer = client.chat.completions.create(
        messages=[{"role": "user", "content": "Paint it red."}],
        tools=[PAINT],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=120,
        **GREEDY,
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "paint"
    arguments = json.loads(call.function.arguments)
    assert arguments["colour"] in COLOURS
    assert 1 <= arguments["coats"] <= 3
    assert choice.message.content is None


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "paint"}}]
)
def test_a_stream_gives_the_same_call(client: openai.OpenAI, choice: object):
    asked = {
        "messages": [{"role": "user", "content": "Paint it green, twice."}],
        "tools": [PAINT, STOP],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 120,
        **GREEDY,
    }
    whole = client.chat.completions.create(**asked).choices[0]
    names, arguments, ids, reasons = [], "", [], []
    for chunk in client.chat.completions.create(stream=True, **asked):
        reasons.append(chunk.choices[0].finish_reason)
        for call in chunk.choices[0].delta.tool_calls or ():
            assert call.index == 0
            ids += [call.id] if call.id else []
            names += [call.function.name] if call.function.name else []
            arguments += call.function.arguments or ""
    (call,) = whole.message.tool_calls
    assert names == [call.function.name]
    assert arguments == call.function.arguments
    assert len(ids) == 1
    assert reasons[-1] == whole.finish_reason
    json.loads(arguments)


def test_a_named_function_ends_with_stop(client: openai.OpenAI):
    answer = client.chat.completions.create(
        messages=QUESTION,
        tools=[PAINT, STOP],
        tool_choice={"type": "function", "function": {"name": "paint"}},
        max_tokens=80,
        **GREEDY,
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.tool_calls[0].function.name == "paint"


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_text_stays_text_where_tools_are_optional(client: openai.OpenAI, choice: str):
    answer = client.chat.completions.create(
        messages=QUESTION, tools=[PAINT], tool_choice=choice, max_tokens=16, **GREEDY
    )
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_the_servers_parser_reads_what_the_model_writes(client: openai.OpenAI, stream: bool):
    """The grammar makes this small model write a call as a larger one would."""
    written = '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
    answer = client.chat.completions.create(
        messages=QUESTION,
        tools=[STOP],
        tool_choice="auto",
        max_tokens=60,
        stream=stream,
        extra_body={"structured_outputs": {"choice": [written]}},
        **GREEDY,
    )
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        calls = [call for choice in chunks for call in choice.delta.tool_calls or ()]
        name = calls[0].function.name
        arguments = "".join(call.function.arguments or "" for call in calls)
        reason = chunks[-1].finish_reason
        assert not any(choice.delta.content for choice in chunks)
    else:
        (call,) = answer.choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
        reason = answer.choices[0].finish_reason
    assert (name, arguments, reason) == ("stop", "{}", "tool_calls")


def test_a_conversation_with_tool_results_goes_on(client: openai.OpenAI):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "paint", "arguments": '{"colour": "red", "coats": 1}'},
    }
    messages = [
        {"role": "user", "content": "Paint it red."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    answer = client.chat.completions.create(
        messages=messages, tools=[PAINT], tool_choice="none", max_tokens=4, **GREEDY
    )
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.choices[0].message.tool_calls is None
