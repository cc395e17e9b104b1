"""Attention layers: what a model calls; the arithmetic is the attention backend's."""

from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.model_executor.layers.attention.mla_attention import LatentUpProjection, MLAAttention

__all__ = ["Attention", "ChunkedLocalAttention", "LatentUpProjection", "MLAAttention"]
