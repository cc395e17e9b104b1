"""Failures inside the engine, which a real one cannot be made to have on demand.

The engine here is a fake that raises them; the application round it is the real one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvloop

from vllm.entrypoints.openai.api_server import build_app
from vllm.entrypoints.openai.cli_args import FrontendArgs
from vllm.entrypoints.openai.middleware import ResetConnectionMiddleware
from vllm.errors import CapacityError, EngineDeadError, EngineGenerateError, QueueFullError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.v1.engine.input_processor import TokenizedPrompt

BODY = {"prompt": "Hi", "max_tokens": 4}


class FakeEngine:
    """Gives ``good`` pieces of text, then raises ``error`` if there is one."""

    def __init__(self, error: Exception | None = None, good: int = 0) -> None:
        self._error = error
        self._good = good
        self.model_config = SimpleNamespace(
            model="fake",
            model_path="fake",
            hf_config=SimpleNamespace(model_type="llama"),
            dtype_name="float32",
            max_model_len=64,
            served_model_name=(),
            get_diff_sampling_param=dict,
        )

    def get_tokenizer(self) -> None:
        return None

    def tokenize(self, prompt: str, params: object = None, **_: object) -> TokenizedPrompt:
        return TokenizedPrompt([1, 2], prompt, None)

    async def check_health(self) -> None:
        if isinstance(self._error, EngineDeadError):
            raise self._error

    async def generate(
        self, prompt: TokenizedPrompt, params: Any, request_id: str, **_: object
    ) -> AsyncGenerator[RequestOutput, None]:
        for i in range(self._good):
            last = i == self._good - 1 and self._error is None
            output = CompletionOutput(0, f"t{i}", [i], finish_reason="stop" if last else None)
            yield RequestOutput(request_id, prompt.text, prompt.token_ids, None, [output], last)
        if self._error is not None:
            raise self._error


def app_client(engine: FakeEngine, **options: Any) -> httpx.AsyncClient:
    app = build_app(engine, FrontendArgs(**options))
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server")


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (EngineGenerateError("one step failed"), 500, "InternalServerError"),
        (EngineDeadError("it has died"), 500, "InternalServerError"),
        (QueueFullError("64 wait"), 503, "ServiceUnavailableError"),
        (CapacityError("no room"), 503, "ServiceUnavailableError"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_engine_errors_have_a_status(error, status, kind, stream):
    async with app_client(FakeEngine(error)) as client:
        response = await client.post("/v1/completions", json={**BODY, "stream": stream})
    assert response.status_code == status
    assert response.json() == {
        "error": {"message": str(error), "type": kind, "param": None, "code": status}
    }
    assert ("retry-after" in response.headers) == (status == 503)


async def test_an_error_in_mid_stream_becomes_an_event():
    async with app_client(FakeEngine(EngineGenerateError("lost"), good=2)) as client:
        response = await client.post("/v1/completions", json={**BODY, "stream": True})
    assert response.status_code == 200
    *events, error, done, _ = response.text.split("\n\n")
    assert len(events) == 2
    assert '"message":"lost"' in error
    assert done == "data: [DONE]"


async def test_a_bug_is_500_and_tells_nothing():
    async with app_client(FakeEngine(ZeroDivisionError("secret"))) as client:
        response = await client.post("/v1/completions", json=BODY)
        assert response.status_code == 500
        assert "secret" not in response.text
        assert response.json()["error"]["type"] == "InternalServerError"


async def test_a_dead_engine_fails_health():
    async with app_client(FakeEngine(EngineDeadError("it has died"))) as client:
        response = await client.get("/health")
    assert response.status_code == 503
    assert "it has died" in response.text


async def test_without_a_tokenizer_chats_are_refused():
    async with app_client(FakeEngine(good=1)) as client:
        chat = {"messages": [{"role": "user", "content": "Hi"}]}
        for path, body in (("/v1/chat/completions", chat), ("/detokenize", {"tokens": [1]})):
            response = await client.post(path, json=body)
            assert response.status_code == 400
            assert "--skip-tokenizer-init" in response.text
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200


async def shout(request: Any, call_next: Any) -> Any:
    response = await call_next(request)
    response.headers["x-shout"] = "yes"
    return response


class Refuser:
    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/load":
            await send({"type": "http.response.start", "status": 418, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await self._app(scope, receive, send)


async def test_the_users_middleware_runs():
    paths = [f"{__name__}.shout", f"{__name__}.Refuser"]
    async with app_client(FakeEngine(good=1), middleware=paths) as client:
        assert (await client.get("/version")).headers["x-shout"] == "yes"
        assert (await client.get("/load")).status_code == 418
        response = await client.post("/v1/completions", json={**BODY, "stream": True})
        assert response.text.endswith("data: [DONE]\n\n")


async def test_origins_can_be_limited():
    options = {"allowed_origins": ["http://good"], "allow_credentials": True}
    async with app_client(FakeEngine(good=1), **options) as client:
        for origin, allowed in (("http://good", True), ("http://bad", False)):
            response = await client.get("/version", headers={"origin": origin})
            assert ("access-control-allow-origin" in response.headers) == allowed


async def test_headers_can_be_limited():
    async with app_client(FakeEngine(good=1), h11_max_header_count=10) as client:
        headers = {f"x-{i}": "1" for i in range(12)}
        assert (await client.get("/version", headers=headers)).status_code == 431
        assert (await client.get("/version")).status_code == 200


def test_sending_to_a_connection_that_was_reset_is_no_error():
    """What uvloop raises where uvicorn has not been told of the reset yet."""
    sent = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        for number in range(3):
            await send(number)
            sent.append(number)

    async def answer() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
        address = server.sockets[0].getsockname()
        transport, _ = await loop.create_connection(asyncio.Protocol, *address)

        async def write(_message: Any) -> None:
            transport.write(b"x")

        async def fail(_message: Any) -> None:
            raise RuntimeError("a bug")

        transport.abort()
        for _ in range(5):
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="the handler is closed"):
            await write(0)
        await ResetConnectionMiddleware(app)({}, write, write)
        with pytest.raises(RuntimeError, match="a bug"):
            await ResetConnectionMiddleware(app)({}, fail, fail)
        server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(answer())
    assert sent == [0, 1, 2]
