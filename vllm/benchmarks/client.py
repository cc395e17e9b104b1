"""One streamed request to an OpenAI-compatible server, with the time of every token.

Knows HTTP and the form of the events; nothing of datasets or statistics.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from vllm.benchmarks.datasets import Sample
from vllm.utils.sse import EventBuffer

__all__ = ["Connections", "Outcome", "request_body", "send"]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of one request; times are seconds of ``time.perf_counter``."""

    sample: Sample
    start: float = 0.0
    end: float = 0.0
    """When the last token came."""
    ttft: float = 0.0
    """Seconds from the request to its first token."""
    itl: list[float] = field(default_factory=list)
    """Seconds between one piece of text and the next."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str = ""
    """Why it failed; empty for a success."""

    @property
    def success(self) -> bool:
        return not self.error

    @property
    def latency(self) -> float:
        return self.end - self.start

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None where there is only one."""
        if self.output_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.output_tokens - 1)


def request_body(
    sample: Sample, *, chat: bool, model: str, sampling: dict[str, Any]
) -> dict[str, Any]:
    """The JSON of a streaming request that also asks for its token counts."""
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        **sampling,
    }
    if chat:
        body["messages"] = [{"role": "user", "content": sample.prompt}]
        body["max_completion_tokens"] = sample.output_len
    else:
        body["prompt"] = sample.prompt
        body["max_tokens"] = sample.output_len
    return body


def _text_of(choice: dict[str, Any]) -> str:
    delta = choice.get("delta")
    if delta is None:
        return choice.get("text") or ""
    return delta.get("content") or delta.get("reasoning") or ""


def _take(outcome: Outcome, event: dict[str, Any], now: float) -> None:
    """Add one event that came at ``now`` to ``outcome``."""
    if "error" in event:
        outcome.error = str(event["error"])
        return
    usage = event.get("usage")
    if usage:
        outcome.prompt_tokens = usage.get("prompt_tokens") or 0
        outcome.output_tokens = usage.get("completion_tokens") or 0
    choices = event.get("choices")
    if not choices:
        return
    text = _text_of(choices[0])
    is_role_only = "delta" in choices[0] and not text and not choices[0].get("finish_reason")
    if is_role_only:
        return
    if outcome.end:
        outcome.itl.append(now - outcome.end)
    else:
        outcome.ttft = now - outcome.start
    outcome.end = now
    outcome.text += text


class Connections:
    """Clients of one connection each, taken and given back; as many as are in use at once.

    One client for all would search all its connections at the begin and end of every request,
    which at several hundred streams costs more than the streams themselves.
    """

    def __init__(self, headers: dict[str, str]) -> None:
        self._headers = headers
        self._tls = httpx.create_ssl_context()
        self._free: list[httpx.AsyncClient] = []
        self._all: list[httpx.AsyncClient] = []

    @contextlib.contextmanager
    def one(self) -> Iterator[httpx.AsyncClient]:
        """A client that nobody else uses meanwhile."""
        client = self._free.pop() if self._free else self._new()
        try:
            yield client
        finally:
            self._free.append(client)

    def _new(self) -> httpx.AsyncClient:
        client = httpx.AsyncClient(headers=self._headers, timeout=None, verify=self._tls)
        self._all.append(client)
        return client

    async def aclose(self) -> None:
        for client in self._all:
            await client.aclose()


async def send(
    client: httpx.AsyncClient, url: str, sample: Sample, body: dict[str, Any]
) -> Outcome:
    """Send one request and read its stream to the end; a failure is in the outcome."""
    outcome = Outcome(sample=sample, start=time.perf_counter())
    events = EventBuffer()
    try:
        async with client.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                outcome.error = f"status {response.status_code}: {text.strip()}"
                return outcome
            async for piece in response.aiter_raw():
                now = time.perf_counter()
                for payload in events.feed(piece):
                    _take(outcome, json.loads(payload), now)
    except (httpx.HTTPError, ValueError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    if not outcome.error and not outcome.end:
        outcome.error = "the stream had no token"
    if not outcome.output_tokens:
        outcome.output_tokens = len(outcome.itl) + 1
    return outcome
