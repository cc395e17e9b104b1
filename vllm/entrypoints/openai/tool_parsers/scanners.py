"""Incremental readers of tool calls: text goes in as it is generated, pieces come out.

Owns the grammar of calls written as JSON, between tags or alone. A scanner sends nothing that it
might have to take back: what may be the beginning of a tag is held until it is known. What turns
out to be no call comes out as text. Knows nothing of messages or models.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import msgspec

__all__ = [
    "CallArguments",
    "CallStart",
    "JSONCall",
    "JSONCallList",
    "JSONValue",
    "Piece",
    "Scanner",
    "TaggedJSONScanner",
    "Text",
    "TextRun",
    "held_back",
]

_SPACE = " \t\r\n"
_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class Text:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of ``name`` begins."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of the arguments (JSON) of the call that began last."""

    text: str


Piece = Text | CallStart | CallArguments


class Scanner(ABC):
    """Reads one answer."""

    @abstractmethod
    def feed(self, text: str) -> list[Piece]:
        """What ``text``, the next of the answer, settles."""

    @abstractmethod
    def finish(self) -> list[Piece]:
        """What is left at the end of the answer."""


def held_back(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``tag``."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[-length:]):
            return length
    return 0


class JSONValue:
    """Finds where one JSON value ends, a character at a time."""

    __slots__ = ("_depth", "_escaped", "_in_string", "_kind", "done")

    def __init__(self) -> None:
        self._kind = ""
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.done = False

    def takes(self, char: str) -> bool:
        """Whether ``char`` still belongs to the value; ``done`` says that it was the last."""
        if not self._kind:
            self._kind = "{" if char in "{[" else '"' if char == '"' else "word"
            self._depth = int(self._kind == "{")
            self._in_string = self._kind == '"'
            return True
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                self.done = self._depth == 0
            return True
        if self._kind == "word":
            return char not in ",}]" + _SPACE
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.done = self._depth == 0
        return True


class JSONCall:
    """Reads one object ``{"name": NAME, "arguments": {...}}`` (or "parameters").

    ``done`` is set when its closing brace has been read, ``failed`` when the text is no such
    object; ``raw`` holds all characters taken, for giving them back as text.
    """

    def __init__(self) -> None:
        self.done = False
        self.failed = False
        self.raw = ""
        self.started = False
        self._state = "open"
        self._key = ""
        self._value = JSONValue()
        self._token = ""
        self._has_arguments = False
        # Arguments that may be sent once the name is known, and now.
        self._ready = ""

    def feed(self, text: str) -> tuple[list[Piece], int]:
        """Pieces that ``text`` settles, and how many of its characters belong to the object."""
        pieces: list[Piece] = []
        position = 0
        while position < len(text) and not (self.done or self.failed):
            char = text[position]
            if self._state == "value":
                taken = self._take_value(char, pieces)
            else:
                taken = self._take_structure(char)
            if taken:
                self.raw += char
                position += 1
        if self.done and not self._has_arguments:
            self._ready = "{}"
        if self.started and self._ready:
            pieces.append(CallArguments(self._ready))
            self._ready = ""
        return pieces, position

    def _take_structure(self, char: str) -> bool:
        """One character outside values: braces, keys, colons, commas. Whether it was taken."""
        if self._state == "key":
            self._value.takes(char)
            self._token += char
            if self._value.done:
                self._key = self._decoded_token()
                self._state = "colon"
            return True
        if char in _SPACE:
            return True
        expected = {"open": "{", "colon": ":", "next": ",}", "first key": '"}', "next key": '"'}
        if char not in expected[self._state] or (char == "}" and not self.started):
            self.failed = True
            return False
        if char == "}":
            self.done = True
        elif self._state in ("first key", "next key"):
            self._begin("key")
            self._value.takes(char)
            self._token = char
        elif self._state == "colon":
            self._begin("value")
        else:
            self._state = "first key" if self._state == "open" else "next key"
        return True

    def _begin(self, state: str) -> None:
        self._state = state
        self._value = JSONValue()
        self._token = ""

    def _take_value(self, char: str, pieces: list[Piece]) -> bool:
        """One character of a value; whether it was taken."""
        if not self._token:
            if char in _SPACE:
                return True
            if char not in '{["-' and not char.isalnum():
                self.failed = True
                return False
        taken = self._value.takes(char)
        if taken:
            self._token += char
            # An object is sent as it comes, anything else when it is whole.
            if self._key in _ARGUMENTS and self._token[0] in "{[":
                self._ready += char
        if self._value.done or not taken:
            self._end_value(pieces)
        return taken

    def _end_value(self, pieces: list[Piece]) -> None:
        self._state = "next"
        if self._key == "name" and not self.started:
            name = self._decoded_token()
            if not name:
                self.failed = True
                return
            self.started = True
            pieces.append(CallStart(name))
        elif self._key in _ARGUMENTS:
            self._has_arguments = True
            if self._token[0] == '"':
                self._ready += self._decoded_token()
            elif self._token[0] not in "{[":
                self._ready += "{}" if self._token == "null" else self._token

    def _decoded_token(self) -> str:
        try:
            return msgspec.json.decode(self._token, type=str)
        except msgspec.DecodeError:
            return ""


class JSONCallList(Scanner):
    """Reads ``[{"name": ..., "parameters": ...}, ...]``, as a constrained answer has it.

    ``limit``: calls after so many are dropped (``parallel_tool_calls`` off).
    """

    def __init__(self, limit: int | None = None) -> None:
        self._call: JSONCall | None = None
        self._num_calls = 0
        self._limit = limit
        self.rest = ""

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            if self._call is None:
                start = text.find("{")
                if start == -1:
                    break
                text = text[start:]
                self._call = JSONCall()
            new, used = self._call.feed(text)
            if self._limit is None or self._num_calls < self._limit:
                pieces += new
            text = text[used:]
            if self._call.done or self._call.failed:
                self._num_calls += 1
                if self._call.failed:
                    text = text[1:]
                self._call = None
        return pieces

    def finish(self) -> list[Piece]:
        return []


class TextRun:
    """Text between calls. White space next to calls is layout and not shown."""

    def __init__(self) -> None:
        self._space = ""
        self._is_open = False
        self._after_call = False

    def push(self, text: str) -> Iterator[Piece]:
        """Show ``text``, or keep it while it is only white space and nothing was shown yet."""
        if not self._is_open:
            self._space += text
            text = self._space
            if not text.strip():
                return
            self._is_open, self._space = True, ""
        if text:
            yield Text(text)

    def call_begins(self) -> None:
        self._is_open, self._space, self._after_call = False, "", True

    def end(self) -> Iterator[Piece]:
        if self._space and not self._after_call:
            yield Text(self._space)
        self._space = ""


class TaggedJSONScanner(Scanner):
    """Reads calls as JSON objects between ``open_tag`` and ``close_tag``; the rest is text."""

    def __init__(self, open_tag: str, close_tag: str) -> None:
        self._open_tag = open_tag
        self._close_tag = close_tag
        self._buffer = ""
        self._run = TextRun()
        self._call: JSONCall | None = None
        self._closing = False

    def feed(self, text: str) -> list[Piece]:
        self._buffer += text
        return list(self._scan(at_end=False))

    def finish(self) -> list[Piece]:
        return [*self._scan(at_end=True), *self._run.end()]

    def _scan(self, at_end: bool) -> Iterator[Piece]:
        goes_on = True
        while goes_on:
            if self._call is not None:
                goes_on = yield from self._scan_call(self._call, at_end)
            elif self._closing:
                goes_on = self._scan_close(at_end)
            else:
                goes_on = yield from self._scan_text(at_end)

    def _scan_text(self, at_end: bool) -> Generator[Piece, None, bool]:
        """Up to the next open tag; whether it was found."""
        before, tag, after = self._buffer.partition(self._open_tag)
        if tag:
            yield from self._run.push(before)
            self._buffer = after
            self._call = JSONCall()
            return True
        held = 0 if at_end else held_back(self._buffer, self._open_tag)
        end = len(self._buffer) - held
        yield from self._run.push(self._buffer[:end])
        self._buffer = self._buffer[end:]
        return False

    def _scan_call(self, call: JSONCall, at_end: bool) -> Generator[Piece, None, bool]:
        """Through the object after an open tag; whether there is more to do."""
        pieces, used = call.feed(self._buffer)
        self._buffer = self._buffer[used:]
        if call.started:
            self._run.call_begins()
        yield from pieces
        if not (call.done or call.failed or at_end):
            return False
        self._call = None
        if call.started:
            # Should the object be broken: too late to take it back. What follows is dropped.
            self._closing = True
        else:
            yield from self._run.push(self._open_tag + call.raw)
        return True

    def _scan_close(self, at_end: bool) -> bool:
        """Up to the close tag, or an open tag that comes without it."""
        closing = self._buffer.find(self._close_tag)
        opening = self._buffer.find(self._open_tag)
        if closing != -1 and (opening == -1 or closing < opening):
            self._buffer = self._buffer[closing + len(self._close_tag) :]
        elif opening != -1:
            self._buffer = self._buffer[opening:]
        else:
            keep = max(len(self._open_tag), len(self._close_tag)) - 1
            self._buffer = "" if at_end else self._buffer[-keep:]
            return False
        self._closing = False
        return True
