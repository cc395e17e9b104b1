"""What two engines must have in common before one may use the other's KV blocks.

Sizes of ranks and blocks and the layout are not among it: the transfer plan bridges those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["compatibility_factors"]


def compatibility_factors(config: VllmConfig, connector: str) -> dict[str, str]:
    """By name, as text that can be shown; ``connector`` names a connector and its version."""
    import vllm

    model = config.model_config
    return {
        "vllm": vllm.__version__,
        "connector": connector,
        "architecture": model.architecture,
        "layers": str(model.get_num_layers()),
        "kv_heads": str(model.get_total_num_kv_heads()),
        "head_size": str(model.get_head_size()),
        "vocabulary": str(model.get_vocab_size()),
        "dtype": model.dtype_name,
        "kv_cache_dtype": config.cache_config.cache_dtype,
        "hybrid_kv_cache_manager": str(not config.scheduler_config.disable_hybrid_kv_cache_manager),
    }
