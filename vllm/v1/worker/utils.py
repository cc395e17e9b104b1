"""What a worker does with caches and layers: gather declarations, bind views.

Owns the orchestration only; what a layer makes of its view is the layer's, where bytes lie is
the planner's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm.errors import ConfigError
from vllm.v1.kv_cache.allocate import AllocatedKVCache, allocate_kv_cache
from vllm.v1.kv_cache.blocks import (
    KVCacheBlockCopy,
    RunZeroer,
    copy_block_runs,
    runs_of_views,
)
from vllm.v1.kv_cache.declare import check_skipped_layers
from vllm.v1.kv_cache.planner import BackendConstraints
from vllm.v1.kv_cache.resolver import select_common_block_size as _common_block_size
from vllm.v1.kv_cache.views import (
    create_kv_cache_views,
    group_kernel_blocks,
    map_kv_caches_to_kernel_blocks,
)
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.attention.backend import AttentionBackend

__all__ = [
    "AttentionGroup",
    "KVBlockZeroer",
    "KVCacheBlockCopy",
    "allocate_kv_cache",
    "bind_kv_cache",
    "bind_kv_cache_to_layers",
    "clear_layer_kv_caches",
    "copy_kv_cache_blocks_inplace",
    "create_kv_cache_views",
    "extract_layer_index",
    "get_backend_constraints",
    "get_kv_cache_specs",
    "get_kv_sharing_targets",
    "group_kernel_blocks",
    "map_kv_caches_to_kernel_blocks",
    "prepare_kernel_block_sizes",
    "select_common_block_size",
    "share_kv_caches",
]

# Device types on which two caches may belong to one layer index (self and cross attention, a
# draft beside its target).
_SHARED_INDEX_DEVICES = ("cpu", "cuda", "xpu")


def extract_layer_index(layer_name: str, num_attn_module: int = 1) -> int:
    """The layer's number in its dotted name: ``model.layers.7.self_attn`` -> 7.

    With ``num_attn_module`` attentions in one layer, a second number counts them:
    ``model.layers.7.self_attn.1`` -> 7 * num_attn_module + 1.

    Raises:
        ValueError: the name holds no number, or more than fit.
    """
    numbers = [int(part) for part in layer_name.split(".") if part.isdecimal()]
    allowed = 1 if num_attn_module == 1 else 2
    if not numbers or len(numbers) > allowed:
        raise ValueError(
            f"layer name {layer_name!r} must hold one number"
            + (" or two" if allowed == 2 else "")
            + f", it holds {len(numbers)}"
        )
    if num_attn_module == 1:
        return numbers[0]
    return numbers[0] * num_attn_module + (numbers[1] if len(numbers) == 2 else 0)


def bind_kv_cache(
    kv_caches: Mapping[str, torch.Tensor],
    forward_context: Mapping[str, Any],
    runner_kv_caches: list[torch.Tensor],
    num_attn_module: int = 1,
    kv_cache_groups: Sequence[KVCacheGroupSpec] | None = None,
    layer_kv_caches: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Give the runner the raw tensors in layer order, and every layer its own.

    Args:
        kv_caches: layer name -> raw view, dim 0 the block. From ``allocate_kv_cache`` the block
            counts are checked too.
        forward_context: layer name -> layer; its ``bind_kv_cache`` is called, in the order of
            ``kv_caches``.
        runner_kv_caches: empty; gets the raw tensors by ascending layer index, and within an
            index in the order of ``kv_caches``.
        kv_cache_groups: every layer of theirs must have a cache; None to leave that open.
        layer_kv_caches: what layers get where it is not the runner's tensor.

    Raises:
        NotImplementedError: two caches have one layer index, on a device whose runner cannot
            tell them apart.
        ConfigError: dim 0 of a tensor is not the block, or a layer has no cache.
    """
    assert not runner_kv_caches, "runner_kv_caches must be empty before binding"
    if isinstance(kv_caches, AllocatedKVCache):
        _check_block_dim(kv_caches)
    by_index: defaultdict[int, list[str]] = defaultdict(list)
    for name in kv_caches:
        by_index[extract_layer_index(name, num_attn_module)].append(name)
    for index in sorted(by_index):
        names = by_index[index]
        if len(names) > 1:
            _check_shared_index(index, names)
        runner_kv_caches.extend(kv_caches[name] for name in names)
    own = kv_caches if layer_kv_caches is None else layer_kv_caches
    bind_kv_cache_to_layers(own, forward_context, num_attn_module, kv_cache_groups)


def bind_kv_cache_to_layers(
    kv_caches: Mapping[str, torch.Tensor],
    forward_context: Mapping[str, Any],
    num_attn_module: int = 1,
    kv_cache_groups: Sequence[KVCacheGroupSpec] | None = None,
) -> None:
    """The layers' half of ``bind_kv_cache``: each gets its tensor, in the order of ``kv_caches``.

    Raises:
        ConfigError: a layer of ``kv_cache_groups`` has no cache.
        ValueError: a name does not say which layer it is (see ``extract_layer_index``).
    """
    for group in kv_cache_groups or ():
        missing = [name for name in group.layer_names if name not in kv_caches]
        if missing:
            raise ConfigError(f"layers {', '.join(missing)} have a cache group and no cache")
    for name in kv_caches:
        extract_layer_index(name, num_attn_module)
    for name, kv_cache in kv_caches.items():
        forward_context[name].bind_kv_cache(kv_cache)


def clear_layer_kv_caches(layers: Mapping[str, Any]) -> None:
    """Let go of what the layers have bound, so that the backing can be freed."""
    for layer in layers.values():
        layer.kv_cache = torch.empty(0)


def _check_shared_index(index: int, names: Sequence[str]) -> None:
    from vllm.platforms import current_platform

    if current_platform.device_type not in _SHARED_INDEX_DEVICES:
        raise NotImplementedError(
            f"layers {', '.join(names)} have one index {index}, which "
            f"{current_platform.device_type} cannot serve"
        )


def _check_block_dim(kv_caches: AllocatedKVCache) -> None:
    config = kv_caches.config
    for group_id, group in enumerate(config.kv_cache_groups):
        for name in group.layer_names:
            if name not in kv_caches:
                continue
            splits = group.spec_of(name).uses_slot_mapping
            ratio = config.kernel_blocks_per_block(group_id) if splits else 1
            shape = tuple(kv_caches[name].shape)
            if shape[0] != config.num_blocks * ratio:
                raise ConfigError(
                    f"cache of layer {name} has shape {shape}: dim 0 must be the "
                    f"{config.num_blocks * ratio} blocks"
                )


def get_kv_cache_specs(
    layers: Mapping[str, AttentionLayerBase], vllm_config: VllmConfig
) -> dict[str, KVCacheSpec]:
    """What the layers declare, as their backends pack it; layers without a cache are left out.

    Raises:
        ConfigError: --kv-cache-dtype-skip-layers has an entry that means none of them.
    """
    specs = {}
    for name, layer in layers.items():
        spec = layer.get_kv_cache_spec(vllm_config)
        if spec is not None:
            specs[name] = layer.get_attn_backend().customize_spec(spec).with_layer_name(name)
    check_skipped_layers(specs, vllm_config)
    return specs


def get_backend_constraints(
    layers: Mapping[str, AttentionLayerBase], specs: Mapping[str, KVCacheSpec]
) -> dict[str, BackendConstraints]:
    """What the backend of each layer with a cache can read; the planner's input."""
    return {
        name: _constraints_of(layers[name].get_attn_backend(), spec) for name, spec in specs.items()
    }


def _constraints_of(
    backend: type[AttentionBackend], spec: KVCacheSpec | None
) -> BackendConstraints:
    return BackendConstraints(
        backend=backend.get_name(),
        layouts=backend.supported_kv_cache_layouts(),
        kernel_block_sizes=tuple(backend.get_supported_kernel_block_sizes(spec)),
    )


@dataclass(slots=True)
class AttentionGroup:
    """Layers of one cache group and one backend."""

    backend: type[AttentionBackend]
    layer_names: list[str]
    kv_cache_spec: KVCacheSpec
    kv_cache_group_id: int
    builder: Any = None
    """Its ``AttentionMetadataBuilder``, where the group has one."""


def select_common_block_size(
    kv_manager_block_size: int,
    backends: Sequence[type[AttentionBackend]],
    kv_cache_specs: Sequence[KVCacheSpec] | None = None,
) -> int:
    """Tokens of the kernel block that all ``backends`` read; see the resolver's function.

    Raises:
        ConfigError: there is none.
    """
    specs: Sequence[KVCacheSpec | None] = kv_cache_specs or [None] * len(backends)
    limits = [_constraints_of(b, spec) for b, spec in zip(backends, specs, strict=True)]
    return _common_block_size(kv_manager_block_size, limits)


def prepare_kernel_block_sizes(
    kv_cache_config: KVCacheConfig, attn_groups: Sequence[Sequence[AttentionGroup]] | None = None
) -> list[int]:
    """Tokens of a kernel block of each cache group: as planned.

    Raises:
        ConfigError: a backend in ``attn_groups`` does not read the planned size.
    """
    sizes = [
        kv_cache_config.kernel_block_size(i) for i in range(len(kv_cache_config.kv_cache_groups))
    ]
    for size, groups in zip(sizes, attn_groups or [[]] * len(sizes), strict=True):
        for group in groups:
            spec = group.kv_cache_spec
            limits = _constraints_of(group.backend, spec)
            if spec.uses_slot_mapping and not limits.accepts_block(size):
                raise ConfigError(
                    f"backend {limits.backend} does not read kernel blocks of {size} tokens, as "
                    f"planned for group {group.kv_cache_group_id}"
                )
    return sizes


class KVBlockZeroer:
    """Zeroes blocks of all layers' caches, found through the layers themselves.

    For callers who have layers and no plan; ``v1.kv_cache.blocks.KVBlockZeroer`` does it by plan.

    Args:
        attn_groups_iter: the groups whose layers count.
        kernel_block_sizes: not needed: a view's kernel blocks are found from ``num_blocks``.
        static_forward_context: layer name -> layer, bound.
        num_blocks: manager blocks.
    """

    def __init__(
        self,
        device: torch.device | str,
        attn_groups_iter: Iterable[AttentionGroup],
        kernel_block_sizes: Sequence[int],
        static_forward_context: Mapping[str, Any],
        num_blocks: int,
    ) -> None:
        views: list[torch.Tensor] = []
        for group in attn_groups_iter:
            for name in group.layer_names:
                cache = static_forward_context[name].kv_cache
                views.extend(cache if isinstance(cache, tuple) else (cache,))
        self._zeroers = [
            RunZeroer(raw, runs, num_blocks) for raw, runs in runs_of_views(views, num_blocks)
        ]

    def zero_block_ids(self, block_ids: Sequence[int]) -> None:
        """Clear these manager blocks."""
        for zeroer in self._zeroers:
            zeroer.zero_block_ids(block_ids)


def copy_kv_cache_blocks_inplace(
    kv_caches: Mapping[str, torch.Tensor] | Sequence[torch.Tensor],
    num_blocks: int,
    copies: Sequence[KVCacheBlockCopy],
) -> None:
    """Copy whole blocks in all of these views; bytes that several views show are copied once.

    All sources are read before any destination is written. By plan:
    ``v1.kv_cache.blocks.copy_kv_cache_blocks_inplace``.
    """
    views = kv_caches.values() if isinstance(kv_caches, Mapping) else kv_caches
    for raw, runs in runs_of_views(views, num_blocks):
        copy_block_runs(raw, runs, num_blocks, copies)


def get_kv_sharing_targets(layers: Mapping[str, AttentionLayerBase]) -> dict[str, str]:
    """Layers that read another layer's cache -> that layer.

    Raises:
        ConfigError: a target does not exist, or shares a cache itself.
    """
    targets = {}
    for name, layer in layers.items():
        target = layer.kv_sharing_target_layer_name
        if target is None:
            continue
        if target not in layers:
            raise ConfigError(f"layer {name} shares the cache of {target!r}, which does not exist")
        if layers[target].kv_sharing_target_layer_name is not None:
            raise ConfigError(f"layer {name} shares the cache of {target}, which has none itself")
        targets[name] = target
    return targets


def share_kv_caches(
    kv_caches: AllocatedKVCache, targets: Mapping[str, str], kv_cache_config: KVCacheConfig
) -> None:
    """Alias the caches of sharing layers and enter these layers into their targets' groups."""
    for name, target in targets.items():
        kv_caches.alias(name, target)
        group = kv_cache_config.kv_cache_groups[kv_cache_config.group_of(target)]
        if name not in group.layer_names:
            group.layer_names.append(name)
