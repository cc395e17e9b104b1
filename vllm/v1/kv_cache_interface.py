"""What layers declare about the KV they keep, and the plan that comes of it: the public names.

The specs are in ``v1/kv_cache/spec.py`` and ``*_specs.py``, the plan's types in
``v1/kv_cache/config.py``. Importing this imports no torch.
"""

from vllm.v1.kv_cache.attention_specs import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
    FullAttentionSpec,
    SinkFullAttentionSpec,
    SlidingWindowSpec,
    TQFullAttentionSpec,
)
from vllm.v1.kv_cache.config import KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.kv_cache.content import (
    ContentFormat,
    KVCacheSpecKind,
    KVQuantMode,
    MultipleOf,
    StateSlice,
    dtype_itemsize,
    dtype_name,
    to_torch_dtype,
)
from vllm.v1.kv_cache.latent_specs import MLAAttentionSpec, SlidingWindowMLASpec
from vllm.v1.kv_cache.spec import KVCacheSpec
from vllm.v1.kv_cache.state_specs import MambaSpec, UniformTypeKVCacheSpecs
from vllm.v1.kv_cache.strides import compute_layer_kv_cache_shape_bytes, compute_layout_strides

__all__ = [
    "AttentionSpec",
    "ChunkedLocalAttentionSpec",
    "ContentFormat",
    "CrossAttentionSpec",
    "EncoderOnlyAttentionSpec",
    "FullAttentionSpec",
    "KVCacheConfig",
    "KVCacheGroupSpec",
    "KVCacheSpec",
    "KVCacheSpecKind",
    "KVCacheTensor",
    "KVQuantMode",
    "MLAAttentionSpec",
    "MambaSpec",
    "MultipleOf",
    "SinkFullAttentionSpec",
    "SlidingWindowMLASpec",
    "SlidingWindowSpec",
    "StateSlice",
    "TQFullAttentionSpec",
    "UniformTypeKVCacheSpecs",
    "compute_layer_kv_cache_shape_bytes",
    "compute_layout_strides",
    "dtype_itemsize",
    "dtype_name",
    "to_torch_dtype",
]
