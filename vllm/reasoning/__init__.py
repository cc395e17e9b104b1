"""Reasoning parsers: what a model thinks, apart from what it answers.

The names are vLLM's, so that a plug-in file written for it loads here. Nothing is imported before
it is asked for.
"""

from importlib import import_module
from typing import Any

__all__ = ["ReasoningParser", "ReasoningParserManager"]

_MODULES = {"ReasoningParser": "abs_reasoning_parsers", "ReasoningParserManager": "manager"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
