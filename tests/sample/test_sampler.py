"""The sampler as a whole: order of edits, distributions, seeds, batches of unlike rows."""

import numpy as np
import pytest
import torch

from vllm.v1.sample.history import TokenHistory
from vllm.v1.sample.metadata import PenaltyRows, SamplingMetadata, TokenEdits
from vllm.v1.sample.ops.logprobs import LOGPROBS_MODES
from vllm.v1.sample.sampler import Sampler

VOCAB = 40
MINUS_INF = float("-inf")


def metadata(rows: int, temperature=None, **fields) -> SamplingMetadata:
    if temperature is not None:
        fields["temperature"] = np.full(rows, temperature, dtype=np.float32)
        fields.setdefault("seeds", np.arange(rows, dtype=np.uint64))
        fields.setdefault("positions", np.arange(rows, dtype=np.int64))
    return SamplingMetadata(num_rows=rows, **fields)


def edits(*parts: tuple[int, int, float]) -> TokenEdits:
    return TokenEdits(
        rows=np.array([row for row, _, _ in parts], dtype=np.int64),
        token_ids=np.array([token for _, token, _ in parts], dtype=np.int64),
        values=np.array([value for _, _, value in parts], dtype=np.float32),
    )


def some_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def frequencies(logits: torch.Tensor, count: int = 40_000, **fields) -> np.ndarray:
    """Share of each token among ``count`` draws from one row of logits."""
    out = Sampler()(
        logits.repeat(count, 1),
        metadata(count, **fields, seeds=np.full(count, 5, dtype=np.uint64)),
    )
    return np.bincount(out.sampled_token_ids.numpy(), minlength=VOCAB) / count


def assert_distribution(observed: np.ndarray, expected: np.ndarray, count: int = 40_000) -> None:
    assert (observed[expected == 0] == 0).all()
    some = expected > 0
    chi_square = (count * (observed - expected)[some] ** 2 / expected[some]).sum()
    degrees = some.sum() - 1
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_rows_take_the_best_token(dtype):
    logits = some_logits(9).to(dtype)
    out = Sampler()(logits, metadata(9))
    assert out.sampled_token_ids.tolist() == logits.argmax(dim=-1).tolist()
    assert out.logprobs is None


def test_a_greedy_batch_leaves_the_logits_alone():
    logits = some_logits(3)
    before = logits.clone()
    Sampler()(logits, metadata(3))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_scales_the_distribution(temperature):
    logits = some_logits(1)
    expected = (logits / temperature).double().softmax(dim=-1)[0].numpy()
    assert_distribution(frequencies(logits, temperature=temperature), expected)


def test_top_k_top_p_and_min_p_together():
    logits = some_logits(1)
    count = 40_000
    probs = (logits[0] / 0.9).double().softmax(dim=-1)
    probs[probs < 0.02 * probs.max()] = 0
    order = probs.argsort(descending=True)
    probs[order[8:]] = 0
    probs /= probs.sum()
    kept = probs[order].cumsum(0) - probs[order] < 0.85
    probs[order[~kept]] = 0
    observed = frequencies(
        logits,
        temperature=0.9,
        top_k=np.full(count, 8),
        top_p=np.full(count, 0.85, dtype=np.float32),
        min_p=np.full(count, 0.02, dtype=np.float32),
    )
    assert_distribution(observed, (probs / probs.sum()).numpy())


def test_rows_of_one_batch_keep_to_their_own_parameters():
    count = 3_000
    logits = some_logits(1).repeat(4 * count, 1)
    kind = np.arange(4 * count) % 4
    out = Sampler()(
        logits.clone(),
        SamplingMetadata(
            num_rows=4 * count,
            temperature=np.choose(kind, [0.0, 1.0, 1.0, 1.0]).astype(np.float32),
            top_k=np.choose(kind, [0, 2, 0, 0]).astype(np.int64),
            top_p=np.choose(kind, [1.0, 1.0, 1e-6, 1.0]).astype(np.float32),
            seeds=np.arange(4 * count, dtype=np.uint64),
            positions=np.zeros(4 * count, dtype=np.int64),
        ),
    )
    tokens = out.sampled_token_ids.numpy()
    best = logits[0].argsort(descending=True).numpy()
    assert (tokens[kind == 0] == best[0]).all()
    assert set(tokens[kind == 1]) == set(best[:2])
    assert (tokens[kind == 2] == best[0]).all()
    assert len(set(tokens[kind == 3])) > 10


@pytest.mark.parametrize("limits", [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.7}])
def test_a_seed_gives_the_same_tokens_in_any_batch(limits):
    rows = 16
    logits = some_logits(rows, seed=3)

    def fields(index) -> dict:
        out: dict = {
            "seeds": (np.arange(rows, dtype=np.uint64) * np.uint64(77))[index],
            "positions": (np.arange(rows, dtype=np.int64) + 5)[index],
        }
        for name, value in limits.items():
            dtype = np.int64 if name == "top_k" else np.float32
            out[name] = np.full(rows, value, dtype=dtype)[index]
        return out

    order = np.random.default_rng(0).permutation(rows)
    together = Sampler()(logits.clone(), metadata(rows, 0.8, **fields(slice(None))))
    shuffled = Sampler()(logits[order].clone(), metadata(rows, 0.8, **fields(order)))
    for row in range(rows):
        alone = Sampler()(logits[row : row + 1].clone(), metadata(1, 0.8, **fields([row])))
        assert alone.sampled_token_ids.item() == together.sampled_token_ids[row]
    assert shuffled.sampled_token_ids.tolist() == together.sampled_token_ids[order].tolist()


def test_allowed_banned_and_biased_tokens():
    logits = torch.zeros(4, VOCAB)
    logits[:, 9] = 5.0
    out = Sampler()(
        logits,
        metadata(
            4,
            allowed={0: np.array([3, 4])},
            banned=edits((1, 9, 0.0), (2, 9, 0.0)),
            bias=edits((0, 4, 1.0), (1, 30, 2.5), (2, 9, 100.0), (2, 8, 0.5)),
        ),
    )
    assert out.sampled_token_ids.tolist() == [4, 30, 8, 9]


def test_penalties_change_the_greedy_choice():
    logits = torch.zeros(2, VOCAB)
    logits[:, 5], logits[:, 6] = 2.0, 1.9
    penalties = PenaltyRows(
        rows=np.array([1]),
        histories=[TokenHistory([], [5])],
        repetition=np.array([1.0], dtype=np.float32),
        frequency=np.array([0.5], dtype=np.float32),
        presence=np.array([0.0], dtype=np.float32),
    )
    out = Sampler()(logits, metadata(2, penalties=penalties))
    assert out.sampled_token_ids.tolist() == [5, 6]


def test_a_grammar_mask_rules_greedy_and_random_rows():
    def only_seven(logits: torch.Tensor) -> torch.Tensor:
        keep = logits[:, 7].clone()
        logits.fill_(MINUS_INF)
        logits[:, 7] = keep
        return logits

    for temperature in (None, 1.0):
        out = Sampler()(some_logits(3), metadata(3, temperature), only_seven)
        assert out.sampled_token_ids.tolist() == [7, 7, 7]


@pytest.mark.parametrize("temperature", [None, 0.7])
@pytest.mark.parametrize("limits", [{}, {"top_p": np.full(4, 0.9, dtype=np.float32)}])
def test_only_rows_without_a_choice_fail(temperature, limits):
    logits = some_logits(4)
    logits[1, 3] = float("nan")
    logits[2] = MINUS_INF
    out = Sampler()(logits, metadata(4, temperature, **limits))
    tokens = out.sampled_token_ids.tolist()
    assert tokens[1] == tokens[2] == -1
    assert tokens[0] >= 0 and tokens[3] >= 0


@pytest.mark.parametrize("mode", LOGPROBS_MODES)
@pytest.mark.parametrize("temperature", [None, 0.5])
def test_logprobs_modes(mode, temperature):
    logits = some_logits(3)
    top_k = None if temperature is None else np.array([4, 0, 0])
    out = Sampler(mode)(
        logits.clone(),
        metadata(
            3, temperature, top_k=top_k, num_logprobs=np.array([2, -1, 5]), bias=edits((2, 1, 3.0))
        ),
    )
    expected = logits.clone()
    if mode.startswith("processed"):
        expected[2, 1] += 3.0
        if temperature is not None:
            expected /= temperature
            expected[0, expected[0].argsort(descending=True)[4:]] = MINUS_INF
    if mode.endswith("logprobs"):
        expected = expected.log_softmax(dim=-1)
    assert out.logprobs is not None
    assert out.logprobs.rows.tolist() == [0, 2]
    ids = out.logprobs.logprob_token_ids.long()
    assert ids[:, 0].tolist() == out.sampled_token_ids[[0, 2]].tolist()
    torch.testing.assert_close(out.logprobs.logprobs, expected[[0, 2]].gather(-1, ids))


def test_raw_logprobs_ignore_the_grammar():
    logits = some_logits(1)
    best = int(logits.argmax())

    def forbid_best(masked: torch.Tensor) -> torch.Tensor:
        masked[:, best] = MINUS_INF
        return masked

    out = Sampler()(logits.clone(), metadata(1, num_logprobs=np.array([1])), forbid_best)
    assert out.logprobs is not None
    assert out.logprobs.logprob_token_ids[0, 1] == best
    assert out.logprobs.sampled_token_ranks.tolist() == [2]
