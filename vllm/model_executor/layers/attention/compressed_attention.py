"""Attention over a window and over compressed latents (DeepSeek V4).

One latent a token is key and value of all heads. A token sees the last ones of its window as they
are, and those before them compressed: each ``ratio`` tokens become one latent, a mean of theirs
weighted by gates. With a ratio of 4, windows overlap by one, and an index chooses which compressed
latents a token sees. This module owns these caches, their upkeep and the gathering; projections of
queries and outputs are the model's. Letters: T tokens, Q heads, D width of a latent, W the window.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import LatentLayerBase, register_layer
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.layers.weight_loading import make_parameter
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.mla.latent_states import LatentStatesBackend, LatentStatesMetadata
from vllm.v1.attention.ops import packed_latents
from vllm.v1.kv_cache.declare_compressed import (
    compressed_latent_spec,
    compressor_spec,
    index_key_spec,
    window_latent_spec,
)
from vllm.v1.kv_cache_interface import KVCacheSpec

__all__ = ["CompressedAttention", "LatentStates"]

_TILE = 64
"""New tokens of one request that share the states gathered for them."""
_Codec = Callable[..., torch.Tensor]


class LatentStates(LatentLayerBase):
    """One cache of latents, read and written by request and position.

    Args:
        spec: what it keeps; its name is the layer's.
        codec: from values to bytes and back, where the spec packs them.
    """

    def __init__(self, spec: Any, codec: tuple[_Codec, _Codec] | None) -> None:
        self.spec = spec
        self.layer_name: str = spec.layer_name
        self._codec = codec if spec.storage_dtype == "uint8" else None
        register_layer(self.layer_name, self)

    def metadata(self) -> LatentStatesMetadata:
        metadata = get_forward_context().attn_metadata
        assert metadata is not None, "a run without caches does not come here"
        return metadata[self.layer_name]

    def store(self, rows: torch.Tensor, positions: torch.Tensor, values: torch.Tensor) -> None:
        """Write values (M, C) of positions (M,) of requests (M,)."""
        self._write(self.metadata().locate(rows, positions), values)

    def store_tokens(self, positions: torch.Tensor, values: torch.Tensor) -> None:
        """Write values (T, C) of the step's tokens, at positions (T,)."""
        self._write(self.metadata().locate_tokens(positions), values)

    def _write(self, where: tuple[torch.Tensor, torch.Tensor], values: torch.Tensor) -> None:
        if self._codec is not None:
            values = self._codec[0](values)
        self.kv_cache[where] = values.to(self.kv_cache.dtype)

    def gather(
        self, rows: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """The values (*, C) of positions (*) of requests (*); at negative positions any."""
        return self.read(self.metadata().locate(rows, positions), dtype)

    def read(self, where: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The values (*, C) of the states in these blocks (*) at these indices (*)."""
        states = self.kv_cache[where]
        return states.to(dtype) if self._codec is None else self._codec[1](states, dtype)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return LatentStatesBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        return self.spec


class _Tile(NamedTuple):
    """Some tokens of a step: of one request, one after another, or one of each of several."""

    tokens: slice
    rows: torch.Tensor
    """(n,)."""
    positions: torch.Tensor
    """(n,)."""
    is_shared: bool
    """One request: what is gathered has no axis of tokens."""

    def rows_of(self, positions: torch.Tensor) -> torch.Tensor:
        """The requests of positions (K,) or (n, K)."""
        return self.rows[:1] if self.is_shared else self.rows.unsqueeze(1)


def _tiles(metadata: LatentStatesMetadata, positions: torch.Tensor) -> Iterator[_Tile]:
    rows = metadata.token_rows
    if metadata.max_query_len == 1:
        yield _Tile(slice(0, len(rows)), rows, positions, False)
        return
    for first, last in itertools.pairwise(metadata.starts):
        for start in range(first, last, _TILE):
            tokens = slice(start, min(start + _TILE, last))
            yield _Tile(tokens, rows[tokens], positions[tokens], True)


@dataclass
class _Seen:
    """States that a tile's tokens see."""

    values: torch.Tensor
    """(K, D), or (n, K, D) where the tile is not shared."""
    mask: torch.Tensor
    """(n, K) bool."""


class _Compressor(nn.Module):
    """From ``ratio`` tokens' hidden states, and the ``ratio`` before them, to one latent.

    Names of parameters are those of released checkpoints.
    """

    def __init__(
        self,
        config: Any,
        width: int,
        ratio: int,
        rotary_emb: RotaryEmbedding,
        target: LatentStates,
        prefix: str,
    ) -> None:
        super().__init__()
        self.ratio, self.width = ratio, width
        self.overlaps = ratio == 4
        inner = width * (2 if self.overlaps else 1)
        names: dict[str, Any] = {"bias": False, "return_bias": False}
        self.wkv = ReplicatedLinear(config.hidden_size, inner, prefix=f"{prefix}.wkv", **names)
        self.wgate = ReplicatedLinear(config.hidden_size, inner, prefix=f"{prefix}.wgate", **names)
        self.ape = make_parameter(ratio, inner, dtype=torch.float32)
        self.norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.rotary_emb = rotary_emb
        self.rotary_dim = rotary_emb.rotary_dim
        # Plain attributes: they are caches, not modules.
        self.states = LatentStates(
            compressor_spec(
                f"{prefix}.state_cache", width=width, ratio=ratio, overlaps=self.overlaps
            ),
            None,
        )
        self.target = target

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> None:
        """Keep what the tokens give, and the latents of windows that end with one of them."""
        given = torch.cat((self.wkv.forward(hidden), self.wgate.forward(hidden)), dim=-1)
        rows = self.states.metadata().token_rows
        self.states.store_tokens(positions, given)
        ends = ((positions + 1) % self.ratio == 0).nonzero().squeeze(-1)
        if len(ends):
            self.target.store(
                rows[ends], positions[ends], self._compress(rows[ends], positions[ends], hidden)
            )

    def _compress(
        self, rows: torch.Tensor, ends: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Latents (M, D) of the windows that end at positions (M,) of requests (M,)."""
        ratio, width = self.ratio, self.width
        count = ratio * (2 if self.overlaps else 1)
        window = ends.unsqueeze(1) - torch.arange(count - 1, -1, -1, device=ends.device)
        given = self.states.gather(rows.unsqueeze(1), window, torch.float32)
        values, gates = given.chunk(2, dim=-1)
        if self.overlaps:
            bias = torch.cat((self.ape[:, :width], self.ape[:, width:]))
            # The window before gives its first half, the one that ends here its second.
            values, gates = (
                torch.cat((part[:, :ratio, :width], part[:, ratio:, width:]), dim=1)
                for part in (values, gates)
            )
            # Before the first window there is nothing; what was gathered there may be anything.
            before = (window < 0).unsqueeze(-1)
            values = values.masked_fill(before, 0.0)
            gates = gates.masked_fill(before, float("-inf"))
        else:
            bias = self.ape.data
        mean = (values * (gates + bias).softmax(1)).sum(1)
        latents = self.norm.forward(mean.to(hidden.dtype))
        rotated = latents[:, -self.rotary_dim :].unsqueeze(1)
        self.rotary_emb.forward(ends - (ratio - 1), rotated)
        return latents


class _Indexer(nn.Module):
    """Which compressed latents a token sees: those whose keys its queries fit best."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        config: Any,
        ratio: int,
        rotary_emb: RotaryEmbedding,
        prefix: str,
    ) -> None:
        super().__init__()
        self.num_heads, self.width = config.index_n_heads, config.index_head_dim
        self.top_k = config.index_topk
        self.ratio = ratio
        names: dict[str, Any] = {"bias": False, "return_bias": False}
        self.wq_b = ReplicatedLinear(
            config.q_lora_rank, self.num_heads * self.width, prefix=f"{prefix}.wq_b", **names
        )
        self.weights_proj = ReplicatedLinear(
            config.hidden_size, self.num_heads, prefix=f"{prefix}.weights_proj", **names
        )
        self.keys = LatentStates(
            index_key_spec(
                vllm_config,
                f"{prefix}.k_cache",
                width=self.width,
                ratio=ratio,
                latent_width=config.head_dim,
            ),
            (packed_latents.pack_index_keys, packed_latents.unpack_index_keys),
        )
        self.compressor = _Compressor(
            config, self.width, ratio, rotary_emb, self.keys, f"{prefix}.compressor"
        )
        self.rotary_emb = rotary_emb

    def forward(
        self, hidden: torch.Tensor, query_latent: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Update the keys; queries (T, heads, width) and their weights (T, heads), float32."""
        self.compressor.forward(hidden, positions)
        queries = self.wq_b.forward(query_latent).unflatten(-1, (self.num_heads, self.width))
        self.rotary_emb.forward(positions, queries[..., -self.rotary_emb.rotary_dim :])
        scale = self.num_heads**-0.5 * self.width**-0.5
        return queries.float(), self.weights_proj.forward(hidden).float() * scale

    def choose(
        self, tile: _Tile, queries: torch.Tensor, weights: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers (n, k) of the compressed latents that a tile's tokens see, and which are real."""
        index = torch.arange(count, device=queries.device)
        at = index * self.ratio
        keys = self.keys.gather(tile.rows_of(at), at, torch.float32)
        products = "nhd,kd->nhk" if tile.is_shared else "nhd,nkd->nhk"
        fit = torch.einsum(products, queries, keys).relu_()
        scores = torch.einsum("nhk,nh->nk", fit, weights)
        visible = index < ((tile.positions + 1) // self.ratio).unsqueeze(1)
        scores.masked_fill_(~visible, float("-inf"))
        chosen = scores.topk(min(self.top_k, count), dim=-1).indices
        return chosen, visible.gather(1, chosen)


class CompressedAttention(nn.Module):
    """The window, the compressed latents and the softmax over both.

    Args:
        ratio: tokens of a compressed latent; 0 for a layer that has its window only.
        rotary_emb: for the last ``rotary_dim`` of compressed latents and of the index.
        sinks: (Q,) scores without a value.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        config: Any,
        ratio: int,
        rotary_emb: RotaryEmbedding,
        sinks: torch.Tensor,
        prefix: str,
    ) -> None:
        super().__init__()
        width = config.head_dim
        self.window, self.ratio, self.scale = config.sliding_window, ratio, width**-0.5
        self.sinks = sinks
        codec = (packed_latents.pack_latents, packed_latents.unpack_latents)
        self.recent = LatentStates(
            window_latent_spec(vllm_config, f"{prefix}.swa_cache", width=width, window=self.window),
            codec,
        )
        if ratio:
            self.old = LatentStates(
                compressed_latent_spec(
                    vllm_config, f"{prefix}.mla_cache", width=width, ratio=ratio
                ),
                codec,
            )
            self.compressor = _Compressor(
                config, width, ratio, rotary_emb, self.old, f"{prefix}.compressor"
            )
        self.has_index = ratio == 4
        if self.has_index:
            self.indexer = _Indexer(vllm_config, config, ratio, rotary_emb, f"{prefix}.indexer")

    def forward(
        self,
        query: torch.Tensor,
        latents: torch.Tensor,
        hidden: torch.Tensor,
        query_latent: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Keep the tokens' latents, and attend.

        Args:
            query: (T, Q, D), rotated.
            latents: (T, D), rotated.
            hidden: (T, hidden), what compressed latents are made from.
            query_latent: (T, rank), what the index's queries are made from.
            positions: (T,) int64.

        Returns:
            (T, Q, D); zeros in a run without caches.
        """
        if get_forward_context().attn_metadata is None:
            return torch.zeros_like(query)
        metadata = self.recent.metadata()
        self.recent.store_tokens(positions, latents)
        index = None
        if self.ratio:
            self.compressor.forward(hidden, positions)
        if self.has_index:
            index = self.indexer.forward(hidden, query_latent, positions)
        output = torch.empty_like(query)
        for tile in _tiles(metadata, positions):
            part = query[tile.tokens]
            seen = [self._window(tile, query.dtype)]
            count = (int(tile.positions.max()) + 1) // self.ratio if self.ratio else 0
            if count and index is not None:
                seen.append(self._chosen(tile, index, count, query.dtype))
            elif count:
                seen.append(self._all_compressed(tile, count, query.dtype))
            output[tile.tokens] = self._attend(tile, part, seen)
        return output

    def _window(self, tile: _Tile, dtype: torch.dtype) -> _Seen:
        device = tile.positions.device
        if not tile.is_shared:
            metadata = self.recent.metadata()

            def look_back() -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
                # No further back than the longest request goes.
                furthest = min(self.window - 1, int(tile.positions.max()))
                at = tile.positions.unsqueeze(1) + torch.arange(-furthest, 1, device=device)
                return metadata.locate(tile.rows_of(at), at), at >= 0

            where, mask = metadata.once(("window", self.window), look_back)
            return _Seen(self.recent.read(where, dtype), mask)
        first, last = int(tile.positions[0]), int(tile.positions[-1])
        at = torch.arange(max(0, first + 1 - self.window), last + 1, device=device)
        distance = tile.positions.unsqueeze(1) - at
        mask = (distance >= 0) & (distance < self.window)
        return _Seen(self.recent.gather(tile.rows_of(at), at, dtype), mask)

    def _all_compressed(self, tile: _Tile, count: int, dtype: torch.dtype) -> _Seen:
        index = torch.arange(count, device=tile.positions.device)
        values = self.old.gather(tile.rows_of(index), index * self.ratio, dtype)
        return _Seen(values, index < ((tile.positions + 1) // self.ratio).unsqueeze(1))

    def _chosen(
        self, tile: _Tile, index: tuple[torch.Tensor, torch.Tensor], count: int, dtype: torch.dtype
    ) -> _Seen:
        queries, weights = (part[tile.tokens] for part in index)
        chosen, is_real = self.indexer.choose(tile, queries, weights, count)
        if not tile.is_shared:
            at = chosen * self.ratio
            return _Seen(self.old.gather(tile.rows_of(at), at, dtype), is_real)
        at = torch.arange(count, device=chosen.device) * self.ratio
        mask = torch.zeros((len(chosen), count), dtype=torch.bool, device=chosen.device)
        values = self.old.gather(tile.rows_of(at), at, dtype)
        return _Seen(values, mask.scatter_(1, chosen, is_real))

    def _attend(self, tile: _Tile, query: torch.Tensor, seen: list[_Seen]) -> torch.Tensor:
        """Query (n, Q, D) -> (n, Q, D)."""
        values = torch.cat([part.values for part in seen], dim=-2).float()
        mask = torch.cat([part.mask for part in seen], dim=-1)
        # States that nobody wrote may hold NaN, which a weight of zero would not hide.
        dead = ~(mask.any(0) if tile.is_shared else mask)
        values = values.masked_fill(dead.unsqueeze(-1), 0.0)
        scores = torch.matmul(query.float(), values.transpose(-1, -2)) * self.scale
        scores.masked_fill_(~mask.unsqueeze(1), float("-inf"))
        sinks = self.sinks.float().view(1, -1, 1).expand(len(query), -1, 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
        return torch.matmul(weights, values).to(query.dtype)
