"""What two engines must have in common before one may use the other's KV blocks.

Sizes of ranks and blocks and the layout are not among it: the transfer plan bridges those.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import msgspec

from vllm.errors import ConfigError, KVTransferError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = [
    "Rank",
    "RankCount",
    "check_factors",
    "compatibility_factors",
    "compatibility_hash",
    "refuse_scales_of_a_run",
]

Rank = Annotated[int, msgspec.Meta(ge=0, lt=1024)]
RankCount = Annotated[int, msgspec.Meta(ge=1, le=1024)]
"""Of a peer, in messages: whoever reads one counts so far."""


def compatibility_factors(
    config: VllmConfig, connector: str, scales: Mapping[str, tuple[float, float]]
) -> dict[str, str]:
    """By name, as text that can be shown.

    Args:
        connector: names a connector and its version.
        scales: of layers by name, the factors of all their keys and values.
    """
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
        "kv_scales": _scales_in_words(config, scales),
        "hybrid_kv_cache_manager": str(not config.scheduler_config.disable_hybrid_kv_cache_manager),
    }


def _scales_in_words(config: VllmConfig, scales: Mapping[str, tuple[float, float]]) -> str:
    """Bytes mean the same under the same scales only; so do numbers that are converted."""
    numbers = sorted((name, *pair) for name, pair in scales.items() if pair != (1.0, 1.0))
    if not numbers:
        return "none"
    digest = hashlib.sha256(msgspec.json.encode(numbers)).hexdigest()[:12]
    found = config.cache_config.calculate_kv_scales
    return f"{digest} ({'--calculate-kv-scales' if found else 'of the checkpoint'})"


def refuse_scales_of_a_run(config: VllmConfig, keeper: str) -> None:
    """
    Raises:
        ConfigError: blocks are to outlive the engine, and the scales of their numbers do not.
    """
    if config.cache_config.calculate_kv_scales:
        raise ConfigError(
            f"{keeper} keeps blocks for engines to come, whose --calculate-kv-scales may find "
            "other scales: put k_scale and v_scale in the checkpoint, or use --kv-cache-dtype "
            "fp8_per_token_head, which needs none",
            parameter="calculate_kv_scales",
            value=True,
        )


def compatibility_hash(factors: dict[str, str]) -> str:
    """SHA-256 over what must be equal on both sides."""
    return hashlib.sha256(msgspec.json.encode(factors, order="sorted")).hexdigest()


def check_factors(mine: dict[str, str], theirs: dict[str, str], their_hash: str) -> None:
    """
    Raises:
        KVTransferError: the two engines serve different models, with both sides of what differs.
    """
    if compatibility_hash(mine) == their_hash:
        return
    differing = [
        f"{name}: {mine.get(name, 'nothing')} here, {theirs.get(name, 'nothing')} there"
        for name in sorted(mine.keys() | theirs.keys())
        if mine.get(name) != theirs.get(name)
    ]
    raise KVTransferError(
        "the engines cannot exchange KV blocks: "
        + ("; ".join(differing) or "their compatibility hashes differ")
        + ' (kv_connector_extra_config {"enforce_handshake_compat": false} skips this check)'
    )
