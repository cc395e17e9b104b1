"""Top-k, top-p and min-p keep exactly the tokens that their definitions keep."""

import numpy as np
import pytest
import torch

from vllm.v1.sample.ops import topk_topp
from vllm.v1.sample.ops.topk_topp import apply_min_p, apply_top_k_top_p, truncate

VOCAB = 2_000


def reference_kept(row: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Token by token, in float64."""
    order = sorted(range(row.size), key=lambda token: -row[token])
    if top_k > 0:
        order = order[:top_k]
    weights = np.exp(row[order].astype(np.float64) - row.max())
    weights /= weights.sum()
    kept, total = set(), 0.0
    for token, weight in zip(order, weights, strict=True):
        if total >= top_p < 1:
            break
        kept.add(token)
        total += weight
    return kept


def make_logits(rows: int, spread: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def kept_of(masked: torch.Tensor) -> list[set[int]]:
    return [set(torch.nonzero(torch.isfinite(row)).flatten().tolist()) for row in masked]


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [None, [1, 3, 50, 1999], [5, 0, 0, 700]])
@pytest.mark.parametrize("top_p", [None, [0.1, 0.5, 0.9, 0.999], [1.0, 0.3, 1.0, 0.95]])
def test_keeps_what_the_definition_keeps(spread, top_k, top_p):
    logits = make_logits(4, spread)
    masked = apply_top_k_top_p(
        logits.clone(),
        None if top_k is None else torch.tensor(top_k),
        None if top_p is None else torch.tensor(top_p),
    )
    for row, kept in enumerate(kept_of(masked)):
        k = top_k[row] if top_k else 0
        p = top_p[row] if top_p else 1.0
        expected = reference_kept(logits[row].numpy(), k, p)
        # At the edge of the nucleus float32 and float64 may part by one token.
        assert len(kept ^ expected) <= (1 if p < 1 else 0)
        assert torch.equal(masked[row][list(kept)], logits[row][list(kept)])


def test_best_token_always_stays():
    logits = make_logits(1, 1.0)
    masked = apply_top_k_top_p(logits.clone(), None, torch.tensor([1e-9]))
    assert kept_of(masked) == [{int(logits.argmax())}]


def test_ties_at_the_kth_value_still_keep_exactly_k():
    masked = apply_top_k_top_p(torch.zeros(1, 100), torch.tensor([7]), None)
    assert len(kept_of(masked)[0]) == 7


def test_top_p_counts_probabilities_after_top_k():
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    # Of the best two, the first alone has 4/7 > 0.5.
    masked = apply_top_k_top_p(logits, torch.tensor([2]), torch.tensor([0.5]))
    assert kept_of(masked) == [{0}]


def test_candidates_grow_until_the_nucleus_fits(monkeypatch):
    monkeypatch.setattr(topk_topp, "_FIRST_CANDIDATES", 2)
    logits = make_logits(3, 1.0)
    few, ids = truncate(logits, None, torch.tensor([0.2, 0.2, 0.2]))
    assert few.shape[1] < VOCAB
    for row in range(3):
        kept = set(ids[row][torch.isfinite(few[row])].tolist())
        assert len(kept ^ reference_kept(logits[row].numpy(), 0, 0.2)) <= 1


def test_few_candidates_are_enough_for_a_peaked_row():
    logits = make_logits(2, 1.0)
    logits[:, 11] = 50.0
    values, ids = truncate(logits, None, torch.tensor([0.9, 0.9]))
    assert values.shape[1] == topk_topp._FIRST_CANDIDATES
    assert ids[:, 0].tolist() == [11, 11]
    assert torch.isfinite(values).sum(dim=1).tolist() == [1, 1]


def test_min_p_is_relative_to_the_best_token():
    probs = torch.tensor([[0.5, 0.26, 0.24], [0.9, 0.06, 0.04]])
    masked = apply_min_p(probs.log(), torch.tensor([0.5, 0.05]))
    assert kept_of(masked) == [{0, 1}, {0, 1}]


def test_min_p_of_zero_drops_nothing():
    logits = make_logits(1, 3.0)
    assert torch.equal(apply_min_p(logits.clone(), torch.zeros(1)), logits)
