"""Calls written as Python: ``[get_weather(city="Oslo"), add(a=1, b=2)]``.

A call is sent when its closing parenthesis has come: its arguments are no JSON before.
"""

import ast
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
    Text,
    held_back,
)

__all__ = ["Llama4PythonicToolParser", "PythonicToolParser"]

_BETWEEN = " \t\r\n,"
_MARKS = ("<|python_start|>", "<|python_end|>")


class _PythonicScanner(Scanner):
    """An answer is calls only if it begins with ``[``; otherwise it is text to the end."""

    def __init__(self, marks: tuple[str, ...]) -> None:
        self._marks = marks
        self._buffer = ""
        self._state = "start"
        self._raw = ""
        self._num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        return list(self._scan(at_end=False))

    def finish(self) -> list[Piece]:
        return list(self._scan(at_end=True))

    def _scan(self, at_end: bool) -> Generator[Piece, None, None]:
        """What the buffer settles."""
        if self._state == "start" and not self._find_start(at_end):
            return
        while self._state == "calls":
            end = _end_of_call(self._buffer)
            if end is None and not at_end:
                return
            call = _parse_call(self._buffer[:end].lstrip(_BETWEEN)) if end else None
            if call is None:
                # The list has ended, or is none; without any call it was text.
                self._state = "ended" if self._num_calls else "text"
                self._buffer = self._raw + self._buffer
                break
            self._num_calls += 1
            self._buffer = self._buffer[end:]
            yield CallStart(call[0])
            yield CallArguments(call[1])
        if self._state == "text" and self._buffer:
            yield Text(self._buffer)
        self._buffer = ""

    def _find_start(self, at_end: bool) -> bool:
        bare = self._buffer.lstrip()
        for mark in self._marks:
            if bare.startswith(mark):
                bare = bare[len(mark) :].lstrip()
            elif not at_end and bare and held_back(bare, mark) == len(bare):
                return False
        if bare.startswith("["):
            self._raw, self._buffer, self._state = "[", bare[1:], "calls"
        elif bare or at_end:
            self._state = "text"
        else:
            return False
        return True


def _end_of_call(text: str) -> int | None:
    """One past the parenthesis that ends the first call in ``text``; None: it has not come yet;
    0: the list ends before another call."""
    depth = 0
    quote = ""
    escaped = False
    for i, char in enumerate(text):
        if quote:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth < 0:
                return 0
            if depth == 0 and char == ")":
                return i + 1
    return None


def _value(node: ast.expr) -> Any:
    # JSON's words, which models mix in.
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {
            ast.literal_eval(key): _value(value)
            for key, value in zip(node.keys, node.values, strict=True)
            if key is not None
        }
    return ast.literal_eval(node)


def _parse_call(text: str) -> tuple[str, str] | None:
    """Name and arguments (JSON) of ``name(key=value, ...)``; None if it is no such call."""
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        arguments = {item.arg: _value(item.value) for item in call.keywords if item.arg}
        return ast.unparse(call.func), msgspec.json.encode(arguments).decode()
    except (SyntaxError, ValueError, TypeError):
        return None


class PythonicToolParser(ScanningToolParser):
    marks: tuple[str, ...] = ()

    def make_scanner(self, request: ChatCompletionRequest) -> Scanner:
        return _PythonicScanner(self.marks)


class Llama4PythonicToolParser(PythonicToolParser):
    marks = _MARKS
