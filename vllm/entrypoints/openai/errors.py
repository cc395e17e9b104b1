"""What goes wrong, in OpenAI's form: ``{"error": {message, type, param, code}}``.

Owns the mapping from exceptions to HTTP statuses. Knows nothing of endpoints.
"""

import http
from collections.abc import Mapping

import msgspec
from pydantic import BaseModel
from starlette.responses import Response

from vllm.errors import (
    CapacityError,
    QueueFullError,
    UnsupportedError,
    VLLMError,
    VLLMValidationError,
)

__all__ = [
    "APIError",
    "ErrorInfo",
    "ErrorResponse",
    "EXPECTED_ERRORS",
    "error_info",
    "error_response",
    "malformed",
    "unsupported",
]

# Status -> the word that vLLM's clients find in "type".
_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    413: "BadRequestError",
    415: "BadRequestError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: int


class ErrorResponse(BaseModel):
    error: ErrorInfo


class APIError(Exception):
    """A request that the HTTP edge refuses with a status of its own.

    Args:
        status: HTTP status.
        message: one line saying what is wrong and what would work.
        param: the field at fault, if one is.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.headers = headers


# What an endpoint may raise on purpose; anything else is a bug of ours and answered as one.
EXPECTED_ERRORS = (APIError, VLLMValidationError, VLLMError)


def _status(exc: Exception) -> int:
    if isinstance(exc, APIError):
        return exc.status
    if isinstance(exc, VLLMValidationError):
        return 400
    if isinstance(exc, QueueFullError | CapacityError):
        return 503
    return 500


def _one_line(text: str) -> str:
    return " ".join(text.split())


def error_info(exc: Exception) -> ErrorInfo:
    """What the client is told about ``exc``; nothing of the inside of an unexpected one."""
    status = _status(exc)
    if isinstance(exc, EXPECTED_ERRORS):
        message = _one_line(str(exc)) or http.HTTPStatus(status).phrase
    else:
        message = "the server met an error of its own; its log has the details"
    return ErrorInfo(
        message=message,
        type=_TYPES.get(status) or ("BadRequestError" if status < 500 else "InternalServerError"),
        param=getattr(exc, "param", None) or getattr(exc, "parameter", None),
        code=status,
    )


def error_response(exc: Exception) -> Response:
    """The whole answer to a request that failed with ``exc``."""
    info = error_info(exc)
    headers = dict(getattr(exc, "headers", None) or {})
    if info.code == 503:
        headers.setdefault("retry-after", "1")
    return Response(
        msgspec.json.encode({"error": info.model_dump()}),
        status_code=info.code,
        headers=headers,
        media_type="application/json",
    )


def _field_of(where: str) -> str:
    return where.split("[")[0].split(".")[0]


def malformed(where: str, what: str) -> VLLMValidationError:
    """Of the place ``where`` in a request, such as "input[2].content"."""
    return VLLMValidationError(f"{where}: {what}", parameter=_field_of(where))


def unsupported(where: str, what: str) -> UnsupportedError:
    """As ``malformed``, of what may be right elsewhere."""
    return UnsupportedError(f"{where}: {what}", parameter=_field_of(where))
