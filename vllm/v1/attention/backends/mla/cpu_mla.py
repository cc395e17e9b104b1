"""CPU_MLA: attention over a cache of latents by the C++ kernels.

A request with few new tokens attends to the latents themselves (``forward_mqa``): all heads share
each latent that is read, as query heads share a KV head. One with many has its latents, those in
the cache too, expanded to keys and values of some heads at a time (``forward_mha``), whose products
are three times smaller.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vllm import _custom_ops as ops
from vllm.v1.attention.backend import (
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.mla.common import MLAImpl
from vllm.v1.attention.backends.mla.torch_ref_mla import TorchRefMLABackend
from vllm.v1.attention.backends.torch_ref import PagedAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheSpec

__all__ = ["CPUMLABackend", "CPUMLAImpl", "CPUMLAMetadata"]

_EXPANDED_BYTES = 64 << 20
"""Keys and values in memory at a time: those of as many heads as fit, one at least."""


@dataclass(slots=True)
class _Absorbed:
    """The requests of a step that attend to latents; ``rows`` (T,) is None where all do."""

    rows: torch.Tensor | None
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor


@dataclass(slots=True)
class _Expanded:
    """A request whose latents are expanded; its tokens are ``[first, last)``."""

    row: int
    first: int
    last: int
    seq_len: int


@dataclass(slots=True)
class CPUMLAMetadata(PagedAttentionMetadata):
    _splits: dict[int, tuple[_Absorbed | None, list[_Expanded]]] = field(default_factory=dict)

    def split(self, expand_from: int) -> tuple[_Absorbed | None, list[_Expanded]]:
        """The requests with fewer new tokens than ``expand_from``, and each of the others."""
        if expand_from not in self._splits:
            self._splits[expand_from] = self._split(expand_from)
        return self._splits[expand_from]

    def _split(self, expand_from: int) -> tuple[_Absorbed | None, list[_Expanded]]:
        if self.max_query_len < expand_from:
            return _Absorbed(None, self.query_start_loc, self.seq_lens, self.block_table), []
        starts, lens = self.query_start_loc.tolist(), self.seq_lens.tolist()
        counts = [last - first for first, last in itertools.pairwise(starts)]
        expanded = [
            _Expanded(row, starts[row], starts[row + 1], lens[row])
            for row, count in enumerate(counts)
            if count >= expand_from
        ]
        few = [row for row, count in enumerate(counts) if 0 < count < expand_from]
        if not few:
            return None, expanded
        rows = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in few])
        query_start_loc = torch.zeros(len(few) + 1, dtype=torch.int32)
        query_start_loc[1:] = torch.tensor([counts[row] for row in few]).cumsum(0)
        return (
            _Absorbed(rows, query_start_loc, self.seq_lens[few], self.block_table[few]),
            expanded,
        )


class CPUMLAMetadataBuilder(AttentionMetadataBuilder[CPUMLAMetadata]):
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUMLAMetadata:
        return CPUMLAMetadata.of(common_attn_metadata)


def tokens_worth_expanding(layer: Any) -> int:
    """New tokens of a request from which on expanding its latents takes fewer multiplications.

    Of one head and one key: expanding costs R * (nope + v) once, and nope + rope + v for each new
    token; absorbing costs 2 * R + rope for each.
    """
    saved = 2 * layer.kv_lora_rank - layer.qk_nope_head_dim - layer.v_head_dim
    if saved <= 0:
        return 1 << 62
    return 1 + layer.kv_lora_rank * (layer.qk_nope_head_dim + layer.v_head_dim) // saved


class CPUMLAImpl(MLAImpl[CPUMLAMetadata]):
    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: CPUMLAMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Query (T, Q, nope + rope) and latents (B, N, R + rope) -> output (T, Q, v)."""
        absorbed, expanded = attn_metadata.split(tokens_worth_expanding(layer))
        if absorbed is not None:
            if absorbed.rows is None:
                self.forward_mqa(layer, query, kv_cache, absorbed, output)
            else:
                part = query[absorbed.rows]
                result = output.new_empty((part.shape[0], *output.shape[1:]))
                self.forward_mqa(layer, part, kv_cache, absorbed, result)
                output.index_copy_(0, absorbed.rows, result)
        for request in expanded:
            tokens = slice(request.first, request.last)
            table = attn_metadata.block_table[request.row]
            self.forward_mha(layer, query[tokens], kv_cache, table, request.seq_len, output[tokens])
        return output

    def forward_mqa(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        step: _Absorbed,
        output: torch.Tensor,
    ) -> None:
        """Attend to latents; query (T, Q, nope + rope) -> output (T, Q, v)."""
        rank, nope = layer.kv_lora_rank, layer.qk_nope_head_dim
        num_tokens, num_heads, _ = query.shape
        # Heads outside: the projections before and after take each head's tokens as one run.
        heads = query.new_empty((num_heads, num_tokens, layer.head_size))
        heads[..., :rank] = layer.kv_b_proj.absorb_queries(query[..., :nope])
        heads[..., rank:] = query[..., nope:].transpose(0, 1)
        sums = query.new_empty((num_heads, num_tokens, rank))
        ops.paged_attention(
            heads.transpose(0, 1),
            kv_cache.unsqueeze(1),
            sums.transpose(0, 1),
            step.query_start_loc,
            step.seq_lens,
            step.block_table,
            self.scale,
            value_offset=0,
        )
        output.copy_(layer.kv_b_proj.expand_values(sums).transpose(0, 1))

    def forward_mha(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_len: int,
        output: torch.Tensor,
    ) -> None:
        """Attend to keys and values of one request; query (T, Q, nope + rope), output (T, Q, v)."""
        rank, nope, width = layer.kv_lora_rank, layer.qk_nope_head_dim, layer.qk_head_dim
        num_blocks = -(-seq_len // kv_cache.shape[1])
        # Latents are expanded to keys and values here, so those of the request are gathered first.
        gathered = kv_cache[block_table[:num_blocks].long()]
        latents = gathered.flatten(0, 1)[:seq_len].to(query.dtype)
        content = width + layer.v_head_dim
        at_once = max(1, _EXPANDED_BYTES // (seq_len * content * query.dtype.itemsize))
        starts = torch.tensor([0, query.shape[0]], dtype=torch.int32)
        lens = torch.tensor([seq_len], dtype=torch.int32)
        table = torch.zeros((1, 1), dtype=torch.int32)
        for first in range(0, layer.num_heads, at_once):
            last = min(first + at_once, layer.num_heads)
            # One block of all tokens, as the kernel for caches with heads reads it.
            block = query.new_empty((1, last - first, seq_len, content))
            block[..., nope:width] = latents[:, rank:]
            for head in range(first, last):
                layer.kv_b_proj.expand_head(head, latents[:, :rank], block[0, head - first])
            ops.paged_attention(
                query[:, first:last], block, output[:, first:last], starts, lens, table, self.scale
            )


class CPUMLABackend(TorchRefMLABackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "CPU_MLA"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return CPUMLAImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:  # type: ignore[override]
        return CPUMLAMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: KVCacheSpec | None = None,
    ) -> Sequence[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(range(8, ops.MAX_HEAD_SIZE + 1, 8))
