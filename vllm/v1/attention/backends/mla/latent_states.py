"""LATENT_STATES: where the states of a cache of latents lie, one or several tokens a state.

For layers that gather states themselves, in PyTorch, on any device: DeepSeek V4's windows,
compressed latents, index keys and what these are made from. Owns no computation.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch

from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

__all__ = ["LatentStatesBackend", "LatentStatesMetadata"]

_Known = TypeVar("_Known")


@dataclass(slots=True)
class LatentStatesMetadata(AttentionMetadata):
    """One step of a group of caches. R requests, T tokens."""

    block_size: int
    """Tokens of a block, whatever the number of its states."""
    tokens_per_state: int
    block_table: torch.Tensor
    """(R, blocks) int32."""
    token_rows: torch.Tensor
    """(T,) int64: the request of each token."""
    starts: list[int]
    """Request r owns tokens ``[starts[r], starts[r + 1])``."""
    max_query_len: int
    _known: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], _Known]) -> _Known:
        """``make()``, called by the first layer of the step that asks for ``key``.

        Args:
            make: works out what follows from the step alone, the same for all layers of the group.
        """
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def locate_tokens(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``locate`` of the step's own tokens, at their positions (T,)."""
        return self.once("tokens", lambda: self.locate(self.token_rows, positions))

    def locate(
        self, rows: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and index in it of the states that hold these positions of these requests.

        Args:
            rows, positions: int64, of one shape or broadcast against each other; positions that are
                negative mean the first.
        """
        positions = positions.clamp(min=0)
        blocks = self.block_table[rows, positions // self.block_size].long()
        return blocks, positions % self.block_size // self.tokens_per_state


class LatentStatesMetadataBuilder(AttentionMetadataBuilder[LatentStatesMetadata]):
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> LatentStatesMetadata:
        common = common_attn_metadata
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].long()
        rows = torch.repeat_interleave(torch.arange(common.num_reqs), starts.diff())
        spec = self.kv_cache_spec
        return LatentStatesMetadata(
            block_size=spec.block_size,
            tokens_per_state=spec.block_size // spec.num_states,
            block_table=common.block_table_tensor,
            token_rows=rows.to(common.block_table_tensor.device),
            starts=starts.tolist(),
            max_query_len=common.max_query_len,
        )


class LatentStatesBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "LATENT_STATES"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        raise TypeError("layers of this backend gather and compute themselves")

    @staticmethod
    def get_builder_cls() -> type[LatentStatesMetadataBuilder]:
        return LatentStatesMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> Sequence[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def is_mla(cls) -> bool:
        return True
