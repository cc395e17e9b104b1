"""Attention layers: what a model calls; the arithmetic is the attention backend's."""

from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention

__all__ = ["Attention", "ChunkedLocalAttention"]
