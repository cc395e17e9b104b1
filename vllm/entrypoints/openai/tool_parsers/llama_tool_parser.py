"""Calls as Llama 3 writes them: the answer is ``{"name": ..., "parameters": ...}``, several of
them separated by ``;``, perhaps after ``<|python_tag|>``."""

from collections.abc import Generator

from vllm.entrypoints.openai.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.tool_parsers.abstract_tool_parser import ScanningToolParser
from vllm.entrypoints.openai.tool_parsers.scanners import (
    JSONCall,
    Piece,
    Scanner,
    Text,
    held_back,
)

__all__ = ["Llama3JsonToolParser"]

_BOT_TOKEN = "<|python_tag|>"
_BETWEEN = " \t\r\n;,"


class _LlamaScanner(Scanner):
    """An answer is calls only if it begins with one; otherwise it is text to the end."""

    def __init__(self) -> None:
        self._buffer = ""
        self._call: JSONCall | None = None
        self._is_text = False
        self._num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        return list(self._scan(at_end=False))

    def finish(self) -> list[Piece]:
        return list(self._scan(at_end=True))

    def _scan(self, at_end: bool) -> Generator[Piece, None, None]:
        while True:
            if self._is_text:
                if self._buffer:
                    yield Text(self._buffer)
                self._buffer = ""
                return
            if self._call is None and not self._find_call(at_end):
                return
            if self._call is not None and not (yield from self._scan_call(self._call, at_end)):
                return

    def _find_call(self, at_end: bool) -> bool:
        """Look for the next object; whether there is more to do."""
        bare = self._buffer.lstrip(_BETWEEN if self._num_calls else None)
        if bare.startswith(_BOT_TOKEN):
            bare = bare[len(_BOT_TOKEN) :].lstrip()
        if bare.startswith("{"):
            self._call = JSONCall()
            self._buffer = bare
        elif bare and not at_end and held_back(bare, _BOT_TOKEN) == len(bare):
            return False
        elif bare or at_end:
            self._is_text = True
            if self._num_calls:
                # Models explain or repeat themselves after a call; that is not the answer.
                self._buffer = ""
        else:
            return False
        return True

    def _scan_call(self, call: JSONCall, at_end: bool) -> Generator[Piece, None, bool]:
        pieces, used = call.feed(self._buffer)
        self._buffer = self._buffer[used:]
        yield from pieces
        if not (call.done or call.failed or at_end):
            return False
        self._call = None
        if call.started:
            self._num_calls += 1
        else:
            self._is_text = True
            self._buffer = "" if self._num_calls else call.raw + self._buffer
        return True


class Llama3JsonToolParser(ScanningToolParser):
    def make_scanner(self, request: ChatCompletionRequest) -> Scanner:
        return _LlamaScanner()
