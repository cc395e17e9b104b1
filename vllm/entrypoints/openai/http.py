"""Bodies in, answers and event streams out, and the watch for clients that go away.

Owns reading and checking a JSON body, and sending. Knows nothing of what requests mean.
"""

import asyncio
import contextlib
import reprlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllm.entrypoints.openai.errors import EXPECTED_ERRORS, APIError, error_info, error_response
from vllm.entrypoints.openai.request_fields import drop_neutral_fields
from vllm.errors import VLLMValidationError
from vllm.logger import init_logger

__all__ = [
    "CLIENT_CLOSED_REQUEST",
    "ClientGone",
    "EventStream",
    "JSONBytes",
    "MAX_BODY_BYTES",
    "parse_request",
    "until_disconnect",
]

logger = init_logger(__name__)

# A prompt of a million token ids is about 7 MB.
MAX_BODY_BYTES = 64 * 1024 * 1024
CLIENT_CLOSED_REQUEST = 499
_DONE = b"data: [DONE]\n\n"

ModelT = TypeVar("ModelT", bound=BaseModel)
T = TypeVar("T")

_decoder = msgspec.json.Decoder()
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80
_repr.maxlist = _repr.maxdict = 16
_NAMES: dict[type[BaseModel], frozenset[str]] = {}


class ClientGone(Exception):
    """The client has closed the connection; nobody waits for an answer."""


def _is_json(content_type: str) -> bool:
    kind = content_type.split(";", 1)[0].strip().lower()
    return kind == "application/json" or (
        kind.startswith("application/") and kind.endswith("+json")
    )


async def _read_json(request: Request) -> dict[str, Any]:
    # Also keeps web pages of other origins from posting here unseen: browsers ask first.
    if not _is_json(request.headers.get("content-type", "")):
        raise APIError(415, "the header Content-Type must be application/json")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise APIError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    try:
        value = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise VLLMValidationError(f"the body is not valid JSON: {exc}") from None
    if not isinstance(value, dict):
        raise VLLMValidationError("the body must be a JSON object")
    return value


def _names(model: type[BaseModel]) -> frozenset[str]:
    names = _NAMES.get(model)
    if names is None:
        names = frozenset(info.alias or name for name, info in model.model_fields.items())
        _NAMES[model] = names
    return names


def _shorten(value: object) -> str:
    """As ``repr`` would begin, without going through all of what may be megabytes."""
    text = _repr.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _first_error(exc: ValidationError) -> VLLMValidationError:
    error = exc.errors(include_url=False)[0]
    path = ""
    for step in error["loc"]:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    if error["type"] == "missing":
        message = f"{path} is missing"
    elif error["type"] == "extra_forbidden":
        message = f"unknown field {path!r}"
    else:
        says = error["msg"].replace("Input should be", "must be")
        message = f"{path}: {says}, not {_shorten(error['input'])}"
    parameter = str(error["loc"][0]) if error["loc"] else None
    return VLLMValidationError(message, parameter=parameter)


def validate(model: type[ModelT], kind: str, body: dict[str, Any]) -> ModelT:
    """``body`` as a ``model``; see ``drop_neutral_fields`` for ``kind``.

    Raises:
        VLLMValidationError: naming the first field that is wrong.
    """
    fields = drop_neutral_fields(body, kind, _names(model))
    try:
        return model.model_validate(fields)
    except ValidationError as exc:
        raise _first_error(exc) from None


async def parse_request(request: Request, model: type[ModelT], kind: str) -> ModelT:
    """The body of ``request`` as a ``model``.

    Raises:
        APIError: not JSON by its header (415), or too large (413).
        VLLMValidationError: not valid JSON, or a field is wrong or unknown.
    """
    return validate(model, kind, await _read_json(request))


async def read_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object, its fields unchecked; errors as in ``parse_request``."""
    return await _read_json(request)


class JSONBytes(Response):
    """An answer whose JSON is encoded already."""

    media_type = "application/json"

    def __init__(self, body: bytes | BaseModel, status_code: int = 200) -> None:
        if isinstance(body, BaseModel):
            body = body.model_dump_json().encode()
        super().__init__(body, status_code=status_code)


@contextlib.contextmanager
def _cancelled_on_disconnect(receive: Receive) -> Iterator[None]:
    """Cancel the current task when the client goes; that comes out as ClientGone."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise ClientGone from None
    finally:
        watcher.cancel()


async def until_disconnect(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """What ``work`` answers; it is cancelled when the client goes away."""
    try:
        with _cancelled_on_disconnect(request.receive):
            return await work
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)


class EventStream(Response):
    """A stream of server-sent events, ended by ``end``.

    ``events`` yields whole events as bytes. An error before the first one becomes an answer with
    its own status; a later one becomes an event. Closing ``events`` ends what feeds it.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        end: bytes = _DONE,
        error_event: Callable[[Exception], bytes] | None = None,
    ) -> None:
        super().__init__(status_code=200, media_type="text/event-stream")
        self._events = events
        self._end = end
        self._error_event = error_event or _error_event
        # Without a length the server sends it in chunks; proxies must not collect them.
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with _cancelled_on_disconnect(receive):
                await self._run(scope, receive, send)
        except ClientGone:
            logger.debug("a client left its stream")

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = self._events
        try:
            try:
                first = await anext(events)
            except EXPECTED_ERRORS as exc:
                await error_response(exc)(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            try:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except EXPECTED_ERRORS as exc:
                body = self._error_event(exc)
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": self._end, "more_body": False})
        finally:
            await events.aclose()  # type: ignore[attr-defined]


def _error_event(exc: Exception) -> bytes:
    body = msgspec.json.encode({"error": error_info(exc).model_dump()})
    return b"data: " + body + b"\n\n"
