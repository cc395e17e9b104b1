"""Top-k, top-p and min-p, exactly.

The nucleus of a row is found among its k best candidates with k growing until it fits, since a
whole sort of 49,152 entries costs 3 ms a row and the best 64 of them 0.1 ms.
"""

from __future__ import annotations

import torch

__all__ = ["apply_min_p", "apply_top_k_top_p", "truncate"]

_FIRST_CANDIDATES = 128
_GROWTH = 8


def apply_min_p(logits: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Drop, in place, tokens whose probability is below ``min_p`` times the largest one's.

    Args:
        logits: float32 ``(R, V)``, temperature applied.
        min_p: float32 ``(R,)`` in [0, 1].
    """
    threshold = logits.amax(dim=-1, keepdim=True) + min_p.log().unsqueeze(-1)
    return logits.masked_fill_(logits < threshold, float("-inf"))


def _keep(
    values: torch.Tensor,
    log_total: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
) -> torch.Tensor:
    """Which of the sorted candidates stay.

    ``log_total``, the logarithm of the whole vocabulary's weight, matters to rows without top-k.
    """
    keep = torch.ones_like(values, dtype=torch.bool)
    if top_k is not None:
        rank = torch.arange(values.shape[-1], device=values.device)
        keep = (rank < top_k[:, None]) | (top_k[:, None] <= 0)
    if top_p is not None:
        shown = values.masked_fill(~keep, float("-inf"))
        # Probabilities are those after top-k; a row without one counts the whole vocabulary.
        log_kept = shown.logsumexp(dim=-1, keepdim=True)
        if log_total is not None:
            log_kept = (
                log_total if top_k is None else torch.where(top_k[:, None] > 0, log_kept, log_total)
            )
        probs = (shown - log_kept).exp()
        before = probs.cumsum(dim=-1) - probs
        # The first candidate always stays: nothing lies before it.
        keep = keep & ((before < top_p[:, None]) | (top_p[:, None] >= 1))
        keep[:, 0] = True
    return keep


def truncate(
    logits: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidates that top-k, then top-p leave.

    Top-k keeps exactly k tokens; top-p the fewest best tokens whose probabilities, after top-k,
    add up to at least ``top_p``.

    Args:
        logits: float32 ``(R, V)``.
        top_k: int64 ``(R,)``, 0 for no limit, or None.
        top_p: float32 ``(R,)``, or None.

    Returns:
        ``(values, token_ids)`` of shape ``(R, m)``, best first, with values of minus infinity
        where fewer than m remain.
    """
    vocab_size = logits.shape[-1]
    width = _FIRST_CANDIDATES
    unlimited = top_k is None
    if top_k is not None:
        top_k = top_k.clamp(max=vocab_size)
        unlimited = bool((top_k <= 0).any())
        width = max(int(top_k.max()), _FIRST_CANDIDATES if unlimited else 1)
    if top_p is None and unlimited:
        width = vocab_size
    log_total = logits.logsumexp(dim=-1, keepdim=True) if unlimited else None
    while width * 4 < vocab_size:
        values, token_ids = logits.topk(width, dim=-1)
        keep = _keep(values, log_total, top_k, top_p)
        # Candidates suffice when no row without a top-k limit kept the last of them.
        if not unlimited or not bool(
            keep[:, -1].any() if top_k is None else (keep[:, -1] & (top_k <= 0)).any()
        ):
            return values.masked_fill_(~keep, float("-inf")), token_ids
        width *= _GROWTH
    values, token_ids = logits.sort(dim=-1, descending=True, stable=True)
    keep = _keep(values, log_total, top_k, top_p)
    return values.masked_fill_(~keep, float("-inf")), token_ids


def apply_top_k_top_p(
    logits: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None
) -> torch.Tensor:
    """``logits`` with minus infinity wherever ``truncate`` drops a token; a new tensor."""
    if top_k is None and top_p is None:
        return logits
    values, token_ids = truncate(logits, top_k, top_p)
    return torch.full_like(logits, float("-inf")).scatter_(-1, token_ids, values)
