"""Repetition, frequency and presence penalties, on the tokens that a request has seen."""

from __future__ import annotations

import numpy as np
import torch

from vllm.v1.sample.metadata import PenaltyRows

__all__ = ["apply_penalties"]


def apply_penalties(logits: torch.Tensor, penalties: PenaltyRows) -> None:
    """Change ``logits`` (float32 ``(R, V)``) in place.

    A token of prompt or output: a positive logit is divided by the repetition penalty, a
    negative one multiplied. A token that came up c > 0 times in the output then loses
    ``frequency * c + presence``.
    """
    lengths = [history.token_ids.size for history in penalties.histories]
    device = logits.device

    def spread(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.repeat(values, lengths)).to(device)

    rows = spread(penalties.rows)
    tokens = torch.from_numpy(np.concatenate([h.token_ids for h in penalties.histories]))
    counts = torch.from_numpy(np.concatenate([h.output_counts for h in penalties.histories]))
    tokens, counts = tokens.to(device), counts.to(device)
    values = logits[rows, tokens]
    repetition = spread(penalties.repetition)
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= spread(penalties.frequency) * counts
    values -= spread(penalties.presence) * (counts > 0)
    logits[rows, tokens] = values
