"""Requests of ``/v1/responses``, and the chat request that each of them means.

Owns the form of OpenAI's responses on their way in. Nothing is stored between requests, so what
leads back to an earlier answer is refused. Knows nothing of prompts or answers.
"""

from typing import Any, Literal

from vllm.entrypoints.openai.errors import malformed, unsupported
from vllm.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    LogitBias,
    Stop,
    _Ids,
    _Objects,
    _Strict,
    _Texts,
)

__all__ = ["ResponsesRequest", "chat_fields"]

# Fields that mean the same to chat, by the same name.
_SAME = (
    "model",
    "cache_salt",
    "chat_template_kwargs",
    "frequency_penalty",
    "ignore_eos",
    "include_reasoning",
    "include_stop_str_in_output",
    "kv_transfer_params",
    "logit_bias",
    "min_p",
    "parallel_tool_calls",
    "presence_penalty",
    "priority",
    "repetition_penalty",
    "request_id",
    "seed",
    "skip_special_tokens",
    "stop",
    "stop_token_ids",
    "stream",
    "structured_outputs",
    "temperature",
    "top_k",
    "top_p",
    "user",
    "vllm_xargs",
)
# What an answer that was sent back as input carries beside its text.
_OF_ANSWERS = frozenset(("annotations", "logprobs"))


class ResponsesRequest(_Strict):
    input: str | _Objects
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    tools: _Objects | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = True
    stream: bool | None = None
    include: _Texts | None = None
    truncation: Literal["auto", "disabled"] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: LogitBias = None
    seed: int | None = None
    stop: Stop = None
    stop_token_ids: _Ids | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    include_reasoning: bool = True
    structured_outputs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: int = 0
    request_id: str | None = None
    user: str | None = None
    vllm_xargs: dict[str, Any] | None = None


def chat_fields(request: ResponsesRequest) -> dict[str, Any]:
    """The fields of the ``ChatCompletionRequest`` that means the same.

    Raises:
        UnsupportedError: an item, a tool or a format of a kind that is not supported.
        VLLMValidationError: one that is malformed.
    """
    given = request.model_fields_set
    fields = {name: getattr(request, name) for name in _SAME if name in given}
    assert fields.keys() <= ChatCompletionRequest.model_fields.keys()
    fields["messages"] = _messages(request)
    fields["max_completion_tokens"] = request.max_output_tokens
    if request.tools:
        fields["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools)]
    fields["tool_choice"] = _tool_choice(request.tool_choice)
    fields["response_format"] = _response_format(request.text)
    fields["reasoning_effort"] = _effort(request.reasoning)
    if request.truncation == "auto":
        raise unsupported("truncation", "auto is not supported; shorten the input")
    for name in request.include or ():
        # Reasoning comes as plain text, which may be sent back as it is.
        if name != "reasoning.encrypted_content":
            raise unsupported("include", f"{name[:60]!r} is not supported")
    return fields


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    if not request.input:
        raise malformed("input", "must not be empty")
    reasoning: str | None = None
    for index, item in enumerate(request.input):
        where = f"input[{index}]"
        kind = item.get("type", "message" if "role" in item else None)
        if kind == "reasoning":
            reasoning = _texts(item.get("content") or item.get("summary") or [], where)
            continue
        if kind == "function_call":
            _add_call(messages, item, where)
        elif kind == "function_call_output":
            content = item.get("output")
            if not isinstance(item.get("call_id"), str):
                raise malformed(where, "call_id must be a string")
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": item["call_id"],
                    "content": content if isinstance(content, str) else _parts(content, where),
                }
            )
        elif kind == "message":
            content = item.get("content")
            messages.append(
                {
                    "role": item.get("role"),
                    "content": content if isinstance(content, str) else _parts(content, where),
                }
            )
        else:
            raise unsupported(where, f"items of type {str(kind)[:40]!r} are not supported")
        if reasoning and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning"] = reasoning
        reasoning = None
    return messages


def _add_call(messages: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    """Calls stand in the message that the assistant wrote before them, if there is one."""
    for name in ("call_id", "name", "arguments"):
        if not isinstance(item.get(name), str):
            raise malformed(where, f"{name} must be a string")
    function = {"name": item["name"], "arguments": item["arguments"]}
    call = {"id": item["call_id"], "type": "function", "function": function}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append(call)


def _parts(content: Any, where: str) -> list[Any]:
    if not isinstance(content, list):
        raise malformed(where, "content must be a string or a list of parts")
    return [
        {name: value for name, value in part.items() if name not in _OF_ANSWERS}
        if isinstance(part, dict)
        else part
        for part in content
    ]


def _texts(parts: Any, where: str) -> str:
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts
    ):
        raise malformed(where, "reasoning must be a list of parts with text")
    return "\n".join(part["text"] for part in parts)


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise unsupported(
            where,
            f"tools of type {str(tool.get('type'))[:40]!r} are not supported; this server knows "
            "'function'",
        )
    return {
        "type": "function",
        "function": {name: value for name, value in tool.items() if name != "type"},
    }


def _tool_choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        raise unsupported(
            "tool_choice",
            'takes "none", "auto", "required" or {"type": "function", "name": NAME}',
        )
    return {"type": "function", "function": {"name": choice["name"]}}


def _response_format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    for name, value in (text or {}).items():
        if name not in ("format", "verbosity"):
            raise malformed("text", f"unknown field {name[:40]!r}")
        if name == "verbosity" and value not in (None, "medium"):
            raise unsupported("text.verbosity", f"{str(value)[:40]!r} is not supported")
    given = (text or {}).get("format")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise malformed("text.format", "must be an object")
    if given.get("type") != "json_schema":
        return given
    schema = {name: value for name, value in given.items() if name != "type"}
    return {"type": "json_schema", "json_schema": schema}


def _effort(reasoning: dict[str, Any] | None) -> str | None:
    for name, value in (reasoning or {}).items():
        if name == "effort" or value is None:
            continue
        if name not in ("summary", "generate_summary"):
            raise malformed("reasoning", f"unknown field {name[:40]!r}")
        if value != "auto":
            raise unsupported(f"reasoning.{name}", "there are no summaries; leave it out")
    return (reasoning or {}).get("effort")
