"""The one hook between the KV cache and the layers that read it.

Owns the interface ``AttentionLayerBase``, and the registry that gathers such layers while a
model is built. Knows no backend and no shape: a layer adapts the raw view to its own kernels in
``bind_kv_cache``, and nothing else does.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.kv_cache_interface import KVCacheSpec

__all__ = ["AttentionLayerBase", "LatentLayerBase", "collect_layers", "register_layer"]


class AttentionLayerBase(ABC):
    """A layer that keeps something per block: attention, MLA, Mamba, an indexer."""

    impl: Any
    supports_dcp: bool = True
    is_draft_layer: bool = False
    calls_kv_layer_hook: bool = False
    """``forward`` tells the forward context's hook when it reads and has written its cache."""
    kv_sharing_target_layer_name: str | None = None
    """Layer whose cache this one reads instead of having its own."""
    kv_cache: Any
    """What the layer's kernels read; set by ``bind_kv_cache``."""

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the raw view ``(B, H, N, C)`` of this layer and store what the kernels read.

        The default stores the tensor itself. An override may cut, view or squeeze it
        (``vllm.v1.kv_cache.views`` has ``state_views`` and ``drop_head_dim``), never copy it.
        """
        self.kv_cache = kv_cache

    @abstractmethod
    def get_attn_backend(self) -> type[AttentionBackend]:
        """The backend that computes on this layer's cache."""

    @abstractmethod
    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """What the layer keeps per block; None if it keeps nothing of its own."""


class LatentLayerBase(AttentionLayerBase):
    """A layer whose cache is one latent per state, without heads: MLA and indexers."""

    kv_cache: torch.Tensor
    """``(B, N, C)``."""

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take ``(B, 1, N, C)`` and drop the head axis."""
        from vllm.v1.kv_cache.views import drop_head_dim

        self.kv_cache = drop_head_dim(kv_cache)


_collecting = threading.local()


@contextlib.contextmanager
def collect_layers() -> Iterator[dict[str, AttentionLayerBase]]:
    """Gather the layers that are built inside, by name, in the order of construction."""
    outer = getattr(_collecting, "layers", None)
    layers: dict[str, AttentionLayerBase] = {}
    _collecting.layers = layers
    try:
        yield layers
    finally:
        _collecting.layers = outer


def register_layer(prefix: str, layer: AttentionLayerBase) -> None:
    """Called by a layer's constructor. Outside ``collect_layers`` the layer stands alone.

    Raises:
        ValueError: a layer of that name is there already.
    """
    layers = getattr(_collecting, "layers", None)
    if layers is None:
        return
    if prefix in layers:
        raise ValueError(f"duplicate layer name {prefix!r}: give each layer its own prefix")
    layers[prefix] = layer
