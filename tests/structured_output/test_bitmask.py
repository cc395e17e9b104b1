"""A mask forbids what its bits forbid, on its own rows."""

import numpy as np
import pytest
import torch

from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.structured_output.bitmask import GrammarMask

VOCAB = 70


def bits(*allowed: int) -> np.ndarray:
    words = np.zeros(3, dtype=np.int32)
    for token in allowed:
        words.view(np.uint32)[token // 32] |= np.uint32(1) << np.uint32(token % 32)
    return words


def make_mask(row_of: dict[str, int], **allowed: tuple[int, ...]) -> GrammarMask:
    rows = np.stack([bits(*tokens) for tokens in allowed.values()])
    return GrammarMask(GrammarOutput(list(allowed), rows), row_of)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_allowed_tokens_stay(dtype):
    logits = torch.randn(3, VOCAB).to(dtype)
    before = logits.clone()
    out = make_mask({"x": 2, "y": 0}, y=(0, 31, 32, 69), x=(63,))(logits)
    assert out is logits
    assert torch.isfinite(logits[0]).nonzero().flatten().tolist() == [0, 31, 32, 69]
    assert torch.isfinite(logits[2]).nonzero().flatten().tolist() == [63]
    assert torch.equal(logits[1], before[1])
    assert torch.equal(logits[0, [0, 31, 32, 69]], before[0, [0, 31, 32, 69]])


def test_a_mask_for_every_row():
    logits = make_mask({"a": 0, "b": 1}, a=(5,), b=(6, 7))(torch.zeros(2, VOCAB))
    assert [torch.isfinite(row).nonzero().flatten().tolist() for row in logits] == [[5], [6, 7]]


def test_requests_that_do_not_sample_are_left_out():
    logits = torch.zeros(1, VOCAB)
    make_mask({"b": 0}, a=(5,), b=(6,))(logits)
    assert torch.isfinite(logits[0]).nonzero().flatten().tolist() == [6]
    untouched = torch.zeros(1, VOCAB)
    make_mask({}, a=(5,))(untouched)
    assert (untouched == 0).all()


def test_columns_past_the_mask_are_forbidden():
    logits = make_mask({"a": 0}, a=(95,))(torch.zeros(1, 200))
    assert torch.isfinite(logits[0]).nonzero().flatten().tolist() == [95]


def test_finds_requests_that_may_only_stop():
    mask = make_mask({"a": 0, "b": 1, "c": 2}, a=(3, 40), b=(3, 41), c=(31,))
    stops = {"a": np.array([40, 3, 60]), "b": np.array([3]), "c": np.array([31])}
    assert mask.allow_nothing_but(stops) == {"a", "c"}
    assert mask.allow_nothing_but({}) == set()
