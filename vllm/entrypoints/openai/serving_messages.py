"""``/v1/messages``: Anthropic's messages, answered by what answers chats.

Owns the passage between the two forms, and the events of a stream.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from vllm.entrypoints.openai.errors import error_info
from vllm.entrypoints.openai.http import EventStream, JSONBytes, until_disconnect, validate
from vllm.entrypoints.openai.messages_request import (
    CountTokensRequest,
    MessagesRequest,
    chat_fields,
)
from vllm.entrypoints.openai.protocol import ChatCompletionRequest, DeltaMessage
from vllm.entrypoints.openai.serving_chat import ChatJob, OpenAIServingChat
from vllm.entrypoints.openai.tool_choice import AnswerReader
from vllm.outputs import CompletionOutput

__all__ = ["AnthropicServingMessages"]


class AnthropicServingMessages:
    """Answers requests by ``chat``."""

    def __init__(self, chat: OpenAIServingChat) -> None:
        self._chat = chat

    async def create_message(self, request: MessagesRequest, raw: Request) -> Response:
        """Answer a request, as a stream or whole; raises what the HTTP edge turns into errors."""
        chat = validate(ChatCompletionRequest, "chat", chat_fields(request))
        job = await self._chat.prepare(chat, raw, "msg")
        if request.stream:
            return EventStream(self._stream(job), end=b"", error_event=_error_event)
        return await until_disconnect(raw, self._respond(job))

    async def count_tokens(self, request: CountTokensRequest) -> Response:
        """The tokens of the prompt that the messages become."""
        chat = validate(ChatCompletionRequest, "chat", chat_fields(request))
        count = await self._chat.count_prompt_tokens(chat)
        return JSONBytes(msgspec.json.encode({"input_tokens": count}))

    async def _respond(self, job: ChatJob) -> Response:
        final = await self._chat.last_output(job)
        (output,) = final.outputs
        self._chat.log_output(job.response_id, output.text)
        reader = job.make_reader()
        reasoning, content, calls = reader.read(output.text)
        blocks: list[dict[str, Any]] = []
        if reasoning:
            blocks.append(_thinking(reasoning))
        if content:
            blocks.append({"type": "text", "text": content})
        for call in calls:
            try:
                arguments = msgspec.json.decode(call.function.arguments or "{}")
            except msgspec.DecodeError:
                # Cut off by max_tokens, as the stop reason says: half a call is none.
                continue
            blocks.append(_tool_use(call.id, call.function.name, arguments))
        message = {
            **_message(job),
            "content": blocks,
            **_stop(reader, output),
            "usage": _usage(job, final.num_cached_tokens, len(output.token_ids)),
        }
        if final.kv_transfer_params is not None:
            message["kv_transfer_params"] = final.kv_transfer_params
        return JSONBytes(msgspec.json.encode(message))

    async def _stream(self, job: ChatJob) -> AsyncGenerator[bytes, None]:
        blocks = _BlockWriter()
        reader = job.make_reader()
        num_output = 0
        begun = False
        stop: dict[str, Any] = {}
        async for result in self._chat.outputs(job):
            # Not before the engine has taken the request: an error has a status of its own.
            if not begun:
                begun = True
                usage = _usage(job, result.num_cached_tokens, 0)
                yield _event("message_start", message={**_message(job), "usage": usage})
            for output in result.outputs:
                num_output += len(output.token_ids)
                self._chat.log_output(job.response_id, output.text, is_delta=True)
                for delta in filter(None, reader.deltas(output)):
                    for event in blocks.delta(delta):
                        yield event
                if output.finish_reason is not None:
                    stop = _stop(reader, output)
        for event in blocks.close():
            yield event
        yield _event("message_delta", delta=stop, usage={"output_tokens": num_output})
        yield _event("message_stop")


class _BlockWriter:
    """Turns the pieces of an answer into events of blocks, one block after the other."""

    def __init__(self) -> None:
        self._index = -1
        self._kind: str | None = None
        self._call_index = -1

    def delta(self, delta: DeltaMessage) -> Iterator[bytes]:
        if delta.reasoning:
            yield from self._open("thinking", _thinking(""))
            yield self._delta({"type": "thinking_delta", "thinking": delta.reasoning})
        if delta.content:
            yield from self._open("text", {"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": delta.content})
        for call in delta.tool_calls:
            function = call.function
            assert function is not None
            if call.index != self._call_index:
                yield from self.close()
                self._call_index = call.index
                block = _tool_use(call.id or "", function.name or "", {})
                yield from self._open("tool_use", block)
            if function.arguments:
                piece = {"type": "input_json_delta", "partial_json": function.arguments}
                yield self._delta(piece)

    def close(self) -> Iterator[bytes]:
        if self._kind is not None:
            self._kind = None
            yield _event("content_block_stop", index=self._index)

    def _open(self, kind: str, block: dict[str, Any]) -> Iterator[bytes]:
        if self._kind == kind:
            return
        yield from self.close()
        self._kind = kind
        self._index += 1
        yield _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    body = msgspec.json.encode({"type": kind, **fields})
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), body)


def _error_event(exc: Exception) -> bytes:
    error = {"type": "api_error", "message": error_info(exc).message}
    return _event("error", error=error)


def _thinking(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": ""}


def _tool_use(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def _message(job: ChatJob) -> dict[str, Any]:
    return {
        "id": job.response_id,
        "type": "message",
        "role": "assistant",
        "model": job.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _usage(job: ChatJob, num_cached: int | None, num_output: int) -> dict[str, int]:
    cached = num_cached or 0
    return {
        "input_tokens": len(job.prompt.token_ids) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": num_output,
    }


def _stop(reader: AnswerReader, output: CompletionOutput) -> dict[str, Any]:
    sequence = output.stop_reason if isinstance(output.stop_reason, str) else None
    if output.finish_reason == "length":
        reason = "max_tokens"
    elif reader.has_calls:
        reason = "tool_use"
    else:
        reason = "end_turn" if sequence is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": sequence}
