"""What the backends over a cache of latents share: how a step's latents get into it."""

from __future__ import annotations

from typing import Any

import torch

from vllm import _custom_ops as ops
from vllm.v1.attention.backends.torch_ref import PagedAttentionImpl, PagedMetadataT

__all__ = ["MLAImpl"]


class MLAImpl(PagedAttentionImpl[PagedMetadataT]):
    """``forward`` takes query (T, Q, nope + rope) and latents (B, N, R + rope) to (T, Q, v)."""

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store latents ``key`` (T, R) and rotated parts of keys ``value`` (T, rope)."""
        ops.store_latent(torch.cat((key, value), dim=-1), kv_cache, slot_mapping)
