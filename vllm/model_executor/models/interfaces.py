"""What the engine asks of a model; a plug-in's class has to offer the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch

__all__ = ["VllmModelForTextGeneration"]


@runtime_checkable
class VllmModelForTextGeneration(Protocol):
    """A decoder built as ``cls(vllm_config=..., prefix="")``."""

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Ids (T,) int64 (or embeddings (T, hidden)) and positions (T,) int64 -> (T, hidden)."""

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, hidden) -> (T, vocabulary), in the model's dtype."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take a checkpoint's tensors; the names of the parameters that were filled."""
