"""ASGI layers round the application: keys, request ids, limits, load.

Each is a plain ASGI callable, so that a chunk of a stream passes with no task in between. Knows
nothing of what requests mean.
"""

import hashlib
import hmac
import logging
import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm.entrypoints.openai.errors import APIError, error_response
from vllm.entrypoints.openai.protocol import random_uuid
from vllm.entrypoints.openai.serving_engine import ServerContext

__all__ = [
    "AccessLogFilter",
    "AuthenticationMiddleware",
    "HeaderLimitMiddleware",
    "LoadMiddleware",
    "RequestIdMiddleware",
    "ResetConnectionMiddleware",
]

# What tells of the server's state, but neither reaches the model nor shows a request.
_OPEN_PATHS = frozenset(
    ("/health", "/ping", "/version", "/load", "/metrics", "/docs", "/redoc", "/openapi.json",
     "/docs/oauth2-redirect")
)  # fmt: skip
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,256}")
# How uvloop's error ends; it has no class of its own.
_CLOSED = "the handler is closed"
# Endpoints whose requests occupy the engine.
_LOAD_PATHS = frozenset(
    ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/invocations")
)


def _path(scope: Scope) -> str:
    """The path below ``root_path``."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root) else path


class AuthenticationMiddleware:
    """Lets through what carries one of ``keys``, as a bearer token or as X-Api-Key."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        # Digests have one length, so the comparison's time tells nothing.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def _is_allowed(self, scope: Scope) -> bool:
        if scope["method"] == "OPTIONS" or _path(scope) in _OPEN_PATHS:
            return True
        for name, value in scope["headers"]:
            # The second is what Anthropic's clients send.
            if name == b"authorization":
                scheme, _, token = value.partition(b" ")
                if scheme.lower() == b"bearer" and self._is_key(token):
                    return True
            elif name == b"x-api-key" and self._is_key(value):
                return True
        return False

    def _is_key(self, token: bytes) -> bool:
        digest = hashlib.sha256(token.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._is_allowed(scope):
            await self._app(scope, receive, send)
            return
        error = APIError(
            401,
            "a valid API key is needed: send the header 'Authorization: Bearer KEY'",
            headers={"www-authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, send)


class RequestIdMiddleware:
    """Answers with the X-Request-Id of the request, or a new one, which then is the request's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        if given is None or not _REQUEST_ID.fullmatch(given):
            given = random_uuid().encode()
            others = [item for item in scope["headers"] if item[0] != b"x-request-id"]
            scope["headers"] = [*others, (b"x-request-id", given)]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", given)]
            await send(message)

        await self._app(scope, receive, send_with_id)


class HeaderLimitMiddleware:
    """Refuses requests with more than ``limit`` headers."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or len(scope["headers"]) <= self._limit:
            await self._app(scope, receive, send)
            return
        error = APIError(431, f"the request has more than {self._limit} headers")
        await error_response(error)(scope, receive, send)


class ResetConnectionMiddleware:
    """Lets answers to connections that have been reset go nowhere.

    uvicorn drops what is sent after a disconnect that it knows of; uvloop raises for one that it
    alone has seen so far. ``receive`` tells of either, and so ends what was being answered.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_if_open(message: Message) -> None:
            try:
                await send(message)
            except RuntimeError as error:
                if not str(error).endswith(_CLOSED):
                    raise

        await self._app(scope, receive, send_if_open)


class LoadMiddleware:
    """Counts the generating requests that are being answered, for /load."""

    def __init__(self, app: ASGIApp, context: ServerContext) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _path(scope) not in _LOAD_PATHS:
            await self._app(scope, receive, send)
            return
        self._context.load += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._context.load -= 1


class AccessLogFilter(logging.Filter):
    """Drops access-log lines of some paths."""

    def __init__(self, paths: Iterable[str]) -> None:
        super().__init__()
        self._paths = frozenset(path.strip() for path in paths)

    def filter(self, record: logging.LogRecord) -> bool:
        # uvicorn's arguments: client, method, path with query, HTTP version, status.
        if not isinstance(record.args, tuple) or len(record.args) < 3:
            return True
        return str(record.args[2]).partition("?")[0] not in self._paths
