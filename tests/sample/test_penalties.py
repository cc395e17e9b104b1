"""Penalties agree with a plain loop over tokens."""

from collections import Counter

import numpy as np
import pytest
import torch

from vllm.v1.sample.history import TokenHistory
from vllm.v1.sample.metadata import PenaltyRows
from vllm.v1.sample.ops.penalties import apply_penalties

VOCAB = 50
PROMPTS = [[1, 2, 2, 3], [10, 11], []]
OUTPUTS = [[2, 4, 4], [], [20, 20, 20]]


def reference(row, prompt, output, repetition, frequency, presence):
    row = row.tolist()
    counts = Counter(output)
    for token in range(VOCAB):
        if token in prompt or token in output:
            row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
        row[token] -= frequency * counts[token]
        row[token] -= presence * (counts[token] > 0)
    return torch.tensor(row)


@pytest.mark.parametrize(
    ("repetition", "frequency", "presence"),
    [(1.3, 0.0, 0.0), (1.0, 0.7, 0.0), (1.0, 0.0, 1.5), (0.8, -0.5, 0.4), (1.2, 0.3, -2.0)],
)
def test_each_formula(repetition, frequency, presence):
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    rows = np.array([0, 1, 3])
    expected = logits.clone()
    for i, row in enumerate(rows):
        expected[row] = reference(
            logits[row], PROMPTS[i], OUTPUTS[i], repetition, frequency, presence
        )
    apply_penalties(
        logits,
        PenaltyRows(
            rows=rows,
            histories=[TokenHistory(p, o) for p, o in zip(PROMPTS, OUTPUTS, strict=True)],
            repetition=np.full(3, repetition, dtype=np.float32),
            frequency=np.full(3, frequency, dtype=np.float32),
            presence=np.full(3, presence, dtype=np.float32),
        ),
    )
    torch.testing.assert_close(logits, expected)


def test_each_row_has_its_own_penalty():
    logits = torch.ones(2, VOCAB)
    history = TokenHistory([7], [7])
    apply_penalties(
        logits,
        PenaltyRows(
            rows=np.array([0, 1]),
            histories=[history, history],
            repetition=np.array([2.0, 1.0], dtype=np.float32),
            frequency=np.array([0.0, 0.25], dtype=np.float32),
            presence=np.array([0.0, 0.0], dtype=np.float32),
        ),
    )
    assert logits[0, 7] == 0.5 and logits[1, 7] == 0.75
    assert (logits[:, :7] == 1).all() and (logits[:, 8:] == 1).all()


def test_forbidden_tokens_stay_forbidden():
    logits = torch.full((1, VOCAB), float("-inf"))
    apply_penalties(
        logits,
        PenaltyRows(
            rows=np.array([0]),
            histories=[TokenHistory([1], [2])],
            repetition=np.array([1.5], dtype=np.float32),
            frequency=np.array([1.0], dtype=np.float32),
            presence=np.array([1.0], dtype=np.float32),
        ),
    )
    assert torch.isneginf(logits).all()
