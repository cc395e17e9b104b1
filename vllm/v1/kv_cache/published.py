"""The one layout that an engine has resolved, as every process of it knows it.

The planner's answer travels with the plan; who takes it up says so here: the engine core, each
worker, the front end. A second, different answer for the same engine is an error. Outside callers
that ask for a layout without naming an engine get the process's. Imports no torch.
"""

from __future__ import annotations

import weakref
from typing import Any

from vllm.errors import ConfigError
from vllm.v1.kv_cache_layout import KVCacheLayout

__all__ = ["publish_layout", "published_layout"]

# Whoever took a layout up, for as long as he lives -> (engine, layout).
_published: weakref.WeakKeyDictionary[Any, tuple[str, KVCacheLayout]] = weakref.WeakKeyDictionary()


def publish_layout(layout: KVCacheLayout | str, engine_id: str, owner: Any) -> KVCacheLayout:
    """``owner`` (a worker, an engine core, a front end) takes up the layout of an engine.

    Holds while ``owner`` lives.

    Raises:
        ConfigError: another layout was published for this engine, or to this owner.
    """
    layout = KVCacheLayout.from_str(layout)
    for other, (engine, known) in list(_published.items()):
        if (other is owner or (engine and engine == engine_id)) and known is not layout:
            raise ConfigError(
                f"KV cache layout {layout} contradicts {known}, which this engine uses already: "
                "the layout is resolved once, before workers start"
            )
    _published[owner] = (engine_id, layout)
    return layout


def published_layout() -> KVCacheLayout | None:
    """The layout that this process serves; None before any was published.

    Raises:
        ConfigError: engines of this process use different ones.
    """
    layouts = {layout for _, layout in _published.values()}
    if len(layouts) > 1:
        raise ConfigError(
            f"engines in this process use KV cache layouts {', '.join(sorted(layouts))}: read the "
            "layout from KVCacheConfig"
        )
    return next(iter(layouts), None)
