"""Server-sent events as OpenAI-compatible servers stream them: ``data: JSON`` until ``[DONE]``."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["EventBuffer"]

_DONE = b"[DONE]"


class EventBuffer:
    """Turns pieces of a response body, cut anywhere, into the payloads of its events."""

    def __init__(self) -> None:
        self._rest = b""
        self.done = False
        """Whether ``[DONE]`` has come."""

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The payloads that ``piece`` completes; comments and other fields are left out."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == _DONE:
                self.done = True
            elif payload:
                yield payload
