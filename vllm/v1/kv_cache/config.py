"""The plan of one worker's cache as data: what allocation, scheduling and transfer read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from vllm.errors import ConfigError
from vllm.v1.kv_cache.spec import KVCacheSpec
from vllm.v1.kv_cache.state_specs import MambaSpec, UniformTypeKVCacheSpecs
from vllm.v1.kv_cache_layout import KVCacheLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheTensor:
    """Layers of one group and one spec, in the shared backing allocation.

    The page of layer ``layers[l]`` and block ``b`` starts at

        base + offset + l * layer_stride + b * block_stride      (bytes)
    """

    size: int
    """Bytes of the whole backing, the same for every tensor of a device."""
    layers: tuple[str, ...]
    layer_stride: int
    block_stride: int
    offset: int = 0
    host_resident: bool = False


@dataclass(frozen=True, slots=True)
class SlotTensor:
    """Layers that use the very same bytes, as vLLM 0.27.1 listed them in ``kv_cache_tensors``."""

    size: int
    """Bytes of the allocation that the layers lie in."""
    shared_by: list[str]
    offset: int = 0
    block_stride: int = 0
    """0: blocks lie page by page. Else the allocation is rows of this many bytes, one a block, and
    the layers' page begins at ``offset`` of each."""


@dataclass(frozen=True, slots=True)
class KVCacheGroupSpec:
    """Layers that share one block table."""

    layer_names: list[str]
    kv_cache_spec: KVCacheSpec
    is_eagle_group: bool = False
    host_resident: bool = False
    enable_kv_transfer: bool = True
    role: str | None = None

    def spec_of(self, layer_name: str) -> KVCacheSpec:
        """The layer's own spec, also where the group's is a uniform-type collection."""
        if isinstance(self.kv_cache_spec, UniformTypeKVCacheSpecs):
            return self.kv_cache_spec.kv_cache_specs[layer_name]
        return self.kv_cache_spec


@dataclass(frozen=True, slots=True)
class KVCacheConfig:
    """The plan of one worker's cache: all that allocation, scheduling and transfer need.

    ``num_blocks`` counts manager blocks; block 0 is the null block, which no request owns.
    """

    num_blocks: int
    kv_cache_tensors: list[KVCacheTensor]
    kv_cache_groups: list[KVCacheGroupSpec]
    kv_cache_layout: KVCacheLayout = KVCacheLayout.LBHNC
    kernel_block_sizes: tuple[int, ...] = ()
    """Tokens of a kernel block, for each group; empty means that they are the manager's."""
    hash_block_size: int | None = None
    """Tokens that one block hash covers; None where nothing is prefix-cached."""
    explanation: Any = field(default=None, compare=False, repr=False)
    """``planner.LayoutPlan``: why this came out."""

    @property
    def backing_size_bytes(self) -> int:
        return max((tensor.size for tensor in self.kv_cache_tensors), default=0)

    @property
    def bytes_per_block(self) -> int:
        return self.backing_size_bytes // self.num_blocks

    @property
    def has_mamba_layers(self) -> bool:
        return any(
            isinstance(g.kv_cache_spec.manager_spec, MambaSpec) for g in self.kv_cache_groups
        )

    @property
    def has_mixed_precision_kv_cache(self) -> bool:
        """Layers store different dtypes, so a block changes its meaning with its owner."""
        dtypes = {
            group.spec_of(name).storage_dtype
            for group in self.kv_cache_groups
            for name in group.layer_names
        }
        return len(dtypes) > 1

    @property
    def needs_kv_cache_zeroing(self) -> bool:
        """Blocks must be zeroed when they are taken from the pool."""
        zeroing = any(group.kv_cache_spec.needs_zeroing for group in self.kv_cache_groups)
        return zeroing or self.has_mixed_precision_kv_cache

    @property
    def cache_hit_alignment_tokens(self) -> int:
        """A prefix hit is a multiple of this: the common multiple of the groups' block sizes."""
        sizes = [
            g.kv_cache_spec.block_size
            for g in self.kv_cache_groups
            if g.kv_cache_spec.prefix_cacheable
        ]
        return math.lcm(*sizes) if sizes else 1

    def tensors_by_slot(self) -> list[SlotTensor]:
        """The plan for outside code that allocates and cuts tensors as vLLM 0.27.1 did.

        Raises:
            ConfigError: the layout does not keep a page together, which had no form there.
        """
        if not self.kv_cache_layout.is_block_compact:
            raise ConfigError(
                f"layout {self.kv_cache_layout} does not keep a page together, so layers have no "
                "tensor of their own: use LBHNC, LBNHC, BLHNC or BLNHC"
            )
        slots: dict[int, list[str]] = {}
        for tensor in self.kv_cache_tensors:
            for index, name in enumerate(tensor.layers):
                slots.setdefault(tensor.offset + index * tensor.layer_stride, []).append(name)
        if self.kv_cache_layout.is_block_outermost:
            size, row = self.backing_size_bytes, self.bytes_per_block
            return [SlotTensor(size, names, offset, row) for offset, names in slots.items()]
        return [
            SlotTensor(self.num_blocks * self.layer_spec(names[0]).page_size_bytes, names)
            for names in slots.values()
        ]

    def kernel_block_size(self, group_id: int) -> int:
        """Tokens of a kernel block of this group."""
        if self.kernel_block_sizes:
            return self.kernel_block_sizes[group_id]
        return self.kv_cache_groups[group_id].kv_cache_spec.block_size

    def kernel_blocks_per_block(self, group_id: int) -> int:
        block_size = self.kv_cache_groups[group_id].kv_cache_spec.block_size
        return block_size // self.kernel_block_size(group_id)

    def group_of(self, layer_name: str) -> int:
        """Index of the group that the layer belongs to.

        Raises:
            KeyError: no group has that layer.
        """
        for i, group in enumerate(self.kv_cache_groups):
            if layer_name in group.layer_names:
                return i
        raise KeyError(layer_name)

    def layer_spec(self, layer_name: str) -> KVCacheSpec:
        return self.kv_cache_groups[self.group_of(layer_name)].spec_of(layer_name)
