"""Which layers share one attention metadata, and building it once a step for each such group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.utils import AttentionGroup, get_kv_sharing_targets

__all__ = ["AttentionGroup", "AttentionGroups"]


class AttentionGroups:
    """All attention groups of a model.

    Args:
        kv_cache_config: its groups name the layers that own a cache or share one.
        layers: all of them, by name.
    """

    def __init__(
        self,
        kv_cache_config: KVCacheConfig,
        layers: Mapping[str, AttentionLayerBase],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        targets = get_kv_sharing_targets(layers)
        self.groups: list[AttentionGroup] = []
        self._block_sizes = [
            group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups
        ]
        for group_id, group in enumerate(kv_cache_config.kv_cache_groups):
            by_kind: dict[Any, list[str]] = {}
            for name in group.layer_names:
                spec = group.spec_of(targets.get(name, name))
                by_kind.setdefault((layers[name].get_attn_backend(), spec), []).append(name)
            kernel_block_size = kv_cache_config.kernel_block_size(group_id)
            for (backend, spec), names in by_kind.items():
                if spec.uses_slot_mapping and spec.block_size != kernel_block_size:
                    # A builder sees the block table, which is in kernel blocks.
                    spec = spec.copy_with_new_block_size(kernel_block_size)
                builder = backend.get_builder_cls()(spec, names, vllm_config, device)
                self.groups.append(AttentionGroup(backend, names, spec, group_id, builder))

    def build_metadata(
        self,
        common: list[CommonAttentionMetadata],
        num_common_prefix_blocks: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Layer name to metadata.

        Args:
            common: one per KV-cache group.
            num_common_prefix_blocks: leading blocks that all running requests hold, per group;
                None in a step whose launches may not depend on them.
        """
        metadata: dict[str, Any] = {}
        for group in self.groups:
            shared = 0
            if num_common_prefix_blocks:
                blocks = num_common_prefix_blocks[group.kv_cache_group_id]
                shared = blocks * self._block_sizes[group.kv_cache_group_id]
            built = group.builder.build(shared, common[group.kv_cache_group_id])
            metadata.update(dict.fromkeys(group.layer_names, built))
        return metadata
