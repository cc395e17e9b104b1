"""Attention layers: what a model calls; the arithmetic is the attention backend's."""

from vllm.model_executor.layers.attention.attention import Attention

__all__ = ["Attention"]
