"""Log-probabilities and ranks agree with log_softmax and sorting."""

import pytest
import torch

from vllm.v1.sample.ops.logprobs import gather_logprobs


@pytest.mark.parametrize("count", [0, 1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_log_softmax(count, dtype):
    logits = (torch.randn(6, 64, generator=torch.Generator().manual_seed(2)) * 4).to(dtype)
    tokens = torch.tensor([0, 5, 63, 10, 33, 7])
    ids, values, ranks = gather_logprobs(logits, tokens, count)
    expected = logits.float().log_softmax(dim=-1)
    assert ids.shape == values.shape == (6, count + 1)
    assert ids[:, 0].tolist() == tokens.tolist()
    torch.testing.assert_close(values, expected.gather(-1, ids.long()))
    best = expected.sort(dim=-1, descending=True).values[:, :count]
    torch.testing.assert_close(values[:, 1:], best)
    better = (expected > expected.gather(-1, tokens[:, None])).sum(dim=-1)
    assert ranks.tolist() == (better + 1).tolist()


def test_logits_mode_returns_logits():
    logits = torch.randn(2, 10)
    ids, values, _ = gather_logprobs(logits, torch.tensor([3, 4]), 2, as_logits=True)
    torch.testing.assert_close(values, logits.gather(-1, ids.long()))


def test_more_than_the_vocabulary_is_the_vocabulary():
    ids, _, _ = gather_logprobs(torch.randn(1, 8), torch.tensor([0]), 20)
    assert ids.shape == (1, 9)


def test_equal_logits_share_the_best_rank():
    _, _, ranks = gather_logprobs(torch.zeros(1, 8), torch.tensor([5]), 0)
    assert ranks.tolist() == [1]


def test_forbidden_tokens_have_no_probability():
    logits = torch.tensor([[1.0, float("-inf"), 1.0]])
    _, values, _ = gather_logprobs(logits, torch.tensor([0]), 3)
    torch.testing.assert_close(values[0, :3], torch.full((3,), 0.5).log())
    assert values[0, 3] == float("-inf")
