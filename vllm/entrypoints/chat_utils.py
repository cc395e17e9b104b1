"""Chat messages to one prompt text, through the model's chat template.

Owns the check of messages and their parts, and which template is used with which form of
content. Knows nothing of HTTP or the engine; ``LLM.chat`` and the server both use it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import msgspec
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vllm.errors import ConfigError, UnsupportedError, VLLMValidationError

__all__ = [
    "ChatTemplate",
    "load_chat_template",
    "parse_chat_messages",
    "render_chat",
    "resolve_chat_template",
]

_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_MESSAGE_FIELDS = frozenset(
    ("role", "content", "name", "tool_calls", "tool_call_id", "refusal", "reasoning",
     "reasoning_content")
)  # fmt: skip
# What an answer carries that clients send back in the next turn, empty.
_EMPTY_FIELDS = frozenset(("annotations", "audio", "function_call"))
# Arguments of apply_chat_template itself, which a variable must not replace.
_RESERVED_VARIABLES = frozenset(
    ("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
     "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation",
     "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
     "tokenizer_kwargs")
)  # fmt: skip
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)
# jinja2's parser goes down with the template's nesting.
_PARSE_ERRORS = (jinja2.TemplateSyntaxError, RecursionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A template and how messages must look for it."""

    text: str
    content_format: str
    """"string": content is one string; "openai": a list of ``{"type": "text", "text": ...}``."""
    variables: frozenset[str]
    """What the template reads from outside, such as ``tools`` or ``documents``."""


def load_chat_template(value: str | None) -> str | None:
    """The text of ``--chat-template``: of the file of that name, else ``value`` itself.

    Raises:
        ConfigError: neither a file nor a template.
    """
    if value is None:
        return None
    looks_like_path = "{" not in value and "\n" not in value
    if looks_like_path and not os.path.isfile(value):
        raise ConfigError(
            f"--chat-template: {value!r} is no file and, lacking '{{', no template either",
            parameter="--chat-template",
            value=value,
        )
    try:
        text = Path(value).read_text("utf-8") if looks_like_path else value
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"--chat-template: {value!r} cannot be read as UTF-8 text: {exc}",
            parameter="--chat-template",
            value=value,
        ) from None
    try:
        _parse(text)
    except _PARSE_ERRORS as exc:
        raise ConfigError(
            f"--chat-template: {_parse_error(exc)}", parameter="--chat-template"
        ) from None
    return text


def _parse_error(exc: Exception) -> str:
    if isinstance(exc, jinja2.TemplateSyntaxError):
        return f"line {exc.lineno}: {exc.message}"
    return "its expressions are nested too deeply"


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``, with which templates mark what the model wrote."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@lru_cache(maxsize=16)
def _parse(text: str) -> jinja2.nodes.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    return environment.parse(text)


def _reads_content(node: jinja2.nodes.Node, names: set[str]) -> bool:
    """Whether the expression is ``X.content``, ``X['content']`` or a name assigned from it."""
    while isinstance(node, jinja2.nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, jinja2.nodes.Name):
        return node.name in names
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, jinja2.nodes.Getitem):
        return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
    return False


@lru_cache(maxsize=16)
def _analyse(text: str) -> tuple[str, frozenset[str]]:
    tree = _parse(text)
    names = {
        node.target.name
        for node in tree.find_all(jinja2.nodes.Assign)
        if isinstance(node.target, jinja2.nodes.Name) and _reads_content(node.node, set())
    }
    loops = any(_reads_content(node.iter, names) for node in tree.find_all(jinja2.nodes.For))
    variables = frozenset(jinja2.meta.find_undeclared_variables(tree))
    return "openai" if loops else "string", variables


def resolve_chat_template(
    tokenizer: Any,
    template: str | None,
    *,
    with_tools: bool = False,
    content_format: str = "auto",
) -> ChatTemplate:
    """The template to use: ``template``, else the tokenizer's.

    Args:
        template: text of a template, or the name of one of the tokenizer's several.
        with_tools: prefer the tokenizer's "tool_use" template where it has several.
        content_format: "auto" looks whether the template loops over the parts of a message.

    Raises:
        VLLMValidationError: there is no template, or it is not valid.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict) and (template is None or template in own):
        name = template or ("tool_use" if with_tools and "tool_use" in own else "default")
        text = own.get(name)
    else:
        text = template or own
    if not isinstance(text, str):
        raise VLLMValidationError(
            "this model has no chat template: give one with --chat-template, or use "
            "/v1/completions",
            parameter="chat_template",
        )
    try:
        detected, variables = _analyse(text)
    except _PARSE_ERRORS as exc:
        raise VLLMValidationError(
            f"chat_template: {_parse_error(exc)}", parameter="chat_template"
        ) from None
    return ChatTemplate(
        text=text,
        content_format=detected if content_format == "auto" else content_format,
        variables=variables,
    )


def _error(where: str, what: str) -> VLLMValidationError:
    return VLLMValidationError(f"{where}: {what}", parameter="messages")


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise _error(where, "must be an object with a type")
    kind = part.get("type")
    if not isinstance(kind, str):
        raise _error(where, "type is missing; text parts have type 'text'")
    key = _TEXT_PARTS.get(kind)
    if key is None:
        raise UnsupportedError(
            f"{where}: parts of type {kind[:40]!r} are not supported; this server takes 'text'",
            parameter="messages",
        )
    for name, value in part.items():
        if name not in ("type", key) and value is not None:
            raise _error(where, f"unknown field {name[:40]!r}")
    text = part.get(key)
    if not isinstance(text, str):
        raise _error(where, f"{key} must be a string")
    return text


def _content(message: Mapping[str, Any], where: str, content_format: str) -> Any:
    value = message.get("content")
    if value is None:
        if message["role"] != "assistant":
            raise _error(where, "content is missing")
        refusal = message.get("refusal")
        if refusal is None and not message.get("tool_calls"):
            raise _error(where, "content is missing (an assistant may have tool_calls instead)")
        value = refusal or ""
    if isinstance(value, str):
        texts = [value]
    elif isinstance(value, list):
        texts = [_part_text(part, f"{where}.content[{i}]") for i, part in enumerate(value)]
    else:
        raise _error(where, "content must be a string or a list of parts")
    if content_format == "openai":
        return [{"type": "text", "text": text} for text in texts]
    return "\n".join(texts)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _error(where, "must be an object with a function that has a name")
    if call.get("type", "function") != "function":
        raise UnsupportedError(
            f"{where}: calls of type {str(call['type'])[:40]!r} are not supported; this server "
            "knows 'function'",
            parameter="messages",
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments) if arguments.strip() else {}
        except (msgspec.DecodeError, RecursionError) as exc:
            raise _error(f"{where}.function.arguments", f"not valid JSON: {exc}") from None
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise _error(f"{where}.function.arguments", "must be a JSON object, as a string")
    parsed = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        parsed["id"] = call["id"]
    return parsed


def _parse_message(message: Any, where: str, content_format: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _error(where, "must be an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise _error(where, "role must be a word such as system, user, assistant or tool")
    for name, value in message.items():
        if name in _MESSAGE_FIELDS or value is None:
            continue
        if name not in _EMPTY_FIELDS:
            raise _error(where, f"unknown field {name[:40]!r}")
        if value:
            raise UnsupportedError(
                f"{where}: {name} is not supported; leave it out", parameter="messages"
            )
    parsed: dict[str, Any] = {
        "role": role,
        "content": _content(message, where, content_format),
    }
    for name in ("name", "tool_call_id", "reasoning"):
        value = message.get(name)
        if name == "reasoning" and value is None:
            value = message.get("reasoning_content")
        if value is None:
            continue
        if not isinstance(value, str):
            raise _error(where, f"{name} must be a string")
        parsed[name] = value
    if "reasoning" in parsed:
        # Templates read it under this older name.
        parsed["reasoning_content"] = parsed["reasoning"]
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise _error(where, "tool_calls must be a list")
        if calls and role != "assistant":
            raise _error(where, "tool_calls belong to the assistant")
        if calls:
            parsed["tool_calls"] = [
                _tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
            ]
    return parsed


def parse_chat_messages(messages: Iterable[Any], content_format: str) -> list[dict[str, Any]]:
    """Messages as templates take them, checked.

    Parts become one string (joined by line breaks) or a list, as ``content_format`` says; the
    arguments of tool calls become objects.

    Raises:
        UnsupportedError: a part or call of a type that is not supported.
        VLLMValidationError: a message is malformed; says which and how.
    """
    parsed = [
        _parse_message(message, f"messages[{i}]", content_format)
        for i, message in enumerate(messages)
    ]
    if not parsed:
        raise VLLMValidationError("messages must not be empty", parameter="messages")
    return parsed


def _check_variables(variables: Mapping[str, Any], given: str) -> None:
    for name in variables:
        if name in _RESERVED_VARIABLES:
            raise VLLMValidationError(
                f"{given} must not set {name!r}: it is a field of its own or none at all",
                parameter=given,
            )


def render_chat(
    tokenizer: Any,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text of ``messages`` (as ``parse_chat_messages`` returns them).

    Args:
        variables: further variables of the template (``chat_template_kwargs``).

    Raises:
        VLLMValidationError: the template refuses the messages or fails on them.
    """
    variables = dict(variables or {})
    _check_variables(variables, "chat_template_kwargs")
    if documents and "documents" not in template.variables:
        raise VLLMValidationError(
            "documents: this model's chat template does not read them", parameter="documents"
        )
    if continue_final_message and messages[-1]["role"] != "assistant":
        raise VLLMValidationError(
            "continue_final_message needs an assistant message at the end",
            parameter="continue_final_message",
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template.text,
            tools=list(tools) if tools else None,
            documents=list(documents) if documents else None,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **variables,
        )
    except _TEMPLATE_ERRORS as exc:
        reason = " ".join(str(exc).split())[:300] or type(exc).__name__
        raise VLLMValidationError(
            f"the chat template failed on these messages: {reason}", parameter="messages"
        ) from exc
    assert isinstance(text, str)
    return text
