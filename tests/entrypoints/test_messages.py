"""``/v1/messages``: Anthropic's form of requests, answers and streams."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.entrypoints.server import SMALL, TINY, Server
from vllm.entrypoints.openai.http import validate
from vllm.entrypoints.openai.messages_request import MessagesRequest, chat_fields
from vllm.entrypoints.openai.protocol import ChatCompletionRequest
from vllm.errors import VLLMValidationError

HELLO = [{"role": "user", "content": "What is the capital of France, and why?"}]
BODY = {"model": "smollm2", "messages": HELLO, "max_tokens": 24, "temperature": 0}
TOOL = {
    "name": "look_up",
    "description": "Looks something up.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 6}},
        "required": ["city"],
    },
}


def events_of(server: Server, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = server.post("/v1/messages", {**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for text in answer.text.strip().split("\n\n"):
        name, data = text.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def built(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of the events."""
    assert events[0]["type"] == "message_start"
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    message = events[0]["message"]
    for event in events[1:-2]:
        index = event["index"]
        if event["type"] == "content_block_start":
            assert index == len(message["content"])
            message["content"].append({**event["content_block"], "json": ""})
            continue
        block = message["content"][index]
        if event["type"] == "content_block_stop":
            if block["type"] == "tool_use":
                block["input"] = json.loads(block["json"])
            del block["json"]
            continue
        delta = event["delta"]
        for name, key in (("text", "text"), ("thinking", "thinking"), ("partial_json", "json")):
            if name in delta:
                block[key] += delta[name]
    message |= events[-2]["delta"]
    message["usage"]["output_tokens"] = events[-2]["usage"]["output_tokens"]
    return message


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    message = {name: value for name, value in message.items() if name not in ("id", "usage")}
    message["content"] = [
        {name: value for name, value in block.items() if name != "id"}
        for block in message["content"]
    ]
    return message


def test_a_message_is_answered_as_chat_answers_it(server: Server):
    message = server.post("/v1/messages", {**BODY, "system": "Be kind."}).json()
    chat = server.post(
        "/v1/chat/completions",
        {**BODY, "messages": [{"role": "system", "content": "Be kind."}, *HELLO]},
    ).json()
    choice = chat["choices"][0]
    assert message["content"] == [{"type": "text", "text": choice["message"]["content"]}]
    expected = {"length": "max_tokens", "stop": "end_turn"}[choice["finish_reason"]]
    assert (message["type"], message["role"]) == ("message", "assistant")
    assert (message["stop_reason"], message["stop_sequence"]) == (expected, None)
    usage = message["usage"]
    assert (
        usage["input_tokens"] + usage["cache_read_input_tokens"] == chat["usage"]["prompt_tokens"]
    )
    assert usage["output_tokens"] == chat["usage"]["completion_tokens"]
    count = server.post("/v1/messages/count_tokens", {"system": "Be kind.", "messages": HELLO})
    assert count.json() == {"input_tokens": chat["usage"]["prompt_tokens"]}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [TOOL], "tool_choice": {"type": "any"}, "max_tokens": 60},
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "look_up"}, "max_tokens": 60},
    ],
    ids=["text", "any", "tool"],
)
def test_a_stream_builds_the_same_message(server: Server, fields: dict[str, Any]):
    whole = server.post("/v1/messages", {**BODY, **fields}).json()
    message = built(events_of(server, {**BODY, **fields}))
    assert without_ids(message) == without_ids(whole)
    assert message["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    if fields:
        (block,) = whole["content"]
        assert (block["type"], block["name"]) == ("tool_use", "look_up")
        assert block["input"].keys() == {"city"}
        assert whole["stop_reason"] == "tool_use"


def test_a_stop_sequence_is_named(server: Server):
    text = server.post("/v1/messages", BODY).json()["content"][0]["text"]
    word = text[2:5]
    message = server.post("/v1/messages", {**BODY, "stop_sequences": [word]}).json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", word)
    assert "".join(block["text"] for block in message["content"]) == text.partition(word)[0]


def test_blocks_become_messages():
    request = MessagesRequest.model_validate(
        {
            "max_tokens": 5,
            "system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "e"}}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Hm.", "signature": ""},
                        {"type": "text", "text": "I look."},
                        {"type": "tool_use", "id": "1", "name": "f", "input": {"a": "ü"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "1", "content": "sun"},
                        {"type": "text", "text": "And now?"},
                    ],
                },
            ],
            "tools": [TOOL],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
            "thinking": {"type": "disabled"},
            "metadata": {"user_id": "u"},
        }
    )
    fields = chat_fields(request)
    assert fields["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"a": "ü"}'},
                }
            ],
            "reasoning": "Hm.",
        },
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
        {"role": "user", "content": "And now?"},
    ]
    chat = validate(ChatCompletionRequest, "chat", fields)
    assert chat.tools[0].function.parameters == TOOL["input_schema"]
    assert (chat.tool_choice, chat.parallel_tool_calls, chat.user) == ("auto", False, "u")
    assert chat.chat_template_kwargs == {"enable_thinking": False, "thinking": False}


@pytest.mark.parametrize(
    ("fields", "parameter", "word"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", "content must be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages",
            "'image' are not supported",
        ),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools", "bash_20250124"),
        ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice", "auto, any, tool"),
        ({"thinking": {"type": "hard"}}, "thinking", "enabled, disabled"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config", "json_schema"),
        ({"max_tokens": "many"}, "max_tokens", "integer"),
        ({"zzz": 1}, "zzz", "unknown field"),
    ],
)
def test_what_is_not_supported_is_named(fields: dict, parameter: str, word: str):
    body = {"messages": HELLO, "max_tokens": 3, **fields}
    with pytest.raises(VLLMValidationError) as error:
        chat_fields(validate(MessagesRequest, "messages", body))
    assert error.value.parameter == parameter
    assert word in str(error.value)


def test_keys_of_anthropics_clients_and_reasoning(tmp_path):
    """One server for both: it starts once."""
    options = (*TINY, *SMALL, "--reasoning-parser", "deepseek_r1", "--api-key", "secret")
    with Server(tmp_path / "log", *options, api_key="secret") as server:
        body = {**BODY, "max_tokens": 5}
        refused, answered = (
            httpx.post(f"{server.url}/v1/messages", json=body, headers={"x-api-key": key})
            for key in ("other", "secret")
        )
        assert (refused.status_code, answered.status_code) == (401, 200)
        answered = answered.json()
        (block,) = answered["content"]
        assert (block["type"], block["signature"]) == ("thinking", "")
        assert answered["stop_reason"] == "max_tokens"
