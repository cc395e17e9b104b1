"""Log-probabilities of prompts, gathered chunk by chunk as a prompt is computed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from vllm.v1.outputs import LogprobsLists
from vllm.v1.sample.ops.logprobs import gather_logprobs
from vllm.v1.worker.device import DeviceLayer
from vllm.v1.worker.input_batch import CachedRequestState, InputBatch
from vllm.v1.worker.input_preparation import StepInputs

__all__ = ["PromptLogprobs"]

# Logits of a long prompt do not fit in memory at once: 8,000 positions of 49,152 are 1.6 GB.
_LOGITS_BYTES = 32 << 20


class PromptLogprobs:
    """The prompts in flight whose log-probabilities were asked for; mostly none.

    Args:
        compute_logits: hidden states ``(n, hidden)`` to logits ``(n, V)``.
        as_logits: report logits instead of log-probabilities.
    """

    def __init__(
        self,
        compute_logits: Callable[[torch.Tensor], torch.Tensor],
        vocab_size: int,
        device: DeviceLayer,
        as_logits: bool,
    ) -> None:
        self._compute_logits = compute_logits
        self._vocab_size = vocab_size
        self._device = device
        self._as_logits = as_logits
        self._pending: dict[str, LogprobsLists] = {}

    def track(self, state: CachedRequestState) -> None:
        """Start (again) on a request, if it asks for prompt log-probabilities."""
        wanted = state.sampling_params.prompt_logprobs
        num_positions = len(state.prompt_token_ids) - 1
        if wanted is None or state.output_token_ids:
            return
        width = 1 + (self._vocab_size if wanted < 0 else min(wanted, self._vocab_size))
        self._pending[state.req_id] = LogprobsLists(
            np.zeros((num_positions, width), dtype=np.int32),
            np.zeros((num_positions, width), dtype=np.float32),
            np.zeros(num_positions, dtype=np.int32),
        )

    def forget(self, req_id: str) -> None:
        self._pending.pop(req_id, None)

    def collect(
        self, batch: InputBatch, step: StepInputs, hidden: torch.Tensor
    ) -> dict[str, LogprobsLists]:
        """Take in a step's hidden states ``(T, hidden)``; returns the prompts now complete."""
        done: dict[str, LogprobsLists] = {}
        for req_id in list(self._pending):
            row = batch.req_id_to_index.get(req_id)
            if row is None:
                continue
            first = int(batch.num_computed[row])
            num_prompt = int(batch.num_prompt[row])
            # The last prompt token predicts the first output token, which is the sampler's.
            last = min(first + int(step.num_scheduled[row]), num_prompt - 1)
            start = int(step.starts[row])
            self._fill(
                self._pending[req_id],
                hidden[start : start + max(0, last - first)],
                batch.token_ids[row, first + 1 : last + 1],
                first,
            )
            if first + int(step.num_scheduled[row]) >= num_prompt:
                done[req_id] = self._pending.pop(req_id)
        return done

    def _fill(
        self, out: LogprobsLists, hidden: torch.Tensor, targets: np.ndarray, first: int
    ) -> None:
        rows = max(1, _LOGITS_BYTES // (4 * self._vocab_size))
        width = out.logprobs.shape[1]
        for begin in range(0, hidden.shape[0], rows):
            logits = self._compute_logits(hidden[begin : begin + rows])
            tokens = self._device.to_device(targets[begin : begin + rows].astype(np.int64))
            ids, values, ranks = gather_logprobs(logits, tokens, width - 1, self._as_logits)
            where = slice(first + begin, first + begin + ids.shape[0])
            out.logprob_token_ids[where] = self._device.to_host(ids)
            out.logprobs[where] = self._device.to_host(values)
            out.sampled_token_ranks[where] = self._device.to_host(ranks)
