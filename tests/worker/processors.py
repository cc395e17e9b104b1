"""A custom logits processor that a worker loads by its path."""

from __future__ import annotations

import torch

from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality


class ForceNext(LogitsProcessor):
    """Requests with ``extra_args={"force": t}`` put out t, t + 1, t + 2, ..."""

    def __init__(self, vllm_config, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, tuple[int, list[int]]] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        force = cls._force(sampling_params)
        if force is not None and not isinstance(force, int):
            raise ValueError(f"extra_args.force must be a token id, not {force!r}")

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.rows.pop(row, None)
        for row, params, _, output in batch_update.added:
            self.rows.pop(row, None)
            if (force := self._force(params)) is not None:
                self.rows[row] = (force, output)
        for source, target, direction in batch_update.moved:
            assert direction is MoveDirectionality.UNIDIRECTIONAL
            self.rows.pop(target, None)
            if source in self.rows:
                self.rows[target] = self.rows.pop(source)

    @staticmethod
    def _force(params: SamplingParams) -> int | None:
        return (params.extra_args or {}).get("force")

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, (token, output) in self.rows.items():
            logits[row] = float("-inf")
            logits[row, token + len(output)] = 0.0
        return logits
