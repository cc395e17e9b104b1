"""From what layers declare and the memory there is, to one ``KVCacheConfig`` per worker.

Owns the size of the pool and the errors about it. Layout and grouping are the resolver's, bytes
the placement's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from vllm.errors import CapacityError, ConfigError
from vllm.v1.kv_cache.config import KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.kv_cache.placement import bytes_per_block, place_layers
from vllm.v1.kv_cache.resolver import (
    BackendConstraints,
    CacheMovement,
    LayoutPlan,
    RejectedLayout,
    resolve_layout,
    select_common_block_size,
)
from vllm.v1.kv_cache.spec import KVCacheSpec
from vllm.v1.kv_cache.state_specs import UniformTypeKVCacheSpecs

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = [
    "BackendConstraints",
    "CacheMovement",
    "LayoutPlan",
    "RejectedLayout",
    "get_kv_cache_configs",
    "longest_that_fits",
    "memory_options",
    "plan_kv_cache",
    "resolve_layout",
    "select_common_block_size",
]

Specs = Mapping[str, KVCacheSpec]
Constraints = Mapping[str, BackendConstraints]
T = TypeVar("T")

NULL_BLOCKS = 1
"""Block 0 is never given to a request."""


def memory_options(device_type: str) -> str:
    """The options that size the pool on a device, as an error names them."""
    if device_type == "cpu":
        return "--kv-cache-memory-bytes"
    return "--kv-cache-memory-bytes or --gpu-memory-utilization"


def plan_kv_cache(
    vllm_config: VllmConfig,
    kv_cache_specs: Specs,
    available_memory: int,
    constraints: Constraints | None = None,
    movement: CacheMovement | None = None,
) -> KVCacheConfig:
    """The plan of a single worker; see ``get_kv_cache_configs``."""
    return get_kv_cache_configs(
        vllm_config, [kv_cache_specs], [available_memory], [constraints or {}], movement
    )[0]


def get_kv_cache_configs(
    vllm_config: VllmConfig,
    kv_cache_specs: Sequence[Specs],
    available_memory: Sequence[int],
    constraints: Sequence[Constraints] | None = None,
    movement: CacheMovement | None = None,
) -> list[KVCacheConfig]:
    """Plan the caches of all workers together: one layout, the same groups and block count.

    Args:
        kv_cache_specs: of each worker, layer name -> spec (of its own pipeline stage).
        available_memory: bytes of each worker.
        constraints: of each worker, layer name -> what the layer's backend reads.
        movement: what moves blocks, None where nothing does.

    Raises:
        ConfigError: no layout works, or workers declare one layer differently.
        CapacityError: a request of --max-model-len does not fit, or --num-gpu-blocks-override
            is more than there is memory for.
    """
    specs = _merge("kv cache specs", kv_cache_specs)
    kept = {name: spec for name, spec in specs.items() if spec.page_size_bytes > 0}
    if not kept:
        return [KVCacheConfig(1, [], []) for _ in kv_cache_specs]
    limits = _merge("backends", constraints or [])
    plan = resolve_layout(kept, vllm_config, limits, movement)
    groups = [group.layer_names for group in plan.grouping.groups]
    per_worker = [
        [[name for name in names if name in own] for names in groups] for own in kv_cache_specs
    ]
    costs = [bytes_per_block(own, plan.grouping.specs) for own in per_worker]
    num_blocks = min(
        (
            max(0, memory) // cost
            for memory, cost in zip(available_memory, costs, strict=True)
            if cost
        ),
        default=NULL_BLOCKS,
    )
    num_blocks = _decide_num_blocks(num_blocks, plan, vllm_config, max(costs))
    return [
        _make_config(plan, own, num_blocks, vllm_config.cache_config.enable_prefix_caching)
        for own in per_worker
    ]


def _merge(what: str, of_workers: Sequence[Mapping[str, T]]) -> dict[str, T]:
    merged: dict[str, T] = {}
    for rank, own in enumerate(of_workers):
        for name, value in own.items():
            if merged.setdefault(name, value) != value:
                raise ConfigError(
                    f"worker {rank} declares other {what} for layer {name} than the workers "
                    f"before it: {value} and {merged[name]}"
                )
    return merged


def _decide_num_blocks(
    affordable: int, plan: LayoutPlan, vllm_config: VllmConfig, block_bytes: int
) -> int:
    override = vllm_config.cache_config.num_gpu_blocks_override
    if override is not None and override > affordable:
        raise CapacityError(
            f"--num-gpu-blocks-override asks for {override} blocks of {block_bytes} bytes, but "
            f"there is memory for {affordable}"
        )
    num_blocks = affordable if override is None else override
    needed = NULL_BLOCKS + _blocks_of_longest(plan, vllm_config)
    if needed > num_blocks:
        longest = vllm_config.model_config.max_model_len
        fits = longest_that_fits(plan, vllm_config, num_blocks)
        remedy = f"lower --max-model-len to at most {fits}, or " if fits else ""
        if override is not None:
            option = f"--num-gpu-blocks-override to {needed}"
        else:
            option = f"--kv-cache-memory-bytes to {needed * block_bytes}"
            if vllm_config.device_config.device_type != "cpu":
                option += ", or raise --gpu-memory-utilization"
        raise CapacityError(
            f"a request of --max-model-len {longest} needs {needed} cache blocks "
            f"({needed * block_bytes} bytes), but there are {num_blocks} "
            f"({num_blocks * block_bytes} bytes): {remedy}raise {option}"
        )
    return num_blocks


def _blocks_of_longest(plan: LayoutPlan, vllm_config: VllmConfig) -> int:
    return sum(group.spec.max_resident_blocks(vllm_config) for group in plan.grouping.groups)


def longest_that_fits(plan: LayoutPlan, vllm_config: VllmConfig, num_blocks: int) -> int:
    """Largest max_model_len whose request fits into ``num_blocks``; 0 if none does."""

    def fits(length: int) -> bool:
        model = replace(vllm_config.model_config, max_model_len=length)
        config = replace(vllm_config, model_config=model)
        return NULL_BLOCKS + _blocks_of_longest(plan, config) <= num_blocks

    low, high = 0, vllm_config.model_config.max_model_len
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _make_config(
    plan: LayoutPlan,
    own_groups: Sequence[Sequence[str]],
    num_blocks: int,
    enable_prefix_caching: bool,
) -> KVCacheConfig:
    specs = plan.grouping.specs
    tensors: list[KVCacheTensor] = place_layers(own_groups, specs, plan.layout, num_blocks)
    groups = []
    for planned, names in zip(plan.grouping.groups, own_groups, strict=True):
        spec = planned.spec
        if isinstance(spec, UniformTypeKVCacheSpecs) and names:
            spec = replace(spec, kv_cache_specs={name: specs[name] for name in names})
        groups.append(
            KVCacheGroupSpec(
                list(names), spec, is_eagle_group=any(specs[name].is_draft for name in names)
            )
        )
    hashed = [
        group.spec.block_size
        for group in plan.grouping.groups
        if enable_prefix_caching and group.spec.prefix_cacheable
    ]
    return KVCacheConfig(
        num_blocks,
        tensors,
        groups,
        kv_cache_layout=plan.layout,
        kernel_block_sizes=plan.kernel_block_sizes,
        hash_block_size=math.gcd(*hashed) if hashed else None,
        explanation=plan,
    )
