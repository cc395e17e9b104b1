"""The KV cache as the user asks for it; what came out of planning is in ``KVCacheConfig``."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    block_size: int | None = None
    """Tokens per manager block; None lets the platform and backend choose."""
    user_specified_block_size: bool = False
    """Whether --block-size was given: then it is kept or refused, never changed."""
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    """Bytes of the pool; on the CPU None means VLLM_CPU_KVCACHE_SPACE GiB."""
    cache_dtype: str = "auto"
    """--kv-cache-dtype."""
    kv_cache_dtype_skip_layers: tuple[str, ...] = ()
    num_gpu_blocks_override: int | None = None
    enable_prefix_caching: bool = True
    prefix_caching_hash_algo: str = "sha256"
    """"sha256", "sha256_cbor", "xxhash" or "xxhash_cbor"."""
    kv_cache_layout: str | None = None
    """A ``KVCacheLayout`` name or HND/NHD that was asked for (VLLM_KV_CACHE_LAYOUT)."""
    sliding_window: int | None = None
    mamba_block_size: int | None = None
    mamba_cache_dtype: str = "auto"
    mamba_ssm_cache_dtype: str = "auto"
    mamba_cache_mode: str = "none"
    kv_sharing_fast_prefill: bool = False
