"""The decoder attention layer over a paged KV cache.

Owns the link between a model's layer and its cache: declares the cache's spec, holds the view that
is bound to it, stores new keys and values, calls the backend. Must not know blocks' owners,
batches' make-up or the cache's physical layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.errors import UnsupportedError
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase, register_layer
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache.declare import attention_spec
from vllm.v1.kv_cache_interface import KVCacheSpec

if TYPE_CHECKING:
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.v1.attention.backend import AttentionBackend

__all__ = ["Attention"]


class Attention(nn.Module, AttentionLayerBase):
    """Multi-head, grouped-query or multi-query attention of one decoder layer.

    Args:
        num_heads: query heads of this rank (Q).
        head_size: D.
        scale: factor of the scores.
        num_kv_heads: KV heads of this rank (K); None means Q.
        alibi_slopes: one per query head.
        cache_config: where the cache's dtype and window come from; None takes the current one.
        logits_soft_cap: c of c * tanh(score / c).
        per_layer_sliding_window: keys a token of this layer sees; None takes the model's.
        prefix: name of the layer, unique in the model; names its cache.
        kv_sharing_target_layer_name: layer whose cache is read instead of an own one.
        attn_backend: a class to use instead of choosing.
        sinks: (Q,) scores without a value.
        head_size_v: Dv, width of a value; None means D.

    Raises:
        ValueError: ``prefix`` is taken already.
        ConfigError: no backend can serve this layer.
    """

    calls_kv_layer_hook = True

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        cache_config: CacheConfig | None = None,
        quant_config: Any | None = None,
        logits_soft_cap: float | None = None,
        per_layer_sliding_window: int | None = None,
        prefix: str = "",
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        attn_backend: type[AttentionBackend] | None = None,
        sinks: torch.Tensor | None = None,
        head_size_v: int | None = None,
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
        self.head_size = head_size
        self.head_size_v = head_size if head_size_v is None else head_size_v
        self.num_kv_heads = num_kv_heads or num_heads
        self.layer_name = prefix
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        if per_layer_sliding_window is not None:
            self.sliding_window: int | None = per_layer_sliding_window
        else:
            self.sliding_window = cache_config.sliding_window
        self.dtype = model_dtype = vllm_config.model_config.dtype
        self.kv_cache_dtype = cache_config.dtype_of_layer(prefix, self.sliding_window is not None)
        self.attn_backend = attn_backend or get_attn_backend(
            head_size,
            model_dtype,
            self.kv_cache_dtype,
            cache_config.block_size,
            has_sink=sinks is not None,
            attn_type=attn_type,
            backend=vllm_config.attention_config.backend,
            head_size_v=head_size_v,
            has_alibi=alibi_slopes is not None,
        )
        self.impl = self.attn_backend.get_impl_cls()(
            num_heads,
            head_size,
            scale,
            self.num_kv_heads,
            alibi_slopes,
            self.sliding_window,
            self.kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            sinks,
        )
        # What an fp8 or nvfp4 cache with one scale per tensor multiplies its data by.
        self._k_scale_float = self._v_scale_float = 1.0
        # Sides ("k", "v") whose scale the checkpoint brought: nothing else may change it.
        self.checkpoint_scales: set[str] = set()
        self._fused_rope = self.impl.fused_rope_kvcache_supported()
        self._fused_norms = self.impl.fused_head_norms_supported()
        self._stores_apart = not self.attn_backend.forward_includes_kv_cache_update
        register_layer(prefix, self)

    def process_weights_after_loading(self) -> None:
        self.impl.process_weights_after_loading(self.dtype)

    def set_kv_scale(self, side: str, scale: float) -> None:
        """``scale`` of all keys (``side`` "k") or values ("v") that this layer stores and reads.

        Captured graphs and bound kernels keep the scale they were made with: set it before.
        """
        if side == "k":
            self._k_scale_float = scale
        else:
            self._v_scale_float = scale

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_size={self.head_size}, "
            f"backend={self.attn_backend.get_name()}"
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        rotary_emb: nn.Module | None = None,
        head_norms: tuple[RMSNorm, RMSNorm] | None = None,
    ) -> torch.Tensor:
        """Store ``key`` and ``value``, then attend.

        Args:
            query: (T, Q * D); key (T, K * D), value (T, K * Dv), or None where the cache of another
                layer is read. Rows may be strided, as slices of one qkv tensor are. ``query`` and
                ``key`` may be overwritten where ``rotary_emb`` is given.
            output: (T, Q * Dv) to write to.
            positions: (T,) int64; needed with ``rotary_emb``.
            rotary_emb: RoPE to apply to query and key in here, fused with the store if possible.
            head_norms: norms over each head of query and of key that come before all else, fused
                likewise; query and key are then overwritten.

        Returns:
            (T, Q * Dv). Rows of padding tokens are undefined; zeros in a profiling run.
        """
        context = get_forward_context()
        if output is None:
            output = torch.empty(
                (query.shape[0], self.num_heads * self.head_size_v),
                dtype=query.dtype,
                device=query.device,
            )
        if context.attn_metadata is None:
            return output.zero_()
        attn_metadata = context.attn_metadata[self.layer_name]
        hook = context.kv_layer_hook
        if hook is not None:
            hook.before(self.layer_name)
        heads = (-1, self.head_size)
        if key is None or value is None:
            assert self.kv_sharing_target_layer_name is not None
            if rotary_emb is not None:
                query, _ = rotary_emb(positions, query, None)
            query = query.unflatten(-1, heads)
        else:
            query, key, value = self._rope_and_store(
                query,
                key,
                value,
                attn_metadata,
                context,
                positions,
                rotary_emb,
                head_norms,
            )
        self.impl.forward(
            self,
            query,
            key,
            value,
            self.kv_cache,
            attn_metadata,
            output.unflatten(-1, (-1, self.head_size_v)),
        )
        if hook is not None:
            hook.after(self.layer_name, self.kv_cache, attn_metadata)
        return output

    def _rope_and_store(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: Any,
        context: ForwardContext,
        positions: torch.Tensor | None,
        rotary_emb: nn.Module | None,
        head_norms: tuple[RMSNorm, RMSNorm] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Norm and rotate if asked, write key and value to the cache; returns (T, heads, D) views.

        Norms and rotation write over query, and over key where they are not fused.
        """
        stores = self._stores_apart and self.kv_sharing_target_layer_name is None
        finder = None if self.kv_sharing_target_layer_name else context.kv_scale_finder
        fused = rotary_emb is not None and stores and self._fused_rope and finder is None
        num_heads, num_kv_heads, head_size = self.num_heads, self.num_kv_heads, self.head_size
        query = query.view(-1, num_heads, head_size)
        key = key.view(-1, num_kv_heads, head_size)
        value = value.view(-1, num_kv_heads, self.head_size_v)
        fuses_norms = fused and head_norms is not None and self._fused_norms
        if head_norms is not None and not fuses_norms:
            head_norms[0].forward_in_place(query)
            head_norms[1].forward_in_place(key)
        if rotary_emb is not None and not fused:
            query, key = rotary_emb(positions, query, key)
        if finder is not None:
            finder.observe(self, key, value)
        if stores:
            slot_mapping = context.slot_mapping.get(self.layer_name)
            if slot_mapping is None:
                slot_mapping = attn_metadata.slot_mapping
            if fused:
                assert rotary_emb is not None
                norms = {"head_norms": head_norms} if fuses_norms else {}
                self.impl.do_rope_and_kv_cache_update(
                    self,
                    query,
                    key,
                    value,
                    positions,
                    rotary_emb.cos_sin_cache,
                    rotary_emb.is_neox_style,
                    self.kv_cache,
                    slot_mapping,
                    **norms,
                )
            else:
                self.impl.do_kv_cache_update(self, key, value, self.kv_cache, slot_mapping)
        return query, key, value

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self.attn_backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """What this layer keeps per block; None where it reads another layer's cache."""
        if self.kv_sharing_target_layer_name is not None:
            return None
        if self.attn_type != AttentionType.DECODER:
            return None
        return attention_spec(
            vllm_config,
            self.layer_name,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            sliding_window=self.sliding_window,
            default_block_size=current_platform.default_block_size,
        )
