"""The KV cache as the user asks for it; what came out of planning is in ``KVCacheConfig``."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vllm.config.checks import at_least, one_of, within
from vllm.errors import ConfigError

HASH_ALGORITHMS = ("sha256", "sha256_cbor", "xxhash", "xxhash_cbor")
MAMBA_CACHE_MODES = ("none", "all", "align")
LAYER_SCALED_DTYPES = ("fp8", "fp8_e4m3", "fp8_e5m2", "nvfp4")
"""Cache dtypes with one scale for a layer's keys and one for its values."""


def shortened(names: Iterable[str], shown: int = 4) -> list[str]:
    """The first names, and "..." for the others."""
    first = list(names)
    return first if len(first) <= shown else [*first[:shown], "..."]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Sizes, formats and reuse of the KV cache.

    Raises:
        ConfigError: a field has a value that cannot work.
    """

    block_size: int | None = None
    """Tokens per manager block; None lets the platform and backend choose."""
    user_specified_block_size: bool = False
    """Whether --block-size was given: then it is kept or refused, never changed."""
    gpu_memory_utilization: float = 0.92
    """Share of a GPU's memory that weights, activations and cache may use together."""
    kv_cache_memory_bytes: int | None = None
    """Bytes of the pool. Resolved on the CPU; on a GPU None means: what is left after loading."""
    cache_dtype: str = "auto"
    """--kv-cache-dtype; "auto" is the model's dtype."""
    kv_cache_dtype_skip_layers: tuple[str, ...] = ()
    """Layers that keep the model's dtype: numbers, names, or "sliding_window"."""
    calculate_kv_scales: bool = False
    """Layers whose scales the checkpoint does not bring get theirs from a run at start."""
    num_gpu_blocks_override: int | None = None
    """Blocks of the pool, whatever the memory allows."""
    enable_prefix_caching: bool = True
    prefix_caching_hash_algo: str = "sha256"
    """One of ``HASH_ALGORITHMS``."""
    kv_cache_layout: str | None = None
    """A ``KVCacheLayout`` name or HND/NHD that was asked for (VLLM_KV_CACHE_LAYOUT)."""
    sliding_window: int | None = None
    """Window of every layer in tokens; None where layers differ or have none."""
    mamba_block_size: int | None = None
    """Tokens between two cached states of a state layer."""
    mamba_cache_dtype: str = "auto"
    mamba_ssm_cache_dtype: str = "auto"
    mamba_cache_mode: str = "none"
    """One of ``MAMBA_CACHE_MODES``: which states are kept for prefix reuse."""
    kv_offloading_size: float | None = None
    """GiB of host memory that blocks are offloaded to; None where the option is not given."""
    kv_offloading_backend: str = "native"
    kv_sharing_fast_prefill: bool = False
    """Skip the layers that share another's cache while a prompt is computed."""

    def __post_init__(self) -> None:
        at_least(
            self,
            1,
            "block_size",
            "kv_cache_memory_bytes",
            "num_gpu_blocks_override",
            "sliding_window",
            "mamba_block_size",
        )
        within(self, 0.01, 1.0, "gpu_memory_utilization")
        one_of(self, HASH_ALGORITHMS, "prefix_caching_hash_algo")
        one_of(self, MAMBA_CACHE_MODES, "mamba_cache_mode")
        if self.calculate_kv_scales and self.cache_dtype not in LAYER_SCALED_DTYPES:
            raise ConfigError(
                "--calculate-kv-scales finds the scales of a cache that has one for a layer's keys "
                f"and one for its values, which --kv-cache-dtype {self.cache_dtype} has not: drop "
                f"it, or use one of {', '.join(LAYER_SCALED_DTYPES)}",
                parameter="calculate_kv_scales",
                value=True,
            )

    def dtype_of_layer(self, layer_name: str, has_window: bool = False) -> str:
        """The cache dtype of one layer: "auto" where it is to be skipped."""
        skipped = any(
            self._means(entry, layer_name, has_window) for entry in self.kv_cache_dtype_skip_layers
        )
        return "auto" if skipped else self.cache_dtype

    @staticmethod
    def _means(entry: str, layer_name: str, has_window: bool) -> bool:
        if entry == "sliding_window":
            return has_window
        return entry == layer_name or (entry.isdecimal() and entry in layer_name.split("."))

    def check_skipped_layers(self, layers: Mapping[str, bool]) -> None:
        """Whether each entry of ``kv_cache_dtype_skip_layers`` means a layer.

        Args:
            layers: names of the layers that attend -> whether they have a window.

        Raises:
            ConfigError: one means none, so it would be ignored.
        """
        for entry in self.kv_cache_dtype_skip_layers:
            if not any(self._means(entry, *layer) for layer in layers.items()):
                raise ConfigError(
                    f"--kv-cache-dtype-skip-layers {entry!r} means no layer that attends: give "
                    "sliding_window where layers have windows, or numbers or whole names of "
                    f"layers, which are {', '.join(shortened(layers))}",
                    parameter="kv_cache_dtype_skip_layers",
                    value=entry,
                )
