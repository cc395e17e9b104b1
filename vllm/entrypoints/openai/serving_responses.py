"""``/v1/responses``: OpenAI's responses, answered by what answers chats.

Owns the passage between the two forms. Nothing is stored.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from vllm.entrypoints.openai.http import EventStream, JSONBytes, until_disconnect, validate
from vllm.entrypoints.openai.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses_answer import (
    EventWriter,
    finish,
    items_of,
    response_object,
    usage_of,
)
from vllm.entrypoints.openai.responses_request import ResponsesRequest, chat_fields
from vllm.entrypoints.openai.serving_chat import ChatJob, OpenAIServingChat

__all__ = ["OpenAIServingResponses"]


class OpenAIServingResponses:
    """Answers requests by ``chat``."""

    def __init__(self, chat: OpenAIServingChat) -> None:
        self._chat = chat

    async def create_response(self, request: ResponsesRequest, raw: Request) -> Response:
        """Answer a request, as a stream or whole; raises what the HTTP edge turns into errors."""
        chat = validate(ChatCompletionRequest, "chat", chat_fields(request))
        job = await self._chat.prepare(chat, raw, "resp")
        response = response_object(request, job.response_id, job.model, job.created)
        if request.stream:
            return EventStream(self._stream(job, response))
        return await until_disconnect(raw, self._respond(job, response))

    async def _respond(self, job: ChatJob, response: dict[str, Any]) -> Response:
        final = await self._chat.last_output(job)
        (output,) = final.outputs
        self._chat.log_output(job.response_id, output.text)
        status = _status(output.finish_reason)
        response["output"] = items_of(*job.make_reader().read(output.text), status)
        finish(response, status)
        response["usage"] = usage_of(
            len(job.prompt.token_ids), final.num_cached_tokens or 0, len(output.token_ids)
        )
        if final.kv_transfer_params is not None:
            response["kv_transfer_params"] = final.kv_transfer_params
        return JSONBytes(msgspec.json.encode(response))

    async def _stream(self, job: ChatJob, response: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        writer = EventWriter(response)
        reader = job.make_reader()
        num_output, num_cached = 0, 0
        begun = False
        status = "completed"
        async for result in self._chat.outputs(job):
            # Not before the engine has taken the request: an error has a status of its own.
            if not begun:
                begun = True
                for event in writer.begin():
                    yield event
            num_cached = result.num_cached_tokens or 0
            for output in result.outputs:
                num_output += len(output.token_ids)
                self._chat.log_output(job.response_id, output.text, is_delta=True)
                if output.finish_reason is not None:
                    status = _status(output.finish_reason)
                for delta in filter(None, reader.deltas(output)):
                    for event in writer.delta(delta):
                        yield event
            if result.kv_transfer_params is not None:
                response["kv_transfer_params"] = result.kv_transfer_params
        usage = usage_of(len(job.prompt.token_ids), num_cached, num_output)
        for event in writer.end(status, usage):
            yield event


def _status(finish_reason: str | None) -> str:
    return "incomplete" if finish_reason == "length" else "completed"
