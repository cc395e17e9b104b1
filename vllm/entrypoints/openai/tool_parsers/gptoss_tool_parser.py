"""Calls as gpt-oss writes them, in the form that its reasoning parser leaves them in:
``<|channel|>commentary to=functions.NAME<|message|>ARGUMENTS<|call|>``.
"""

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

__all__ = ["GptOssToolParser"]

_BEGIN, _MESSAGE, _END = "<|channel|>commentary to=functions.", "<|message|>", "<|call|>"


class _ChannelScanner(Scanner):
    def __init__(self) -> None:
        self._held = ""
        # "text", "name" or "arguments"
        self._state = "text"

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        marks = {"text": _BEGIN, "name": _MESSAGE, "arguments": _END}
        while self._held:
            mark = marks[self._state]
            before, found, after = self._held.partition(mark)
            if not found:
                if self._state != "name":
                    safe = len(before) - held_back(before, mark)
                    self._add(pieces, before[:safe])
                    self._held = before[safe:]
                break
            self._add(pieces, before)
            self._held = after
            self._state = {"text": "name", "name": "arguments", "arguments": "text"}[self._state]
        return pieces

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._state != "name":
            self._add(pieces, self._held)
        self._held = ""
        return pieces

    def _add(self, pieces: list[Piece], text: str) -> None:
        if self._state == "name":
            pieces.append(CallStart(text))
        elif text:
            pieces.append(Text(text) if self._state == "text" else CallArguments(text))


class GptOssToolParser(ScanningToolParser):
    keeps_special_tokens = True

    def make_scanner(self, request: ChatCompletionRequest) -> Scanner:
        return _ChannelScanner()
