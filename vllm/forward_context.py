"""What attention layers need to know about the step that is running.

The model runner sets it around ``model.forward``; layers read it. It maps a layer's name to its
attention metadata, and holds every layer that owns a cache (``no_compile_layers``, vLLM's name).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = [
    "ForwardContext",
    "KVLayerHook",
    "KVScaleFinder",
    "get_forward_context",
    "set_forward_context",
]


class KVLayerHook(Protocol):
    """Who wants to know when a layer is about to read its cache, and when it has written it."""

    def before(self, layer_name: str) -> None: ...

    def after(self, layer_name: str, kv_cache: Any, attn_metadata: Any) -> None: ...


class KVScaleFinder(Protocol):
    """Who gives layers the scales of their caches, in a run that is made for that."""

    def observe(self, layer: Any, key: Any, value: Any) -> None:
        """A layer is about to store keys ``(T, K, D)``, rotated, and values ``(T, K, Dv)``."""
        ...


@dataclass(slots=True)
class ForwardContext:
    """``attn_metadata`` is None in a profiling run: attention then writes zeros and no cache."""

    attn_metadata: dict[str, Any] | None
    no_compile_layers: dict[str, Any] = field(default_factory=dict)
    slot_mapping: dict[str, Any] = field(default_factory=dict)
    additional_kwargs: dict[str, Any] = field(default_factory=dict)
    kv_layer_hook: KVLayerHook | None = None
    """A connector that works layer by layer; None where none does."""
    kv_scale_finder: KVScaleFinder | None = None
    """Of a run that calibrates; None in all others."""


_forward_context: ForwardContext | None = None


def get_forward_context() -> ForwardContext:
    assert _forward_context is not None, "no forward context: the model runner sets it"
    return _forward_context


@contextlib.contextmanager
def set_forward_context(context: ForwardContext) -> Iterator[None]:
    global _forward_context
    previous = _forward_context
    _forward_context = context
    try:
        yield
    finally:
        _forward_context = previous
