"""Draws follow the weights, and depend on nothing but seed and position."""

import numpy as np
import pytest
import torch

from vllm.v1.sample.ops.random import draw, uniform


def chi_square_bound(cells: int) -> float:
    """Five standard deviations above the mean of a chi-square with ``cells - 1`` degrees."""
    return cells - 1 + 5 * np.sqrt(2 * (cells - 1))


def test_uniform_numbers_fill_the_unit_interval_evenly():
    numbers = uniform(np.full(200_000, 7, dtype=np.uint64), np.arange(200_000))
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - 2_000) ** 2 / 2_000).sum() < chi_square_bound(100)


@pytest.mark.parametrize("step", [1, 2**32, 2**63])
def test_neighbouring_seeds_are_independent(step):
    seeds = np.arange(1_000, dtype=np.uint64) * np.uint64(step)
    numbers = uniform(seeds, np.zeros(1_000, dtype=np.int64))
    following = uniform(seeds + np.uint64(1), np.zeros(1_000, dtype=np.int64))
    if step == 2**63:
        numbers, following = numbers[:2], following[:2]
        assert not np.array_equal(numbers, following)
        return
    assert abs(np.corrcoef(numbers, following)[0, 1]) < 0.15


def test_positions_of_one_seed_are_independent():
    numbers = uniform(np.full(10_001, 3, dtype=np.uint64), np.arange(10_001))
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.05


def test_a_row_gets_the_same_number_in_any_batch():
    seeds, positions = np.arange(64, dtype=np.uint64), np.arange(64) * 3
    together = uniform(seeds, positions)
    alone = [uniform(seeds[i : i + 1], positions[i : i + 1])[0] for i in range(64)]
    assert together.tolist() == alone


def test_draws_follow_the_weights():
    weights = torch.tensor([0.5, 0.0, 3.0, 1.0, 0.25, 0.25])
    count = 100_000
    numbers = torch.from_numpy(
        uniform(np.full(count, 11, dtype=np.uint64), np.arange(count, dtype=np.int64))
    )
    drawn = draw(weights.repeat(count, 1), numbers)
    observed = torch.bincount(drawn, minlength=6).double()
    expected = weights.double() / weights.sum() * count
    assert observed[1] == 0
    some = expected > 0
    chi_square = ((observed - expected)[some] ** 2 / expected[some]).sum()
    assert chi_square < chi_square_bound(int(some.sum()))


@pytest.mark.parametrize("number", [0.0, 0.25, 1 - 2**-53])
def test_weightless_columns_are_never_drawn(number):
    weights = torch.zeros(1, 1_000)
    weights[0, [17, 400]] = torch.tensor([1e-6, 1e-6])
    drawn = draw(weights, torch.tensor([number], dtype=torch.float64))
    assert drawn.item() in (17, 400)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_row_without_a_distribution_yields_no_token(bad):
    weights = torch.ones(2, 5)
    weights[0] = bad
    drawn = draw(weights, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert drawn.tolist()[0] == -1 and drawn.tolist()[1] >= 0
