"""Chunks of a stream, as bytes.

Owns the encoding of one chunk; it runs once per token and stream, so what does not change is
encoded once per stream, and no object is validated. Knows nothing of where tokens come from.
"""

from typing import Any

import msgspec

from vllm.entrypoints.openai.protocol import DeltaMessage, UsageInfo

__all__ = ["ChunkWriter", "delta_fields"]

_encode = msgspec.json.Encoder().encode
_PLAIN_END = b'},"logprobs":null,"finish_reason":null}]}\n\n'
_PLAIN_TEXT_END = b',"logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'


class ChunkWriter:
    """Writes the chunks of one stream as server-sent events.

    Args:
        kind: "chat.completion.chunk" or "text_completion".
    """

    def __init__(
        self, *, kind: str, response_id: str, created: int, model: str, fingerprint: str
    ) -> None:
        head = _encode(
            {
                "id": response_id,
                "object": kind,
                "created": created,
                "model": model,
                "system_fingerprint": fingerprint,
            }
        )
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._heads: dict[int, bytes] = {}
        self._key = b'"text":' if kind == "text_completion" else b'"delta":{"content":'
        self._end = _PLAIN_TEXT_END if kind == "text_completion" else _PLAIN_END

    def text(self, index: int, text: str) -> bytes:
        """A chunk of nothing but text: the usual one."""
        head = self._heads.get(index)
        if head is None:
            head = self._heads[index] = b'%b{"index":%d,%b' % (self._head, index, self._key)
        return head + _encode(text) + self._end

    def choice(
        self,
        fields: dict[str, Any],
        *,
        usage: UsageInfo | None = None,
        extra: dict[str, Any] | None = None,
    ) -> bytes:
        """A chunk with one choice and any fields; ``extra`` goes beside ``choices``."""
        return self._head + _encode(fields) + b"]" + _tail(usage, extra)

    def usage(self, usage: UsageInfo) -> bytes:
        """The chunk without choices that ends a stream with its usage."""
        return self._head + b"]" + _tail(usage, None)


def _tail(usage: UsageInfo | None, extra: dict[str, Any] | None) -> bytes:
    tail = b""
    if usage is not None:
        tail += b',"usage":' + _encode(usage.model_dump(exclude_none=True))
    if extra:
        tail += b"," + _encode(extra)[1:-1]
    return tail + b"}\n\n"


def delta_fields(delta: DeltaMessage) -> dict[str, Any]:
    """``delta`` without what it leaves open."""
    fields = delta.model_dump(exclude_none=True)
    if not delta.tool_calls:
        fields.pop("tool_calls", None)
    return fields
