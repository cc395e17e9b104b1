"""Tool parsers; the names that plug-ins import are resolved when first used."""

from importlib import import_module
from typing import Any

__all__ = ["ToolParser", "ToolParserManager"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.abstract_tool_parser"), name)
