"""What the user brings along: middleware by import path. Imports nothing heavy."""

import importlib
import inspect
from typing import Any

from vllm.errors import ConfigError

__all__ = ["load_middleware"]


def load_middleware(path: str) -> Any:
    """The class or coroutine function that ``--middleware`` names.

    Raises:
        ConfigError: it cannot be imported, or is neither.
    """
    module, _, attribute = path.rpartition(".")
    try:
        middleware = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as exc:
        raise ConfigError(
            f"--middleware: cannot import {path!r}: {exc}", parameter="--middleware", value=path
        ) from exc
    if not (inspect.isclass(middleware) or inspect.iscoroutinefunction(middleware)):
        raise ConfigError(
            f"--middleware: {path} must be a class or an async function",
            parameter="--middleware",
            value=path,
        )
    return middleware
