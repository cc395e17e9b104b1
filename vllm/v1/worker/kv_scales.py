"""The run that finds scales of quantised caches: one request of arbitrary tokens, before any other.

Owns that request and what becomes of the scales it leaves in the layers; the formula is the
layers' (``model_executor/layers/attention/kv_scales.py``). Runs nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.errors import UnsupportedError
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.block_table import MultiGroupBlockTable

__all__ = ["CalibrationRequest", "KVScales", "kv_scales_of", "report_scales", "restore_kv_scales"]

logger = init_logger(__name__)

KVScales = dict[str, tuple[float, float]]
"""(K, V) by layer name."""

_NAME = "calibration of KV scales"
_MOST_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRequest:
    """A prompt whose last token is not computed, so that nothing is sampled.

    Attributes:
        token_ids: the prompt.
        blocks: by cache group; no group shares one with another.
    """

    token_ids: list[int]
    blocks: tuple[list[int], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return len(self.token_ids) - 1

    @classmethod
    def make(
        cls,
        config: VllmConfig,
        vocab_size: int,
        cache: KVCacheConfig,
        block_table: MultiGroupBlockTable,
    ) -> CalibrationRequest:
        """As many tokens as a step and the pool allow, up to 512; the same for the same model.

        Raises:
            UnsupportedError: the model has an encoder.
        """
        if config.model_config.is_encoder_decoder:
            raise UnsupportedError(
                "--calculate-kv-scales: models with an encoder have no run without a source; put "
                "k_scale and v_scale in the checkpoint, or use --kv-cache-dtype fp8_per_token_head",
                parameter="calculate_kv_scales",
                value=True,
            )
        count = min(
            _MOST_TOKENS,
            config.model_config.max_model_len - 1,
            config.scheduler_config.max_num_batched_tokens,
        )

        def needed(tokens: int) -> list[int]:
            return [-(-(tokens + 1) // table.block_size) for table in block_table.tables]

        # Block 0 is the null block.
        while count and sum(needed(count)) >= cache.num_blocks:
            count //= 2
        assert count, "a pool has room for the longest request"
        blocks, first = [], 1
        for number in needed(count):
            blocks.append(list(range(first, first + number)))
            first += number
        tokens = np.random.default_rng(0).integers(0, vocab_size, count + 1)
        return cls(token_ids=tokens.tolist(), blocks=tuple(blocks))

    def first_step(self) -> SchedulerOutput:
        """Computes the tokens."""
        new = NewRequestData(
            _NAME, self.token_ids, SamplingParams(max_tokens=1, seed=0), self.blocks, 0
        )
        return SchedulerOutput(
            scheduled_new_reqs=[new],
            scheduled_cached_reqs=CachedRequestData.make_empty(),
            num_scheduled_tokens={_NAME: self.num_tokens},
            total_num_scheduled_tokens=self.num_tokens,
            num_common_prefix_blocks=[0] * len(self.blocks),
            finished_req_ids=set(),
            new_block_ids_to_zero=self.blocks,
        )

    def last_step(self) -> SchedulerOutput:
        """Ends the request."""
        return SchedulerOutput(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=CachedRequestData.make_empty(),
            num_scheduled_tokens={},
            total_num_scheduled_tokens=0,
            num_common_prefix_blocks=[0] * len(self.blocks),
            finished_req_ids={_NAME},
        )


def kv_scales_of(layers: Mapping[str, AttentionLayerBase]) -> KVScales:
    """Scales of all layers that keep K and V of heads, whatever their caches' format."""
    return {
        name: (layer._k_scale_float, layer._v_scale_float)
        for name, layer in layers.items()
        if isinstance(layer, Attention)
    }


def restore_kv_scales(layers: Mapping[str, AttentionLayerBase], scales: KVScales) -> None:
    """Layers that were built anew have the scales again that a run found for them."""
    for name, (k, v) in scales.items():
        layer = layers[name]
        assert isinstance(layer, Attention)
        layer.set_kv_scale("k", k)
        layer.set_kv_scale("v", v)


def report_scales(
    scales: KVScales, layers: Mapping[str, AttentionLayerBase], num_tokens: int
) -> None:
    """Say once, not on every rank, what was found."""
    if get_tensor_model_parallel_rank() != 0:
        return
    keys, values = zip(*scales.values(), strict=True) if scales else ((1.0,), (1.0,))
    kept = sum(
        len(layer.checkpoint_scales) for layer in layers.values() if isinstance(layer, Attention)
    )
    logger.info(
        "KV scales of %d layers after %d tokens: K %g to %g, V %g to %g; %d are the checkpoint's",
        len(scales), num_tokens, min(keys), max(keys), min(values), max(values), kept,
    )  # fmt: skip
    for name, (k, v) in scales.items():
        logger.debug("KV scales of %s: K %g, V %g", name, k, v)
