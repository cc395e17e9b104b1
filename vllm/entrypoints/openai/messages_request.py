"""Requests of ``/v1/messages`` (Anthropic's), and the chat request that each of them means.

Owns the form of such requests. Knows nothing of prompts or answers.
"""

import json
from typing import Any

from vllm.entrypoints.openai.errors import malformed, unsupported
from vllm.entrypoints.openai.protocol import ChatCompletionRequest, _Strict

__all__ = ["CountTokensRequest", "MessagesRequest", "chat_fields"]

_SAME = (
    "model",
    "cache_salt",
    "chat_template_kwargs",
    "kv_transfer_params",
    "stream",
    "temperature",
    "top_k",
    "top_p",
    "vllm_xargs",
)
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class CountTokensRequest(_Strict):
    messages: list[dict[str, Any]]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest):
    max_tokens: int
    metadata: dict[str, Any] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None
    vllm_xargs: dict[str, Any] | None = None


def chat_fields(request: CountTokensRequest) -> dict[str, Any]:
    """The fields of the ``ChatCompletionRequest`` that means the same.

    Raises:
        UnsupportedError: a block or a tool of a kind that is not supported.
        VLLMValidationError: one that is malformed.
    """
    given = request.model_fields_set
    fields = {name: getattr(request, name) for name in _SAME if name in given}
    assert fields.keys() <= ChatCompletionRequest.model_fields.keys()
    messages: list[dict[str, Any]] = []
    if request.system:
        messages.append({"role": "system", "content": _text(request.system, "system")})
    for index, message in enumerate(request.messages):
        messages += _messages(message, f"messages[{index}]")
    fields["messages"] = messages
    if isinstance(request, MessagesRequest):
        fields["max_completion_tokens"] = request.max_tokens
        fields["stop"] = request.stop_sequences or None
        fields["user"] = (request.metadata or {}).get("user_id")
    if request.tools:
        fields["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(request.tools)]
        _choose_tools(request.tool_choice, fields)
    _configure_output(request.output_config, fields)
    _switch_thinking(request.thinking, fields)
    return fields


def _text(content: Any, where: str) -> str:
    """Text, or blocks of text; what they say of caching is what this server does anyway."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise malformed(where, "must be a string or a list of blocks")
    texts = []
    for index, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind != "text":
            raise unsupported(
                f"{where}[{index}]",
                f"blocks of type {str(kind)[:40]!r} are not supported here; this server takes "
                "'text'",
            )
        if not isinstance(block.get("text"), str):
            raise malformed(f"{where}[{index}]", "text must be a string")
        texts.append(block["text"])
    return "\n".join(texts)


def _messages(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """One message is several where the results of tools stand beside text."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise malformed(where, "role must be user or assistant")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise malformed(where, "content must be a string or a list of blocks")
    texts: list[Any] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    reasoning: list[str] = []
    for index, block in enumerate(content):
        at = f"{where}.content[{index}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use" and role == "assistant":
            calls.append(_call(block, at))
        elif kind == "tool_result" and role == "user":
            results.append(_result(block, at))
        elif kind == "thinking" and role == "assistant":
            if not isinstance(block.get("thinking"), str):
                raise malformed(at, "thinking must be a string")
            reasoning.append(block["thinking"])
        else:
            texts.append(block)
    made: list[dict[str, Any]] = results
    if texts or calls or not results:
        text = _text(texts, f"{where}.content")
        said: dict[str, Any] = {"role": role, "content": text if text or not calls else None}
        if calls:
            said["tool_calls"] = calls
        if reasoning:
            said["reasoning"] = "\n".join(reasoning)
        made.append(said)
    return made


def _call(block: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(block.get("name"), str) or not isinstance(block.get("id"), str):
        raise malformed(where, "id and name must be strings")
    if not isinstance(block.get("input", {}), dict):
        raise malformed(where, "input must be an object")
    arguments = json.dumps(block.get("input", {}), ensure_ascii=False)
    function = {"name": block["name"], "arguments": arguments}
    return {"id": block["id"], "type": "function", "function": function}


def _result(block: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(block.get("tool_use_id"), str):
        raise malformed(where, "tool_use_id must be a string")
    text = _text(block.get("content") or "", f"{where}.content")
    return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": text}


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type", "custom") != "custom":
        raise unsupported(
            where, f"tools of type {str(tool['type'])[:40]!r} are not supported; give input_schema"
        )
    function = {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("input_schema"),
    }
    return {"type": "function", "function": function}


def _choose_tools(choice: dict[str, Any] | None, fields: dict[str, Any]) -> None:
    if choice is None:
        return
    kind = choice.get("type")
    if kind == "tool":
        named = {"type": "function", "function": {"name": choice.get("name")}}
        fields["tool_choice"] = named
    elif kind in _TOOL_CHOICES:
        fields["tool_choice"] = _TOOL_CHOICES[kind]
    else:
        raise malformed("tool_choice", "type must be auto, any, tool or none")
    if choice.get("disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False


def _configure_output(config: dict[str, Any] | None, fields: dict[str, Any]) -> None:
    for name, value in (config or {}).items():
        if value is None:
            continue
        if name == "effort":
            fields["reasoning_effort"] = value
        elif name == "format" and isinstance(value, dict) and value.get("type") == "json_schema":
            schema = {"name": "answer", "schema": value.get("schema")}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        else:
            raise unsupported(f"output_config.{name}", "takes effort, and a format of json_schema")


def _switch_thinking(thinking: dict[str, Any] | None, fields: dict[str, Any]) -> None:
    """Templates of models that think at will read one of two variables; a budget is a wish."""
    if thinking is None:
        return
    kind = thinking.get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise malformed("thinking", "type must be enabled, disabled or adaptive")
    if kind == "adaptive":
        return
    switches = {"enable_thinking": kind == "enabled", "thinking": kind == "enabled"}
    fields["chat_template_kwargs"] = {**switches, **(fields.get("chat_template_kwargs") or {})}
