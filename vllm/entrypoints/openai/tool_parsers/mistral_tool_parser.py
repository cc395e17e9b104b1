"""Calls as Mistral models write them, after ``[TOOL_CALLS]``: a JSON list of calls, or (from
the v11 tokenizer on) ``NAME{...}`` or ``NAME[ARGS]{...}``, each after its own mark."""

import random
import string
from collections.abc import Generator

from vllm.entrypoints.openai.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.tool_parsers.abstract_tool_parser import ScanningToolParser
from vllm.entrypoints.openai.tool_parsers.scanners import (
    CallArguments,
    CallStart,
    JSONCallList,
    JSONValue,
    Piece,
    Scanner,
    TextRun,
    held_back,
)

__all__ = ["MistralToolParser"]

_MARK = "[TOOL_CALLS]"
_ARGS = "[ARGS]"
_ID_LENGTH = 9


class _MistralScanner(Scanner):
    def __init__(self) -> None:
        self._buffer = ""
        self._run = TextRun()
        self._list: JSONCallList | None = None
        self._state = "text"
        self._value = JSONValue()

    def feed(self, text: str) -> list[Piece]:
        if self._list is not None:
            return self._list.feed(text)
        self._buffer += text
        return list(self._scan(at_end=False))

    def finish(self) -> list[Piece]:
        if self._list is not None:
            return []
        return [*self._scan(at_end=True), *self._run.end()]

    def _scan(self, at_end: bool) -> Generator[Piece, None, None]:
        goes_on = True
        while goes_on:
            if self._state == "text":
                goes_on = yield from self._scan_text(at_end)
            elif self._state == "name":
                goes_on = yield from self._scan_name(at_end)
            else:
                goes_on = yield from self._scan_arguments()

    def _scan_text(self, at_end: bool) -> Generator[Piece, None, bool]:
        before, mark, after = self._buffer.partition(_MARK)
        held = 0 if at_end or mark else held_back(self._buffer, _MARK)
        end = len(before) - held
        yield from self._run.push(before[:end])
        self._buffer = after if mark else before[end:]
        if mark:
            self._state = "name"
        return bool(mark)

    def _scan_name(self, at_end: bool) -> Generator[Piece, None, bool]:
        bare = self._buffer.lstrip()
        if bare.startswith("["):
            if not at_end and held_back(bare, _ARGS) == len(bare) and len(bare) > 1:
                return False
            self._run.call_begins()
            self._list = JSONCallList()
            yield from self._list.feed(bare)
            self._buffer = ""
            return False
        name, brace, arguments = bare.partition("{")
        if not brace:
            if at_end:
                yield from self._run.push(_MARK + self._buffer)
                self._buffer = ""
            return False
        self._run.call_begins()
        yield CallStart(name.removesuffix(_ARGS).strip())
        self._buffer = brace + arguments
        self._value = JSONValue()
        self._state = "arguments"
        return True

    def _scan_arguments(self) -> Generator[Piece, None, bool]:
        taken = 0
        while taken < len(self._buffer) and not self._value.done:
            self._value.takes(self._buffer[taken])
            taken += 1
        if taken:
            yield CallArguments(self._buffer[:taken])
        self._buffer = self._buffer[taken:]
        if self._value.done:
            self._state = "text"
        return self._value.done


class MistralToolParser(ScanningToolParser):
    keeps_special_tokens = True

    def make_scanner(self, request: ChatCompletionRequest) -> Scanner:
        return _MistralScanner()

    def make_id(self) -> str:
        # Mistral's templates refuse ids of another form.
        return "".join(random.choices(string.ascii_letters + string.digits, k=_ID_LENGTH))
