"""A small OpenAI-compatible server to point the clients at: real HTTP, real streams, no model.

It answers every prompt with as many words as were asked for, and keeps the requests it got.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

WORD = "tik "
_PATIENCE = 120


@dataclass
class Peer:
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    delay: float = 0.0
    """Seconds before each word."""
    gathers: int = 0
    """No stream goes on before so many have been in flight at once."""
    fail_every: int = 0
    """Each request of this number in a row is answered 500."""
    send_usage: bool = True


def _event(choice: dict[str, Any] | None, usage: dict[str, int] | None = None) -> bytes:
    document: dict[str, Any] = {"choices": [] if choice is None else [choice]}
    if usage is not None:
        document["usage"] = usage
    return f"data: {json.dumps(document)}\n\n".encode()


def _application(peer: Peer) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "words", "object": "model"}]}

    async def words(count: int, chat: bool) -> AsyncIterator[bytes]:
        peer.in_flight += 1
        peer.most_in_flight = max(peer.most_in_flight, peer.in_flight)
        try:
            late = time.monotonic() + _PATIENCE
            while peer.most_in_flight < peer.gathers and time.monotonic() < late:
                await asyncio.sleep(0.005)
            if chat:
                yield _event({"delta": {"role": "assistant", "content": ""}})
            for i in range(count):
                await asyncio.sleep(peer.delay)
                part = {"delta": {"content": WORD}} if chat else {"text": WORD}
                yield _event({**part, "finish_reason": "length" if i + 1 == count else None})
            if peer.send_usage:
                yield _event(None, {"prompt_tokens": 5, "completion_tokens": count})
            yield b"data: [DONE]\n\n"
        finally:
            peer.in_flight -= 1

    async def answer(request: Request, chat: bool) -> Any:
        body = await request.json()
        peer.requests.append(body)
        peer.headers.append(dict(request.headers))
        if peer.fail_every and len(peer.requests) % peer.fail_every == 0:
            return JSONResponse({"error": {"message": "out of words"}}, status_code=500)
        count = body.get("max_completion_tokens") or body.get("max_tokens") or 3
        return StreamingResponse(words(count, chat), media_type="text/event-stream")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        return await answer(request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Any:
        return await answer(request, chat=True)

    return app


@contextlib.contextmanager
def running_peer() -> Iterator[Peer]:
    """A peer that listens on a free port of this machine while the context is open."""
    peer = Peer()
    server = uvicorn.Server(
        uvicorn.Config(_application(peer), host="127.0.0.1", port=0, log_level="warning")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + _PATIENCE
    while not server.started:
        assert time.monotonic() < deadline, "the peer did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    peer.url = f"http://127.0.0.1:{port}"
    try:
        yield peer
    finally:
        server.should_exit = True
        thread.join(timeout=_PATIENCE)
