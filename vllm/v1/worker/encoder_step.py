"""The encoder's part of a step: requests that begin have their source read first.

What the encoder makes of it goes into the cross-attention caches, which have rows of their own
length and no place for the decoder's tokens. Without such caches nothing happens here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vllm.v1.kv_cache_interface import CrossAttentionSpec, KVCacheConfig
from vllm.v1.worker.device import DeviceLayer
from vllm.v1.worker.input_batch import InputBatch
from vllm.v1.worker.input_preparation import StepInputs

__all__ = ["EncoderStep", "make_encoder_step"]


class EncoderStep:
    """The model has no encoder."""

    def prepare(self, batch: InputBatch, step: StepInputs) -> None:
        """Put what cross attention needs in place of what a decoder's cache would need."""

    def run(self) -> None:
        """Read the sources of the requests that begin; inside the step's forward context."""


class _ActiveEncoderStep(EncoderStep):
    """Reads a source again whenever its request begins again: its caches were taken from it."""

    def __init__(self, groups: list[int], model: Any, device: DeviceLayer) -> None:
        self._groups = groups
        self._model = model
        self._device = device
        self._inputs: tuple[torch.Tensor, torch.Tensor, list[int]] | None = None

    def prepare(self, batch: InputBatch, step: StepInputs) -> None:
        lens = batch.num_encoder[: step.num_reqs]
        begins = np.flatnonzero((batch.num_computed[: step.num_reqs] == 0) & (lens > 0))
        counts = lens[begins]
        rows = np.repeat(begins, counts)
        starts = np.concatenate(([0], np.cumsum(counts)))
        positions = np.arange(len(rows)) - np.repeat(starts[:-1], counts)
        seq_lens = torch.from_numpy(lens.astype(np.int32))
        for group in self._groups:
            slots = np.empty(len(rows), dtype=np.int64)
            batch.block_table[group].slot_mapping(rows, positions, slots)
            step.attention[group] = replace(
                step.attention[group],
                seq_lens=self._device.to_device(lens.astype(np.int32)),
                seq_lens_cpu=seq_lens,
                num_computed_tokens_cpu=torch.zeros_like(seq_lens),
                max_seq_len=int(lens.max()),
                slot_mapping=self._device.to_device(slots),
                causal=False,
            )
        self._inputs = None
        if len(begins):
            ids = np.concatenate([batch.states[row].encoder_token_ids for row in begins.tolist()])
            self._inputs = (
                self._device.to_device(ids.astype(np.int64)),
                self._device.to_device(positions.astype(np.int64)),
                starts.tolist(),
            )

    def run(self) -> None:
        if self._inputs is not None:
            self._model.encode(*self._inputs)


def make_encoder_step(config: KVCacheConfig, model: Any, device: DeviceLayer) -> EncoderStep:
    groups = [
        index
        for index, group in enumerate(config.kv_cache_groups)
        if isinstance(group.kv_cache_spec.manager_spec, CrossAttentionSpec)
    ]
    return _ActiveEncoderStep(groups, model, device) if groups else EncoderStep()
