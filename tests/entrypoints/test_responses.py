"""``/v1/responses`` through OpenAI's own client, and what its requests mean."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.entrypoints.server import MODEL, Server
from vllm.entrypoints.openai.http import validate
from vllm.entrypoints.openai.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses_request import ResponsesRequest, chat_fields
from vllm.errors import VLLMValidationError

QUESTION = "What is the capital of France?"
TOOL = {
    "type": "function",
    "name": "look_up",
    "description": "Looks something up.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 6}},
        "required": ["city"],
    },
}


class Colour(BaseModel):
    name: Literal["red", "blue"]


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    fields = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 60} | fields
    return client.responses.create(**fields)


def test_a_question_is_answered_as_chat_answers_it(client: openai.OpenAI):
    response = ask(client, instructions="You are brief.", metadata={"a": "b"})
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": QUESTION},
        ],
        temperature=0,
        max_tokens=60,
    )
    assert response.output_text == chat.choices[0].message.content
    by_length = chat.choices[0].finish_reason == "length"
    assert response.status == ("incomplete" if by_length else "completed")
    assert response.metadata == {"a": "b"}
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert response.id.startswith("resp-")


def test_a_stream_builds_the_same_response(client: openai.OpenAI):
    whole = ask(client)
    events = list(ask(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.total_tokens == whole.usage.total_tokens


def test_the_clients_stream_helper_reads_it(client: openai.OpenAI):
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text != ""


def test_an_answer_that_is_cut_off_is_incomplete(client: openai.OpenAI):
    for stream in (False, True):
        response = ask(client, max_output_tokens=2, stream=stream)
        if stream:
            *_, last = response
            assert last.type == "response.incomplete"
            response = last.response
        assert response.status == response.output[-1].status == "incomplete"
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.usage.output_tokens == 2


def test_an_answer_has_the_form_of_a_schema(client: openai.OpenAI):
    response = client.responses.parse(
        model=MODEL, input="Red as JSON", text_format=Colour, temperature=0, max_output_tokens=60
    )
    assert isinstance(response.output_parsed, Colour)


@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_their_results_go_back_and_forth(client: openai.OpenAI, stream: bool):
    response = ask(client, tools=[TOOL], tool_choice="required", stream=stream)
    if stream:
        events = list(response)
        response = events[-1].response
        pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
        assert "".join(pieces) == response.output[0].arguments
    call = response.output[0]
    assert (call.type, call.name) == ("function_call", "look_up")
    assert json.loads(call.arguments).keys() == {"city"}
    answer = ask(
        client,
        input=[
            {"role": "user", "content": QUESTION},
            call.model_dump(exclude_none=True),
            {"type": "function_call_output", "call_id": call.call_id, "output": "Paris"},
        ],
        tools=[TOOL],
        tool_choice="none",
    )
    assert answer.output_text


def test_items_become_messages():
    request = ResponsesRequest.model_validate(
        {
            "instructions": "Be brief.",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "reasoning", "summary": [], "content": [{"text": "Hm."}]},
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "Yes?", "annotations": []}],
                },
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "one"},
            ],
            "tools": [TOOL],
            "tool_choice": {"type": "function", "name": "look_up"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}},
            "reasoning": {"effort": "low", "summary": "auto"},
            "max_output_tokens": 7,
            "top_k": 5,
        }
    )
    fields = chat_fields(request)
    system, user, assistant, tool = fields["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert assistant["reasoning"] == "Hm."
    assert assistant["content"] == [{"type": "output_text", "text": "Yes?"}]
    assert [call["id"] for call in assistant["tool_calls"]] == ["1", "2"]
    assert tool == {"role": "tool", "tool_call_id": "1", "content": "one"}
    chat = validate(ChatCompletionRequest, "chat", fields)
    assert chat.tools[0].function.name == chat.tool_choice.function.name == "look_up"
    assert chat.response_format.constraint().json == {}
    assert (chat.max_output_tokens(), chat.top_k, chat.reasoning_effort) == (7, 5, "low")


@pytest.mark.parametrize(
    ("fields", "parameter", "word"),
    [
        ({"store": True}, "store", "not stored"),
        ({"previous_response_id": "resp-1"}, "previous_response_id", "vLLM has this field"),
        ({"background": True}, "background", "vLLM has this field"),
        ({"tools": [{"type": "web_search"}]}, "tools", "'web_search'"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice", '"name": NAME'),
        ({"input": []}, "input", "must not be empty"),
        ({"input": [{"type": "computer_call"}]}, "input", "'computer_call'"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input", "call_id"),
        ({"input": [{"role": "user", "content": 3}]}, "input", "content must be"),
        ({"include": ["file_search_call.results"]}, "include", "file_search_call"),
        ({"truncation": "auto"}, "truncation", "auto is not supported"),
        ({"text": {"verbosity": "low"}}, "text", "'low'"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning", "no summaries"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"zzz": 1}, "zzz", "unknown field"),
    ],
)
def test_what_is_not_supported_is_named(fields: dict, parameter: str, word: str):
    with pytest.raises(VLLMValidationError) as error:
        chat_fields(validate(ResponsesRequest, "responses", {"input": "hi", **fields}))
    assert error.value.parameter == parameter
    assert word in str(error.value)


def test_errors_have_their_status(server: Server):
    refused = server.post("/v1/responses", {"model": "other", "input": "hi"})
    assert refused.status_code == 404
    refused = server.post("/v1/responses", {"input": "hi", "max_output_tokens": 0, "stream": True})
    assert refused.status_code == 400
