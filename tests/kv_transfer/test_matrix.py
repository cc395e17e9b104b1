"""Prefill and decode servers that differ: ranks, block sizes, layouts; every pair of values once.

Byte for byte all combinations are compared in ``test_plan``; here a covering set runs for real.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
from typing import Any

import pytest

from tests.kv_transfer.harness import MODELS, SMOLLM2, STATEFUL, Setup, StartError
from tests.kv_transfer.test_processes import compare, make_prompts

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")),
    reason="needs nixl: pip install 'vllm[nixl]'",
)
LAYOUTS = ("LBHNC", "LBNHC", "BHLNC")
FACTORS: dict[str, tuple[Any, ...]] = {
    "model": MODELS,
    "their tp": (1, 2),
    "our tp": (1, 2),
    "their block size": (16, 64),
    "our block size": (16, 64),
    "their layout": LAYOUTS,
    "our layout": LAYOUTS,
}
Combination = dict[str, Any]


def can_be(combination: Combination) -> bool:
    """What starts at all; refusals have tests of their own."""
    if combination["model"] == SMOLLM2:
        # 9 heads cannot be cut in two.
        return (combination["their tp"], combination["our tp"]) == (1, 1)
    layouts = combination["their layout"], combination["our layout"]
    # Pages that differ cannot have their heads outside of all layers.
    return combination["model"] not in STATEFUL or "BHLNC" not in layouts


def everything() -> list[Combination]:
    values = itertools.product(*FACTORS.values())
    made = (dict(zip(FACTORS, row, strict=True)) for row in values)
    return [combination for combination in made if can_be(combination)]


def pairs(combination: Combination) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(combination.items(), 2))


def covering_set() -> list[Combination]:
    """Greedy, from a seed that gives a small set; by model, so that servers are reused."""
    rng = random.Random(37)
    every = everything()
    left = set().union(*map(pairs, every))
    found: list[Combination] = []
    while left:
        best = max(rng.sample(every, 80), key=lambda one: len(pairs(one) & left))
        if pairs(best) & left:
            found.append(best)
            left -= pairs(best)
    return sorted(found, key=lambda one: MODELS.index(one["model"]))


COVERING = covering_set()


def test_every_pair_of_values_is_in_the_set():
    possible = set().union(*map(pairs, everything()))
    assert set().union(*map(pairs, COVERING)) == possible
    assert len(COVERING) <= 24


def name_of(combination: Combination) -> str:
    return "-".join(str(value).replace(" ", "_") for value in combination.values())


def setup(combination: Combination, side: str, **more: Any) -> Setup:
    model = combination["model"]
    # A convolution's state is cut by channels where a channel's rows lie together.
    environment = (("VLLM_SSM_CONV_STATE_LAYOUT", "DS"),) if model in STATEFUL else ()
    return Setup(
        model=model,
        tp=combination[f"{side} tp"],
        block_size=combination[f"{side} block size"],
        layout=combination[f"{side} layout"],
        environment=environment,
        **more,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("combination", COVERING, ids=name_of)
def test_servers_that_differ_write_the_tokens_of_one(fleet, combination):
    theirs, ours = setup(combination, "their"), setup(combination, "our")
    compare(fleet, theirs, ours, make_prompts(5, seed=len(combination["model"])))


@pytest.mark.slow
@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer"])
def test_heads_that_cannot_be_cut_are_refused_at_start(fleet, role):
    with pytest.raises(StartError, match=r"9 .*heads.* 2|tensor.parallel.*2.* 9"):
        fleet.get(Setup(model=SMOLLM2, role=role, tp=2))


@pytest.mark.slow
@pytest.mark.parametrize("model", STATEFUL)
def test_heads_outside_of_layers_are_refused_for_hybrids(fleet, model):
    with pytest.raises(StartError, match=r"BHLNC cannot be used.* what works: BLHNC, LBHNC"):
        fleet.get(Setup(model=model, role="kv_producer", layout="BHLNC"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", STATEFUL)
def test_convolutions_by_rows_with_other_ranks_are_refused(fleet, model):
    by_rows = (("VLLM_SSM_CONV_STATE_LAYOUT", "SD"),)
    p, d = fleet.all_of(
        Setup(model=model, role="kv_producer", tp=1, environment=by_rows),
        Setup(model=model, role="kv_consumer", tp=2, environment=by_rows),
    )
    response = d.complete(make_prompts(1)[0], params=p.prefill(make_prompts(1)[0]))
    assert response.status_code == 500 and "could not be loaded" in response.text
    assert "VLLM_SSM_CONV_STATE_LAYOUT=DS" in d.log()
    d.wait_until_empty()
    p.wait_until_empty(40)
