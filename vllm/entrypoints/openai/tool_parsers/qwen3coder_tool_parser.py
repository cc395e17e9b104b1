"""Calls as Qwen3-Coder writes them:

<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>

Values are bare text; the tool's schema says which are numbers, lists and so on. A call is sent
when it is whole.
"""

import re
from collections.abc import Generator
from typing import Any

import msgspec

from vllm.entrypoints.openai.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.tool_parsers.abstract_tool_parser import ScanningToolParser
from vllm.entrypoints.openai.tool_parsers.scanners import (
    CallArguments,
    CallStart,
    Piece,
    Scanner,
    TextRun,
    held_back,
)

__all__ = ["Qwen3CoderToolParser"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>]+)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)


class _Qwen3CoderScanner(Scanner):
    def __init__(self, schemas: dict[str, dict[str, Any]]) -> None:
        self._schemas = schemas
        self._buffer = ""
        self._in_call = False
        self._run = TextRun()

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        return list(self._scan(at_end=False))

    def finish(self) -> list[Piece]:
        return [*self._scan(at_end=True), *self._run.end()]

    def _scan(self, at_end: bool) -> Generator[Piece, None, None]:
        while True:
            tag = _CLOSE if self._in_call else _OPEN
            before, found, after = self._buffer.partition(tag)
            if not self._in_call:
                held = 0 if at_end or found else held_back(before, tag)
                end = len(before) - held
                yield from self._run.push(before[:end])
                self._buffer = after if found else before[end:]
                if not found:
                    return
            elif found or at_end:
                yield from self._call(before)
                self._buffer = after
            else:
                return
            self._in_call = not self._in_call

    def _call(self, body: str) -> Generator[Piece, None, None]:
        match = _FUNCTION.match(body)
        if match is None:
            yield from self._run.push(_OPEN + body)
            return
        name, inner = match.groups()
        properties = self._schemas.get(name, {}).get("properties", {})
        arguments = {
            key.strip(): _typed(value, properties.get(key.strip(), {}))
            for key, value in _PARAMETER.findall(inner)
        }
        self._run.call_begins()
        yield CallStart(name)
        yield CallArguments(msgspec.json.encode(arguments).decode())


def _typed(text: str, schema: Any) -> Any:
    """``text`` as the type that ``schema`` asks for; as a string where it is none."""
    text = text.removeprefix("\n").removesuffix("\n")
    kind = schema.get("type", "string") if isinstance(schema, dict) else "string"
    if kind == "string":
        return text
    try:
        return msgspec.json.decode(text.strip())
    except msgspec.DecodeError:
        words = {"True": True, "False": False, "None": None}
        return words.get(text.strip(), text)


class Qwen3CoderToolParser(ScanningToolParser):
    keeps_special_tokens = True

    def make_scanner(self, request: ChatCompletionRequest) -> Scanner:
        return _Qwen3CoderScanner(
            {tool.function.name: tool.function.parameters or {} for tool in request.tools or ()}
        )
