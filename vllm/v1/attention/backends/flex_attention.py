"""FLEX_ATTENTION: torch's flex_attention over the paged cache, for masks of one's own.

The whole cache is one sequence of keys to it, in the order in which blocks lie; a block mask says
which blocks a tile of queries visits, and a mask function which of their tokens each query sees.
That needs tokens at equal distances through the whole layer: one layout, no padding, no copy.

A layer may carry ``mask_mod(batch, head, query_position, key_position)`` over positions in the
request; it then replaces the causal rule (a window still applies).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from vllm.errors import ConfigError
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.torch_ref import PagedAttentionImpl, PagedAttentionMetadata
from vllm.v1.attention.ops.triton_tails import clear_tails
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

__all__ = ["FlexAttentionBackend", "FlexAttentionImpl", "FlexAttentionMetadata"]

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_DECODE_TILE = 16
_PROMPT_TILE = 64


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _see_earlier(
    batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    return key <= query


def _see_all(
    batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    return key >= 0


@dataclass(slots=True)
class FlexAttentionMetadata(PagedAttentionMetadata):
    """One step. R requests, T tokens; W tiles of queries."""

    query_tile: int
    token_requests: torch.Tensor
    """(T,) int64."""
    positions: torch.Tensor
    """(T,) int64, in the token's request."""
    tile_requests: torch.Tensor
    """(W, m) int64: the requests that a tile's queries belong to; -1 where they are fewer."""
    _masks: dict[Any, Any] = field(default_factory=dict)
    _owned: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def owned(self, num_blocks: int, page: int) -> torch.Tensor:
        """(R, B) int64: which block of the request a block of the cache is; -1: none."""
        key = (num_blocks, page)
        if key not in self._owned:
            table = self.block_table.long()
            columns = torch.arange(table.shape[1], device=table.device)
            used = columns < (self.seq_lens[:, None] + page - 1) // page
            owned = table.new_full((table.shape[0], num_blocks + 1), -1)
            # Columns behind the end name no block: they all write to one place too many.
            owned.scatter_(1, torch.where(used, table, num_blocks), columns.expand_as(table))
            self._owned[key] = owned[:, :num_blocks].contiguous()
        return self._owned[key]

    def block_mask(self, num_blocks: int, page: int, window: int, see: MaskMod) -> Any:
        """The ``BlockMask`` of a step, made once for each kind of layer."""
        from torch.nn.attention.flex_attention import BlockMask

        key = (num_blocks, page, window, see)
        if key not in self._masks:
            owned = self.owned(num_blocks, page)
            requests, positions = self.token_requests, self.positions

            def sees(
                batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, slot: torch.Tensor
            ) -> torch.Tensor:
                block = owned[requests[row], slot // page]
                at, query = block * page + slot % page, positions[row]
                visible = (block >= 0) & see(batch, head, query, at)
                # Slots behind the last token belong to the block, too.
                visible = visible & (at < lengths[requests[row]])
                return visible & (at > query - window) if window else visible

            lengths = self.seq_lens.long()
            counts, indices = self.visited(num_blocks, page)
            self._masks[key] = BlockMask.from_kv_blocks(
                counts[None, None],
                indices[None, None],
                BLOCK_SIZE=(self.query_tile, page),
                mask_mod=sees,
                seq_lengths=(self.num_actual_tokens, num_blocks * page),
                compute_q_blocks=False,
            )
        return self._masks[key]

    def visited(self, num_blocks: int, page: int) -> tuple[torch.Tensor, torch.Tensor]:
        """How many blocks each tile of queries visits (W,), and which (W, columns); int32."""
        wanted = self.tile_requests.clamp(min=0)
        table = self.block_table.long()[wanted]
        columns = torch.arange(table.shape[2], device=table.device)
        used = columns < ((self.seq_lens + page - 1) // page)[wanted][..., None]
        used &= self.tile_requests[..., None] >= 0
        blocks = torch.where(used, table, num_blocks).flatten(1).sort(dim=1).values
        # Requests that share a prefix share blocks: each is visited once.
        again = torch.zeros_like(blocks, dtype=torch.bool)
        again[:, 1:] = blocks[:, 1:] == blocks[:, :-1]
        blocks = blocks.masked_fill(again, num_blocks).sort(dim=1).values
        counts = (blocks < num_blocks).sum(dim=1)
        return counts.int(), torch.where(blocks < num_blocks, blocks, 0).int()


class FlexAttentionMetadataBuilder(AttentionMetadataBuilder[FlexAttentionMetadata]):
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlexAttentionMetadata:
        common = common_attn_metadata
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].numpy().astype(np.int64)
        counts = np.diff(starts)
        requests = np.repeat(np.arange(common.num_reqs), counts)
        before = common.seq_lens_cpu[: common.num_reqs].numpy() - counts
        positions = np.arange(requests.size) - starts[requests] + before[requests]
        tile = _DECODE_TILE if common.max_query_len == 1 else _PROMPT_TILE
        each = [
            np.unique(requests[first : first + tile]) for first in range(0, requests.size, tile)
        ]
        tiles = np.full((len(each), max(map(len, each))), -1, dtype=np.int64)
        for row, mine in zip(tiles, each, strict=True):
            row[: mine.size] = mine
        device = common.block_table_tensor.device
        on_device = (
            torch.from_numpy(array).to(device, non_blocking=True)
            for array in (requests, positions, tiles)
        )
        names = ("token_requests", "positions", "tile_requests")
        return FlexAttentionMetadata.of(
            common, query_tile=tile, **dict(zip(names, on_device, strict=True))
        )


class FlexAttentionImpl(PagedAttentionImpl[FlexAttentionMetadata]):
    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: FlexAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        clear_tails(
            kv_cache,
            attn_metadata.block_table,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
        )
        num_blocks, page = kv_cache.shape[0], kv_cache.shape[2]
        states = self._one_sequence(kv_cache)
        default = _see_earlier if attn_metadata.causal else _see_all
        mask = attn_metadata.block_mask(
            num_blocks, page, self.sliding_window, getattr(layer, "mask_mod", None) or default
        )
        tokens = attn_metadata.num_actual_tokens
        attend: Callable[..., torch.Tensor]
        options: dict[str, Any] = {}
        if kv_cache.is_cuda:
            attend = _compiled()
            sizes = {"BLOCK_M": min(attn_metadata.query_tile, 64), "BLOCK_N": min(page, 64)}
            options["kernel_options"] = sizes
        else:
            from torch.nn.attention.flex_attention import flex_attention as attend
        result = attend(
            query[:tokens].transpose(0, 1)[None],
            states[None, ..., : self.head_size],
            states[None, ..., self.head_size :],
            score_mod=self._score_mod(attn_metadata, num_blocks, page),
            block_mask=mask,
            scale=self.scale,
            enable_gqa=self.num_heads != self.num_kv_heads,
            **options,
        )
        output[:tokens] = result[0].transpose(0, 1)
        return output

    def _one_sequence(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """``(H, B * N, 2 * D)``, a view: the tokens of all blocks, one behind the other."""
        num_blocks, heads, page, content = kv_cache.shape
        if kv_cache.stride(0) != page * kv_cache.stride(2):
            raise ConfigError(
                "FLEX_ATTENTION reads a layer's tokens at equal distances, and blocks of this "
                "cache are padded or lie between other layers': use VLLM_KV_CACHE_LAYOUT=NHD, or "
                "another --attention-backend",
                parameter="attention_backend",
            )
        return kv_cache.transpose(0, 1).view(heads, num_blocks * page, content)

    def _score_mod(
        self, metadata: FlexAttentionMetadata, num_blocks: int, page: int
    ) -> Callable[..., torch.Tensor] | None:
        soft_cap, slopes = self.logits_soft_cap, self.alibi_slopes
        if not soft_cap and slopes is None:
            return None
        owned = metadata.owned(num_blocks, page)
        requests, positions = metadata.token_requests, metadata.positions
        on_device = None if slopes is None else slopes.to(positions.device)
        # Compiled for any size, a number of Python's would be a tensor on the host.
        caps = positions.new_full((self.num_heads,), soft_cap, dtype=torch.float32)

        def score(
            value: torch.Tensor,
            batch: torch.Tensor,
            head: torch.Tensor,
            row: torch.Tensor,
            slot: torch.Tensor,
        ) -> torch.Tensor:
            if soft_cap:
                value = caps[head] * torch.tanh(value / caps[head])
            if on_device is not None:
                at = owned[requests[row], slot // page] * page + slot % page
                value = value + on_device[head] * (at - positions[row])
            return value

        return score

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        from vllm.v1.attention.ops.paged_attn import PagedAttention
        from vllm.v1.attention.ops.triton_split_attention import store_split

        views = PagedAttention.split_kv_cache(kv_cache, self.num_kv_heads, self.head_size)
        store_split(key, value, *views, slot_mapping)


class FlexAttentionBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "bfloat16", "float16", "float32"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "FLEX_ATTENTION"

    @staticmethod
    def get_impl_cls() -> type[FlexAttentionImpl]:
        return FlexAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FlexAttentionMetadataBuilder]:
        return FlexAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> Sequence[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBNHC,)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(range(16, 257, 16))

    @classmethod
    def validate_configuration(cls, **wanted: Any) -> list[str]:
        import triton

        reasons = super().validate_configuration(**wanted)
        if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
            reasons.append("needs a GPU (or TRITON_INTERPRET=1)")
        cache_dtype = wanted.get("kv_cache_dtype") or "auto"
        if cache_dtype not in ("auto", str(wanted["dtype"]).removeprefix("torch.")):
            reasons.append(f"a {cache_dtype} cache needs a model of that dtype")
        return reasons
