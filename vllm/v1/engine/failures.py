"""An exception of one process as a message, and again as an exception in another.

What a user can correct keeps its class and its one line; everything else is named by its class.
"""

from __future__ import annotations

import builtins
import contextlib

import msgspec

import vllm.errors
from vllm.errors import VLLMError, VLLMValidationError

__all__ = ["EngineFailure", "exception_of", "failure_of", "is_expected"]


class EngineFailure(msgspec.Struct, array_like=True):
    """An exception that ended a process or a call in it; ``type`` is the name of its class."""

    type: str
    message: str
    parameter: str | None = None
    traceback: str | None = None
    """Where it came from, for whoever decides whether it is the cause of all others."""

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"


def failure_of(error: BaseException) -> EngineFailure:
    """``error`` on one line."""
    message = " ".join(str(error).split()) or type(error).__name__
    return EngineFailure(type(error).__name__, message, getattr(error, "parameter", None))


def exception_of(failure: EngineFailure, otherwise: Exception) -> Exception:
    """The exception in its own class where that is one of ours or built in, else ``otherwise``."""
    cls = getattr(vllm.errors, failure.type, None)
    if isinstance(cls, type) and issubclass(cls, VLLMValidationError):
        return cls(failure.message, parameter=failure.parameter)
    if isinstance(cls, type) and issubclass(cls, VLLMError):
        return cls(failure.message)
    cls = getattr(builtins, failure.type, None)
    if isinstance(cls, type) and issubclass(cls, ValueError | OSError | ImportError | MemoryError):
        with contextlib.suppress(TypeError):  # UnicodeDecodeError and the like want more
            return cls(failure.message)
    return otherwise


def is_expected(error: BaseException) -> bool:
    """Whether ``error`` says all there is to say in its one line."""
    return isinstance(error, VLLMError | VLLMValidationError)
