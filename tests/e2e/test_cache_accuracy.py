"""What a quantised cache costs SmolLM2, and that it costs what the format's own formula does.

The measure: perplexity over some English, and in how many percent of the positions the first choice
is that of the model with a plain cache. The judge: ``cache_accuracy.Simulation``. ``-s`` prints the
table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.e2e.cache_accuracy import (
    Followed,
    Recorder,
    Run,
    Simulation,
    ask,
    observed_by,
    scales_of,
    set_scales,
)
from vllm import LLM
from vllm.v1.attention.ops.kv_formats import FORMATS, kv_format
from vllm.v1.attention.ops.turboquant import TURBOQUANT_FORMATS

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

pytestmark = pytest.mark.timeout(600)

POINTS = 0.3
"""Of perplexity, and of the percentage."""
TEXT = Path(__file__).resolve().parents[2] / "docs" / "kv_cache.md"


@dataclass(frozen=True)
class Case:
    cache_dtype: str
    scales: str = "one"
    """Of formats with one for a layer's keys and one for its values: "one", "given", "found"."""

    def __str__(self) -> str:
        return self.cache_dtype if self.scales == "one" else f"{self.cache_dtype}, {self.scales}"


CASES = [
    *(Case(name) for name in (*FORMATS, *TURBOQUANT_FORMATS) if name != "fp8"),
    Case("fp8_e4m3", "given"),
    Case("fp8_e5m2", "found"),
    Case("nvfp4", "given"),
    Case("nvfp4", "found"),
]


def make_texts(count: int, length: int) -> torch.Tensor:
    """Token ids ``(count, length)``."""
    from vllm.transformers_utils.config import resolve_model
    from vllm.transformers_utils.tokenizer import get_tokenizer

    tokenizer = get_tokenizer(resolve_model("smollm2").model_path)
    ids = tokenizer.encode(TEXT.read_text())
    return torch.tensor(ids[: count * length]).view(count, length)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Of one engine.

    Attributes:
        ours: as requests are served.
        observed: with a recorder in between, which had ``followed`` do the same.
        free: the simulation by keys and values of its own.
        spoilt: with values that are stored a quarter too large.
    """

    ours: Run
    observed: Run
    followed: Followed
    free: Run
    spoilt: Run


def answer(case: Case, simulation: Simulation, model: str = "smollm2") -> Answers:
    options: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 256 << 20,
        "kv_cache_dtype": case.cache_dtype, "enable_prefix_caching": False,
        "max_num_batched_tokens": max(512, simulation.texts.numel()), "enforce_eager": True,
        "calculate_kv_scales": case.scales == "found", "skip_tokenizer_init": True,
    }  # fmt: skip
    fmt = kv_format(case.cache_dtype)
    assert fmt is not None
    with LLM(model, **options) as llm:
        if case.scales == "given":
            set_scales(llm, lambda layer: (0.03 * (1 + layer / 7), 0.011 * (1 + layer / 3)))
        scales, recorder = scales_of(llm), Recorder()
        with observed_by(llm, recorder):
            observed = ask(llm, simulation.texts)
        ours = ask(llm, simulation.texts)
        with observed_by(llm, Recorder(factor=1.25)):
            spoilt = ask(llm, simulation.texts)
    followed = simulation.following(recorder, fmt, scales)
    free = simulation.free(fmt, scales)
    return Answers(ours=ours, observed=observed, followed=followed, free=free, spoilt=spoilt)


def is_near(found: Run, expected: Run, plain: Run) -> bool:
    return (
        abs(found.perplexity - expected.perplexity) <= POINTS
        and abs(found.agreement(plain) - expected.agreement(plain)) <= POINTS
    )


def check(case: Case, simulation: Simulation, plain: Run) -> None:
    found = answer(case, simulation)
    simulated = found.followed.run
    apart = (found.ours.log_probs - simulated.log_probs).abs()
    print(
        f"\n{case}: engine {found.ours.describe(plain)}; simulation {simulated.describe(plain)}; "
        f"by itself {found.free.describe(plain)}; plain {plain.perplexity:.3f}; log-probabilities "
        f"{apart.median():.1e} apart, at most {apart.max():.1e}; keys and values "
        f"{found.followed.deviation:.1e}; spoilt {found.spoilt.describe(plain)}"
    )
    assert torch.equal(found.ours.log_probs, found.observed.log_probs), "the recorder is in the way"
    assert found.followed.deviation < 1e-3
    assert is_near(found.ours, simulated, plain)
    assert apart.median() < 1e-3
    assert not is_near(found.spoilt, simulated, plain)


@pytest.fixture(scope="module")
def model(judging_model: LlamaForCausalLM) -> Iterator[LlamaForCausalLM]:
    yield judging_model
    judging_model.set_attn_implementation("sdpa")


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture(scope="module")
def simulation(model: LlamaForCausalLM) -> Simulation:
    return Simulation(model, make_texts(2, 256))


@pytest.fixture(scope="module")
def plain(simulation: Simulation) -> Run:
    return simulation.free(None)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_cache_costs_what_its_formula_does(
    case: Case, simulation: Simulation, plain: Run
) -> None:
    check(case, simulation, plain)


@pytest.mark.parametrize("name", ["int4_per_token_head"])
def test_a_cache_costs_what_its_formula_does_over_a_short_text(
    name: str, model: LlamaForCausalLM
) -> None:
    simulation = Simulation(model, make_texts(1, 64))
    check(Case(name), simulation, simulation.free(None))
