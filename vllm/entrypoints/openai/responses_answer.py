"""Answers of ``/v1/responses``: the response object, its items, and the events of a stream.

Owns the form of OpenAI's responses on their way out. Knows nothing of where text comes from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from vllm.entrypoints.openai.protocol import DeltaMessage, ToolCall, random_uuid
from vllm.entrypoints.openai.responses_request import ResponsesRequest

__all__ = ["EventWriter", "finish", "items_of", "response_object", "usage_of"]


def response_object(
    request: ResponsesRequest, response_id: str, model: str, created: int
) -> dict[str, Any]:
    """The response as it is when it begins; ``status``, ``output`` and ``usage`` change."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": request.reasoning,
        "store": False,
        "temperature": request.temperature,
        "text": request.text or {"format": {"type": "text"}},
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "top_p": request.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
    }


def usage_of(num_input: int, num_cached: int, num_output: int) -> dict[str, Any]:
    return {
        "input_tokens": num_input,
        "input_tokens_details": {"cached_tokens": num_cached},
        "output_tokens": num_output,
        # Tokens are not told apart, only their text is.
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_input + num_output,
    }


def _reasoning_item(text: str | None, status: str) -> dict[str, Any]:
    content = [] if text is None else [{"type": "reasoning_text", "text": text}]
    return {
        "id": f"rs_{random_uuid()}",
        "type": "reasoning",
        "summary": [],
        "content": content,
        "status": status,
    }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message_item(text: str | None, status: str) -> dict[str, Any]:
    return {
        "id": f"msg_{random_uuid()}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [] if text is None else [_text_part(text)],
    }


def _call_item(name: str, arguments: str, call_id: str, status: str) -> dict[str, Any]:
    return {
        "id": f"fc_{random_uuid()}",
        "type": "function_call",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        "status": status,
    }


def items_of(
    reasoning: str | None, content: str | None, calls: list[ToolCall], status: str
) -> list[dict[str, Any]]:
    """The items of a whole answer; ``status`` is "completed" or "incomplete", of the last one."""
    items = []
    if reasoning:
        items.append(_reasoning_item(reasoning, "completed"))
    if content or not (reasoning or calls):
        items.append(_message_item(content or "", "completed"))
    for call in calls:
        function = call.function
        items.append(_call_item(function.name, function.arguments, call.id, "completed"))
    items[-1]["status"] = status
    return items


class EventWriter:
    """Turns the pieces of an answer into the events of a stream.

    An item is opened by its first piece, and closed by the first piece of another or by the end.
    """

    def __init__(self, response: dict[str, Any]) -> None:
        self._response = response
        self._number = 0
        self._item: dict[str, Any] | None = None
        self._call_index = -1

    def begin(self) -> Iterator[bytes]:
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response)

    def delta(self, delta: DeltaMessage) -> Iterator[bytes]:
        if delta.reasoning:
            yield from self._open("reasoning", lambda: _reasoning_item(None, "in_progress"))
            yield self._text("response.reasoning_text.delta", delta=delta.reasoning)
            self._part()["text"] += delta.reasoning
        if delta.content:
            yield from self._open("message", lambda: _message_item(None, "in_progress"))
            yield self._text("response.output_text.delta", delta=delta.content, logprobs=[])
            self._part()["text"] += delta.content
        for call in delta.tool_calls:
            function = call.function
            assert function is not None
            if call.index != self._call_index:
                yield from self._close("completed")
                self._call_index = call.index
                name, call_id = function.name or "", call.id or ""
                new = _call_item(name, "", call_id, "in_progress")
                yield from self._open("function_call", lambda new=new: new)
            if function.arguments:
                yield self._on_item(
                    "response.function_call_arguments.delta", delta=function.arguments
                )
                assert self._item is not None
                self._item["arguments"] += function.arguments

    def end(self, status: str, usage: dict[str, Any]) -> Iterator[bytes]:
        """The last events; ``status`` is "completed" or "incomplete"."""
        if self._item is None and not self._response["output"]:
            yield from self._open("message", lambda: _message_item(None, "in_progress"))
        yield from self._close(status)
        self._response["usage"] = usage
        finish(self._response, status)
        yield self._event(f"response.{status}", response=self._response)

    # Items

    def _open(self, kind: str, make: Any) -> Iterator[bytes]:
        if self._item is not None and self._item["type"] == kind:
            return
        yield from self._close("completed")
        self._item = make()
        self._response["output"].append(self._item)
        yield self._event("response.output_item.added", output_index=self._index, item=self._item)
        if kind == "function_call":
            return
        empty = {"type": "reasoning_text", "text": ""} if kind == "reasoning" else _text_part("")
        self._item["content"].append(empty)
        if kind == "message":
            yield self._text("response.content_part.added", part=empty)

    def _close(self, status: str) -> Iterator[bytes]:
        item = self._item
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            yield self._on_item(
                "response.function_call_arguments.done",
                name=item["name"],
                arguments=item["arguments"],
            )
        elif item["type"] == "reasoning":
            yield self._text("response.reasoning_text.done", text=self._part()["text"])
        else:
            part = self._part()
            yield self._text("response.output_text.done", text=part["text"], logprobs=[])
            yield self._text("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=self._index, item=item)
        self._item = None

    @property
    def _index(self) -> int:
        return len(self._response["output"]) - 1

    def _part(self) -> dict[str, Any]:
        assert self._item is not None
        return self._item["content"][0]

    def _text(self, kind: str, **fields: Any) -> bytes:
        return self._on_item(kind, content_index=0, **fields)

    def _on_item(self, kind: str, **fields: Any) -> bytes:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=self._index, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = msgspec.json.encode({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), body)


def finish(response: dict[str, Any], status: str) -> None:
    """Give ``response`` its last status: "completed" or "incomplete"."""
    response["status"] = status
    if status == "incomplete":
        response["incomplete_details"] = {"reason": "max_output_tokens"}
