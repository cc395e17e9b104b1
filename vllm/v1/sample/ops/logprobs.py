"""Top log-probabilities and ranks, without writing a softmax of the whole vocabulary."""

from __future__ import annotations

import torch

__all__ = ["LOGPROBS_MODES", "gather_logprobs"]

LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")


def gather_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_logprobs: int, as_logits: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values of the given tokens and of the best ones.

    Args:
        logits: ``(R, V)`` in any float dtype.
        token_ids: int64 ``(R,)``, the sampled or prompt tokens.
        num_logprobs: how many best tokens, 0 for none.
        as_logits: return logits instead of log-probabilities.

    Returns:
        token ids int32 and values float32, both ``(R, num_logprobs + 1)`` with the given token
        in column 0, and its ranks int32 ``(R,)``, one more than the number of better tokens.
    """
    logits = logits.float()
    own = logits.gather(-1, token_ids[:, None])
    ranks = (logits > own).sum(dim=-1, dtype=torch.int32) + 1
    values, ids = own, token_ids[:, None]
    if num_logprobs > 0:
        best, best_ids = logits.topk(min(num_logprobs, logits.shape[-1]), dim=-1)
        values = torch.cat([own, best], dim=-1)
        ids = torch.cat([ids, best_ids], dim=-1)
    if not as_logits:
        values = values - logits.logsumexp(dim=-1, keepdim=True)
    return ids.to(torch.int32), values, ranks
