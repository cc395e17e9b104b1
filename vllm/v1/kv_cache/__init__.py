"""The KV cache: specs, planning, one allocation, views, descriptors, byte runs.

See ``docs/kv_cache.md``. Names below are loaded on first use, since some need torch.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "AllocatedKVCache": "allocate",
    "allocate_kv_cache": "allocate",
    "create_kv_cache_views": "views",
    "state_views": "views",
    "drop_head_dim": "views",
    "group_kernel_blocks": "views",
    "map_kv_caches_to_kernel_blocks": "views",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"vllm.v1.kv_cache.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'vllm.v1.kv_cache' has no attribute {name!r}")
