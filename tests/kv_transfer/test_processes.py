"""Prefill there, decode here: real servers, the router, real NIXL, every kind of model."""

from __future__ import annotations

import importlib.util
import random

import pytest

from tests.kv_transfer.harness import MODELS, Setup, in_parallel

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")),
    reason="needs nixl: pip install 'vllm[nixl]'",
)
NUM_TOKENS = 12


def make_prompts(count: int, seed: int = 0, longest: int = 200) -> list[list[int]]:
    """Of 2 to ``longest`` tokens; every fourth goes on where an earlier one ended."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    for index in range(count):
        start = rng.choice(prompts)[: longest // 2] if index % 4 == 3 else []
        length = rng.randint(max(2, len(start) + 1), longest)
        prompts.append(start + [rng.randrange(3, 190) for _ in range(length - len(start))])
    return prompts


def compare(fleet, prefill, decode, prompts):
    """Tokens through the router are those of a plain server; nothing is left behind."""
    p, d, plain = fleet.pair(prefill, decode)
    before = d.metric("vllm:kv_transfers_total")
    expected = in_parallel(lambda prompt: plain.tokens(prompt, NUM_TOKENS), prompts)
    with fleet.router.with_servers([p], [d]):
        got = in_parallel(lambda prompt: fleet.router.tokens(prompt, NUM_TOKENS), prompts)
    assert got == expected
    assert d.metric("vllm:kv_transfers_total") > before
    assert d.metric("vllm:kv_failed_transfers_total") == 0
    p.wait_until_empty()
    d.wait_until_empty()


def test_a_hybrid_model_writes_the_tokens_of_one_server(fleet):
    setup = Setup(model="mamba 2 and attention")
    compare(fleet, setup, setup, make_prompts(8))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("model", MODELS)
def test_one_hundred_prompts_write_the_tokens_of_one_server(fleet, model):
    compare(fleet, Setup(model=model), Setup(model=model), make_prompts(100))
