"""Multi-head latent attention (DeepSeek V2, arXiv:2405.04434) over a cache of latents.

Keys and values of all heads are linear in one latent a token, and only the latent and the rotary
part of the key, which all heads share, are kept. A backend may expand them (``forward_mha``), or
absorb the projections into query and output and attend to the latents themselves
(``forward_mqa``). This module owns the projections and the link to the cache; which way pays is the
backend's choice. Letters: T tokens, Q heads of this rank, R the latent's width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vllm import _custom_ops as ops
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.errors import UnsupportedError
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import LatentLayerBase, register_layer
from vllm.model_executor.layers.weight_loading import (
    ShardId,
    copy_weight,
    make_parameter,
    take_shard,
)
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache.declare import latent_spec
from vllm.v1.kv_cache_interface import KVCacheSpec

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionBackend

__all__ = ["LatentUpProjection", "MLAAttention"]


class LatentUpProjection(nn.Module):
    """From latents to keys and values of heads, and the same weights the other way round.

    The weight (Q * (nope + v), R) is kept packed by heads in three forms, one for each use; no
    checkpoint's tensor is kept beside them.

    Args:
        kv_lora_rank: R.
        num_heads: of the whole model; this rank holds its share.
        qk_nope_head_dim: width of a key without its rotary part.
        v_head_dim: width of a value.
    """

    weight: nn.Parameter

    def __init__(
        self, kv_lora_rank: int, num_heads: int, qk_nope_head_dim: int, v_head_dim: int
    ) -> None:
        super().__init__()
        tp = get_tp_group()
        self.kv_lora_rank = kv_lora_rank
        self.total_num_heads = num_heads
        self.num_heads = num_heads // tp.world_size
        self.qk_nope_head_dim, self.v_head_dim = qk_nope_head_dim, v_head_dim
        self._tp_rank = tp.rank_in_group
        self.weight = make_parameter(
            self.num_heads * (qk_nope_head_dim + v_head_dim),
            kv_lora_rank,
            weight_loader=self.weight_loader,
        )
        self._split(self.weight.data)

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        """Copy this rank's heads."""
        width = self.qk_nope_head_dim + self.v_head_dim
        full = (self.total_num_heads * width, self.kv_lora_rank)
        part = take_shard(loaded_weight, 0, self._tp_rank, param.shape[0], full)
        copy_weight(param.data, part)

    def _split(self, weight: torch.Tensor) -> None:
        heads = weight.unflatten(0, (self.num_heads, -1))
        keys, values = heads.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        self.to_keys: ops.PackedExperts | torch.Tensor = keys
        self.to_values: ops.PackedExperts | torch.Tensor = values
        self.from_queries: ops.PackedExperts | torch.Tensor = keys.transpose(1, 2)

    def process_weights_after_loading(self) -> None:
        """On the CPU, pack each head's parts; from there on there is no ``weight`` parameter."""
        if "weight" not in self._parameters:
            return
        self._split(self.weight.data)
        if not self.weight.is_cpu:
            # A GPU multiplies all heads at once, from views of the one weight.
            return
        assert isinstance(self.to_keys, torch.Tensor) and isinstance(self.to_values, torch.Tensor)
        self.from_queries = ops.pack_experts(self.to_keys.transpose(1, 2))
        self.to_keys = ops.pack_experts(self.to_keys)
        self.to_values = ops.pack_experts(self.to_values)
        del self.weight

    def absorb_queries(self, query: torch.Tensor) -> torch.Tensor:
        """Queries (T, Q, nope) -> what they are to latents, (Q, T, R)."""
        return self._by_heads(query.transpose(0, 1), self.from_queries)

    def expand_values(self, latents: torch.Tensor) -> torch.Tensor:
        """Weighted sums of latents (Q, T, R) -> sums of values (Q, T, v)."""
        return self._by_heads(latents, self.to_values)

    def _by_heads(self, x: torch.Tensor, weights: ops.PackedExperts | torch.Tensor) -> torch.Tensor:
        num_heads, num_tokens, width = x.shape
        if isinstance(weights, torch.Tensor) and not x.is_cpu:
            return torch.bmm(x, weights.transpose(1, 2))
        counts = torch.full((num_heads,), num_tokens)
        rows = ops.experts_linear(x.reshape(num_heads * num_tokens, width), weights, counts)
        return rows.unflatten(0, (num_heads, num_tokens))

    def expand_head(self, head: int, latents: torch.Tensor, out: torch.Tensor) -> None:
        """Key and value of one head from latents (S, R).

        Args:
            out: (S, width); the key's part without rotation goes to its first columns, the value to
                its last ones.
        """
        keys, values = self.to_keys, self.to_values
        is_plain = isinstance(keys, torch.Tensor) or isinstance(values, torch.Tensor)
        key = keys[head] if is_plain else keys.weights[head]  # type: ignore[index, union-attr]
        value = values[head] if is_plain else values.weights[head]  # type: ignore[index, union-attr]
        ops.linear_into(latents, key, out[:, : self.qk_nope_head_dim])
        ops.linear_into(latents, value, out[:, -self.v_head_dim :])

    def extra_repr(self) -> str:
        return (
            f"rank={self.kv_lora_rank}, heads={self.num_heads}, nope={self.qk_nope_head_dim}, "
            f"v={self.v_head_dim}"
        )


class MLAAttention(nn.Module, LatentLayerBase):
    """Attention of one decoder layer whose keys and values are one latent.

    Args:
        num_heads: heads of this rank (Q).
        scale: factor of the scores.
        qk_nope_head_dim, qk_rope_head_dim: parts of a query's and key's head, in this order.
        v_head_dim: width of a value.
        q_lora_rank: of the query's own low-rank projection; not needed here.
        kv_lora_rank: R.
        kv_b_proj: from latents to keys and values.
        cache_config: where the cache's dtype comes from; None takes the current one.
        prefix: name of the layer, unique in the model; names its cache.
        attn_backend: a class to use instead of choosing.

    Raises:
        ValueError: ``prefix`` is taken already.
        ConfigError: no backend can serve this layer.
    """

    def __init__(
        self,
        num_heads: int,
        scale: float,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        kv_b_proj: LatentUpProjection,
        cache_config: CacheConfig | None = None,
        quant_config: Any | None = None,
        prefix: str = "",
        attn_backend: type[AttentionBackend] | None = None,
    ) -> None:
        super().__init__()
        if quant_config is not None:
            raise UnsupportedError(
                f"{prefix}: quantised attention is not available; drop --quantization",
                parameter="quantization",
            )
        vllm_config = get_current_vllm_config()
        cache_config = cache_config or vllm_config.cache_config
        self.num_heads = num_heads
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        self.qk_head_dim = qk_nope_head_dim + qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.q_lora_rank, self.kv_lora_rank = q_lora_rank, kv_lora_rank
        self.head_size = kv_lora_rank + qk_rope_head_dim
        self.layer_name = prefix
        self.dtype = vllm_config.model_config.dtype
        self.kv_cache_dtype = cache_config.dtype_of_layer(prefix)
        self.kv_b_proj = kv_b_proj
        self.attn_backend = attn_backend or get_attn_backend(
            self.head_size,
            self.dtype,
            self.kv_cache_dtype,
            cache_config.block_size,
            use_mla=True,
            backend=vllm_config.attention_config.backend,
        )
        self.impl = self.attn_backend.get_impl_cls()(
            num_heads, self.head_size, scale, 1, kv_cache_dtype=self.kv_cache_dtype
        )
        register_layer(prefix, self)

    def forward(
        self,
        q: torch.Tensor,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        output_shape: torch.Size | None = None,
    ) -> torch.Tensor:
        """Store the latents, then attend.

        Args:
            q: (T, Q, nope + rope), rotated.
            kv_c_normed: (T, R) latents.
            k_pe: (T, rope) or (T, 1, rope), rotated.
            output_shape: of the result, (T, Q * v) by default.

        Returns:
            (T, Q * v); zeros in a profiling run.
        """
        context = get_forward_context()
        output = torch.empty(
            (q.shape[0], self.num_heads, self.v_head_dim), dtype=q.dtype, device=q.device
        )
        shape = output_shape or (q.shape[0], self.num_heads * self.v_head_dim)
        if context.attn_metadata is None:
            return output.zero_().view(shape)
        attn_metadata = context.attn_metadata[self.layer_name]
        slot_mapping = context.slot_mapping.get(self.layer_name)
        if slot_mapping is None:
            slot_mapping = attn_metadata.slot_mapping
        self.impl.do_kv_cache_update(
            self, kv_c_normed, k_pe.flatten(1), self.kv_cache, slot_mapping
        )
        self.impl.forward(self, q, None, None, self.kv_cache, attn_metadata, output)
        return output.view(shape)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self.attn_backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        return latent_spec(
            vllm_config,
            self.layer_name,
            kv_lora_rank=self.kv_lora_rank,
            qk_rope_head_dim=self.qk_rope_head_dim,
        )

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_heads}, latent={self.head_size}, "
            f"backend={self.attn_backend.get_name()}"
        )
