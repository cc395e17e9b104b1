"""From the last hidden states to logits over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import nn

from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

__all__ = ["LogitsProcessor"]


class LogitsProcessor(nn.Module):
    """Multiplies with the output head, joins the ranks' parts, cuts the padding off.

    Args:
        vocab_size: rows of the head, with those that were added to the tokenizer's.
        org_vocab_size: columns of the result; ``vocab_size`` if None.
        scale: factor of the logits.
        soft_cap: c of ``c * tanh(logits / c)``; None for none.
    """

    def __init__(
        self,
        vocab_size: int,
        org_vocab_size: int | None = None,
        scale: float = 1.0,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.org_vocab_size = org_vocab_size or vocab_size
        self.scale = scale
        self.soft_cap = soft_cap

    def forward(self, lm_head: VocabParallelEmbedding, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, hidden) -> (T, vocabulary), in fp32 or the model's dtype: see ``ops.logits``."""
        logits = lm_head.project(hidden_states)
        if lm_head.tp_size > 1:
            logits = get_tp_group().all_gather(logits)
        if logits.shape[-1] != self.org_vocab_size:
            logits = logits[..., : self.org_vocab_size]
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits
