"""Attention within chunks: a token sees what precedes it in its own chunk of a fixed size.

No kernel knows chunks. A request is shown to the kernels as several, one for each chunk that this
step's tokens lie in: its block table begins at the chunk's first block, its length is counted from
there. So it works with any backend, and costs nothing where a step stays within one chunk.
"""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from typing import Any

import torch

from vllm.config import VllmConfig
from vllm.errors import ConfigError
from vllm.model_executor.layers.attention.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
)

__all__ = ["ChunkedLocalAttention", "split_by_chunk"]

_SHARED_FIELDS = [field.name for field in fields(AttentionSpec) if field.init]


class ChunkedLocalAttention(Attention):
    """``Attention`` within chunks of ``attention_chunk_size`` tokens; other arguments as there."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        *,
        attention_chunk_size: int,
        **options: Any,
    ) -> None:
        super().__init__(num_heads, head_size, scale, **options)
        self.attention_chunk_size = attention_chunk_size
        self.attn_backend = _chunked(self.attn_backend)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        spec = super().get_kv_cache_spec(vllm_config)
        if not isinstance(spec, FullAttentionSpec):
            return spec
        same = {name: getattr(spec, name) for name in _SHARED_FIELDS}
        return ChunkedLocalAttentionSpec(**same, attention_chunk_size=self.attention_chunk_size)


@functools.cache
def _chunked(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """``backend`` with metadata that is split by chunks; the same class for the same backend."""
    builder_cls = backend.get_builder_cls()

    class ChunkedBuilder(builder_cls):  # type: ignore[valid-type, misc]
        def __init__(
            self,
            kv_cache_spec: KVCacheSpec,
            layer_names: list[str],
            vllm_config: VllmConfig,
            device: torch.device,
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            # Also a full layer's, where the chunked one was promoted.
            self.chunk_size = kv_cache_spec.attention_chunk_size  # type: ignore[attr-defined]
            self.block_size = kv_cache_spec.block_size
            if self.chunk_size % self.block_size:
                raise ConfigError(
                    f"this model's attention_chunk_size {self.chunk_size} is not a multiple of "
                    f"the {self.block_size} tokens of a block: give a --block-size that divides it",
                    parameter="block_size",
                    value=self.block_size,
                )

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            split = split_by_chunk(common_attn_metadata, self.chunk_size, self.block_size)
            return super().build(0, split, fast_build)

    class ChunkedBackend(backend):  # type: ignore[valid-type, misc]
        # The split's tensors are new in each step, and as many as there are chunks.
        fits_cuda_graphs = False
        fits_prompt_graphs = False

        @staticmethod
        def get_builder_cls() -> type[ChunkedBuilder]:
            return ChunkedBuilder

    return ChunkedBackend


def split_by_chunk(
    common: CommonAttentionMetadata, chunk_size: int, block_size: int
) -> CommonAttentionMetadata:
    """The step as if each chunk were a request.

    Args:
        chunk_size: tokens of a chunk, a multiple of ``block_size``.
        block_size: tokens of a block of ``common``'s block table.
    """
    seq_lens = common.seq_lens_cpu
    computed = common.num_computed_tokens_cpu
    first, last = computed // chunk_size, (seq_lens - 1) // chunk_size
    if int(last.max()) == 0:
        return common
    counts = last - first + 1
    rows = torch.repeat_interleave(torch.arange(common.num_reqs), counts)
    index_in_row = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    chunks = first[rows] + index_in_row
    origin = chunks * chunk_size
    ends = torch.minimum(seq_lens[rows], origin + chunk_size)
    num_queries = ends - torch.maximum(computed[rows], origin)
    lens = (ends - origin).to(torch.int32)
    query_start_loc = torch.zeros(len(rows) + 1, dtype=torch.int32)
    query_start_loc[1:] = num_queries.cumsum(0)

    table = common.block_table_tensor
    width = chunk_size // block_size
    columns = (origin // block_size).unsqueeze(1) + torch.arange(width)
    # The last chunk's row may reach past the table; nothing of it is read there.
    columns.clamp_(max=table.shape[1] - 1)
    device = table.device
    return replace(
        common,
        query_start_loc=query_start_loc.to(device),
        query_start_loc_cpu=query_start_loc,
        seq_lens=lens.to(device),
        seq_lens_cpu=lens,
        num_computed_tokens_cpu=(lens - num_queries).to(torch.int32),
        num_reqs=len(rows),
        max_query_len=int(num_queries.max()),
        max_seq_len=int(lens.max()),
        block_table_tensor=table[rows.to(device).unsqueeze(1), columns.to(device)],
    )
