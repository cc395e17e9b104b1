"""What every layer with recurrent states shares: its declaration, and how it takes its page.

Owns the link between such a layer and its cache. Knows no kernel and no kind of recurrence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import vllm.envs as envs
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase, register_layer
from vllm.v1.kv_cache.declare import state_spec
from vllm.v1.kv_cache.state_shapes import StateShapes
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec

if TYPE_CHECKING:
    import torch

    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.attention.backends.mamba_attn import StateMetadata

__all__ = ["MambaBase"]


class MambaBase(AttentionLayerBase):
    """A layer with a convolution state, a recurrent state, or both.

    A subclass calls ``declare_states`` in its constructor. After ``bind_kv_cache`` it finds its
    states in ``self.kv_cache``, and those of a convolution and a recurrence, if it has them, in
    ``conv_state`` and ``ssm_state`` too; ``state_metadata`` tells which blocks a step uses.
    """

    kv_cache: tuple[torch.Tensor, ...]
    """Each state of all blocks, ``(B, *shape)``: stride(0) is the block's, inner axes dense."""
    layer_name: str
    state_spec: MambaSpec
    is_conv: tuple[bool, ...]
    """Which of the states is a convolution's."""

    def declare_states(
        self,
        vllm_config: VllmConfig,
        prefix: str,
        shapes: StateShapes,
        num_speculative_blocks: int = 0,
    ) -> None:
        """Take the layer's name and its states' shapes on this rank, and register the layer.

        Raises:
            ValueError: a layer of that name is there already.
            ConfigError: the states do not fit into a page with these dtypes.
        """
        self.layer_name = prefix
        self.is_conv = shapes.is_conv
        self.state_spec = state_spec(
            vllm_config, prefix, shapes, envs.VLLM_SSM_CONV_STATE_LAYOUT, num_speculative_blocks
        )
        register_layer(prefix, self)

    def get_attn_backend(self) -> type[AttentionBackend]:
        from vllm.v1.attention.backends.mamba_attn import StateAttentionBackend

        return StateAttentionBackend

    def state_metadata(self) -> StateMetadata | None:
        """The blocks that this step reads and writes; None in a run without a cache."""
        metadata = get_forward_context().attn_metadata
        return None if metadata is None else metadata[self.layer_name]

    @property
    def mamba_type(self) -> str:
        return self.state_spec.mamba_type

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the states of one block."""
        return self.state_spec.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        from vllm.v1.kv_cache_interface import to_torch_dtype

        return tuple(to_torch_dtype(name) for name in self.state_spec.dtype_names)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return self.state_spec

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Cut the states out of the page ``(B, 1, 1, page_size_bytes)``, int8, as a tuple."""
        from vllm.v1.kv_cache.views import state_views

        self.kv_cache = state_views(kv_cache, self.state_spec.shapes, self.state_spec.dtype_names)

    @property
    def conv_state(self) -> torch.Tensor:
        """(B, steps, channels), whichever of the two orders the cache has."""
        state = self.kv_cache[self.is_conv.index(True)]
        return state.transpose(1, 2) if self.state_spec.conv_state_layout == "DS" else state

    @property
    def ssm_state(self) -> torch.Tensor:
        """The recurrent state, (B, *shape)."""
        return self.kv_cache[self.is_conv.index(False)]
