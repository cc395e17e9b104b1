"""K and V of a packed cache as two tensors, for kernels that take them apart.

Both are views with strides of their own over blocks, heads and tokens: nothing is copied and no
tiling of the head size is made.
"""

from __future__ import annotations

import torch

__all__ = ["PagedAttention"]


class PagedAttention:
    @staticmethod
    def split_kv_cache(
        kv_cache: torch.Tensor, num_kv_heads: int, head_size: int, head_size_v: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Views ``(B, H, N, D)`` and ``(B, H, N, Dv)`` of a cache ``(B, H, N, D + Dv)``.

        Args:
            num_kv_heads: H. head_size: D. head_size_v: Dv, D by default.

        Raises:
            ValueError: the cache has another shape.
        """
        width_v = head_size if head_size_v is None else head_size_v
        if kv_cache.dim() != 4 or kv_cache.shape[1::2] != (num_kv_heads, head_size + width_v):
            raise ValueError(
                f"a cache {tuple(kv_cache.shape)} does not hold {num_kv_heads} heads of keys of "
                f"{head_size} and values of {width_v}: (B, {num_kv_heads}, N, "
                f"{head_size + width_v}) does"
            )
        return kv_cache[..., :head_size], kv_cache[..., head_size:]
