"""The one allocation of a worker's cache, and every layer's view of it.

Owns how memory is got; which bytes belong to whom is the plan's (``KVCacheConfig``) business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from vllm.errors import CapacityError, ConfigError
from vllm.v1.kv_cache.config import KVCacheConfig
from vllm.v1.kv_cache.planner import memory_options
from vllm.v1.kv_cache.views import create_kv_cache_views
from vllm.v1.kv_cache_layout import KVCacheLayout

if TYPE_CHECKING:
    from vllm.v1.kv_cache.debug import NullKVCacheDebugger

__all__ = ["AllocatedKVCache", "allocate_kv_cache"]

# Below this the C library may hand out memory that was used before; above, fresh zero pages.
_CLEAR_BELOW_BYTES = 64 << 20


class AllocatedKVCache(dict[str, torch.Tensor]):
    """Layer name -> view ``(B, H, N, C)`` in kernel blocks, and the backing below the views."""

    def __init__(self, backing: torch.Tensor, config: KVCacheConfig) -> None:
        super().__init__()
        self.backing = backing
        """1-D int8, all bytes of all layers."""
        self.config = config
        self._debugger: NullKVCacheDebugger | None = None

    @property
    def debugger(self) -> NullKVCacheDebugger:
        """Watches who writes, in debug mode; the same for all who write, from first use on."""
        if self._debugger is None:
            from vllm.v1.kv_cache.debug import make_kv_cache_debugger

            self._debugger = make_kv_cache_debugger(self)
        return self._debugger

    def alias(self, layer_name: str, target: str) -> None:
        """Give ``layer_name`` the very tensor of ``target`` (KV sharing between layers)."""
        self[layer_name] = self[target]


def allocate_kv_cache(
    kv_cache_config: KVCacheConfig,
    device: torch.device | str = "cpu",
    layout: KVCacheLayout | str | None = None,
    kernel_block_sizes: Sequence[int] | None = None,
    allocate: Callable[[int], torch.Tensor] | None = None,
) -> AllocatedKVCache:
    """Allocate the backing and build all views.

    ``layout`` and ``kernel_block_sizes`` are the plan's; whoever names them is checked.
    ``allocate(size)`` gives the backing, cleared, where it is not to be torch's own memory.

    On the CPU a large pool costs no memory until blocks are written: the pages are the system's
    zero pages. On an accelerator the pool is cleared, so that no old bytes are read as numbers.

    Raises:
        CapacityError: the device has not so much memory.
        ConfigError: ``layout`` or ``kernel_block_sizes`` are not those of the plan.
    """
    planned = kv_cache_config.kv_cache_layout
    if layout is not None and KVCacheLayout.from_str(layout) is not planned:
        raise ConfigError(f"KV cache layout {layout} contradicts {planned}, which was planned")
    groups = range(len(kv_cache_config.kv_cache_groups))
    sizes = [kv_cache_config.kernel_block_size(group) for group in groups]
    if kernel_block_sizes is not None and list(kernel_block_sizes) != sizes:
        raise ConfigError(
            f"kernel block sizes {list(kernel_block_sizes)} contradict {sizes}, which were planned"
        )
    size = kv_cache_config.backing_size_bytes
    clear = size < _CLEAR_BELOW_BYTES or torch.device(device).type != "cpu"
    try:
        if allocate is not None:
            backing = allocate(size)
        else:
            backing = (torch.zeros if clear else torch.empty)(size, dtype=torch.int8, device=device)
    except RuntimeError as error:
        raise CapacityError(
            f"cannot allocate {size} bytes of KV cache on {device}: lower "
            f"{memory_options(torch.device(device).type)} ({error})"
        ) from error
    cache = AllocatedKVCache(backing, kv_cache_config)
    for tensor in kv_cache_config.kv_cache_tensors:
        group_id = kv_cache_config.group_of(tensor.layers[0])
        spec = kv_cache_config.kv_cache_groups[group_id].spec_of(tensor.layers[0])
        views = create_kv_cache_views(
            backing,
            spec,
            kv_cache_config.num_blocks,
            kv_cache_config.kv_cache_layout,
            tensor,
            kv_cache_config.kernel_block_size(group_id) if spec.uses_slot_mapping else None,
        )
        cache.update(zip(tensor.layers, views, strict=True))
    return cache
