"""The GPU's draws against the plain ones: on a GPU where there is one, else in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.effort import by_effort
from vllm.v1.sample.ops import triton_truncate
from vllm.v1.sample.ops.random import draw
from vllm.v1.sample.ops.topk_topp import apply_min_p, apply_top_k_top_p
from vllm.v1.sample.ops.triton_sample import DrawScratch, sample_rows
from vllm.v1.sample.ops.triton_truncate import truncate_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sample(logits, scale, uniform, limits=None) -> torch.Tensor:
    logits, scale, uniform = logits.to(DEVICE), scale.to(DEVICE), uniform.to(DEVICE)
    out = torch.full((logits.shape[0],), -7, device=DEVICE)
    scratch = DrawScratch.make(logits.shape[0], logits.shape[1], torch.device(DEVICE))
    sample_rows(logits, scale, uniform, scratch, out)
    if limits is not None:
        limits = tuple(limit.to(DEVICE) for limit in limits)
        truncate_rows(logits, scale, uniform, limits, scratch, out)
    return out.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1000, 9000])
def test_the_draw_is_the_plain_one(dtype: torch.dtype, vocab: int) -> None:
    generator = torch.Generator().manual_seed(torch.seed())
    logits = (torch.randn(24, vocab, generator=generator) * 3).to(dtype)
    scale = torch.rand(24, generator=generator) * 2 + 0.1
    scale[::5] = 0
    uniform = torch.rand(24, generator=generator).clamp(max=0.999999)
    shares = (logits.float() * scale[:, None]).softmax(-1)
    drawn = draw(shares, uniform.double())
    got = sample(logits, scale, uniform)
    ends = shares.double().cumsum(-1)
    for row, token in enumerate(got.tolist()):
        if scale[row] == 0:
            assert logits[row, token] == logits[row].max()
        elif token != drawn[row]:
            # Where a number lies within rounding of a boundary, the neighbour is as good.
            begin = ends[row, token] - shares[row, token]
            assert begin - 1e-5 <= uniform[row] <= ends[row, token] + 1e-5


def test_rows_without_a_choice_are_told() -> None:
    logits = torch.randn(5, 5000)
    logits[0] = float("-inf")
    logits[1, 77] = float("nan")
    logits[2, 4999] = float("inf")
    logits[3] = float("-inf")
    logits[3, 4998] = 1.0
    for scale in (0.0, 1.0):
        got = sample(logits, torch.full((5,), scale), torch.full((5,), 0.5))
        assert got[:4].tolist() == [-1, -1, -1, 4998] and got[4] >= 0


def kept_tokens(logits: torch.Tensor, scale: float, k: int, p: float, m: float) -> torch.Tensor:
    """Which tokens of one row the plain operators keep."""
    scaled = logits.float()[None] * scale
    if m > 0:
        apply_min_p(scaled, torch.tensor([m]))
    scaled = apply_top_k_top_p(
        scaled,
        torch.tensor([k]) if k else None,
        torch.tensor([p], dtype=torch.float32) if p < 1 else None,
    )
    return torch.isfinite(scaled[0])


LIMITS = [
    (1, 1.0, 0.0), (5, 1.0, 0.0), (40, 0.9, 0.0), (0, 0.5, 0.0), (0, 0.95, 0.0), (0, 1.0, 0.1),
    (50, 0.8, 0.05), (7, 1e-6, 0.0), (4000, 0.99, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spread", "bits", "candidates"),
    [(4.0, 16, 2048), (1.0, 18, 64), (0.01, 24, 2048)],
    ids=["peaked", "in place", "flat"],
)
def test_limits_keep_what_the_plain_operators_keep(
    monkeypatch: pytest.MonkeyPatch, spread: float, bits: int, candidates: int
) -> None:
    """Of logits that have so few ``bits`` that no difference and no product of them is rounded:
    two that are next to each other would change places."""
    monkeypatch.setattr(triton_truncate, "_CANDIDATES", candidates)
    generator = torch.Generator().manual_seed(torch.seed())
    vocab, draws = 9000, by_effort(1, 2)
    for k, p, m in LIMITS:
        logits = torch.randn(vocab, generator=generator) * spread
        logits = (logits * 2.0**bits).round() / 2.0**bits
        kept = kept_tokens(logits, 1.25, k, p, m)
        weights = torch.where(kept, (logits * 1.25).softmax(0), 0)
        uniform = torch.rand(draws, generator=generator).clamp(max=0.999999)
        limits = (
            torch.full((draws,), k, dtype=torch.int32), torch.full((draws,), p),
            torch.full((draws,), m),
        )  # fmt: skip
        got = sample(logits.expand(draws, -1), torch.full((draws,), 1.25), uniform, limits)
        # Best first where top-k or top-p orders the tokens, else by their ids.
        ordered = bool(k) or p < 1
        order = logits.argsort(descending=True, stable=True) if ordered else torch.arange(vocab)
        sums = torch.zeros(vocab, dtype=torch.float64)
        sums[order] = weights.double()[order].cumsum(0)
        sums /= weights.double().sum()
        for token, number in zip(got.tolist(), uniform.tolist(), strict=True):
            assert kept[token], (k, p, m)
            own = float(weights[token].double() / weights.double().sum())
            assert sums[token] - own - 2e-4 <= number <= sums[token] + 2e-4, (k, p, m)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_of_equal_tokens_top_k_keeps_the_first(k: int) -> None:
    logits = torch.zeros(1000)
    logits[[7, 100, 200, 201, 202, 999]] = 2.0
    # Closer to each other than the least of the best tokens' shares.
    numbers = torch.from_numpy(np.linspace(0, 0.9999, 16, dtype=np.float32))
    limits = (torch.full((16,), k, dtype=torch.int32), torch.ones(16), torch.zeros(16))
    got = set(sample(logits.expand(16, -1), torch.ones(16), numbers, limits).tolist())
    best = [7, 100, 200, 201, 202, 999]
    expected = best[:k] if k <= 6 else best + [t for t in range(12) if t not in best][: k - 6]
    assert got <= set(expected)
    assert got >= set(best[: min(k, 6)])


def test_rows_that_limit_nothing_keep_their_plain_draw() -> None:
    logits = torch.randn(6, 3000)
    scale = torch.tensor([1.0, 0.0, 1.0, 0.0, 2.0, 1.0])
    uniform = torch.rand(6)
    limits = (
        torch.tensor([0, 5, 0, 0, 0, 1], dtype=torch.int32), torch.tensor([1.0, 0.5, 1, 1, 1, 1]),
        torch.zeros(6),
    )  # fmt: skip
    plain, limited = sample(logits, scale, uniform), sample(logits, scale, uniform, limits)
    assert limited[:5].tolist() == plain[:5].tolist()
    assert limited[5] == logits[5].argmax()
