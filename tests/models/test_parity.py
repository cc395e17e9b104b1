"""Every architecture generates what transformers generates, whatever the scheduler does.

Greedy tokens and logits of 64 steps (40 where slow tests are left out) for 8 prompts, in float32,
through the whole engine: alone (the reference, itself proved equal to transformers), in one batch,
with prompts in chunks, out of the prefix cache, and after preemption.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.models.checkpoints import CLASSES, make_hf_model, save
from tests.models.parity import (
    Generated,
    assert_equals_transformers,
    assert_same,
    engine,
    generate,
    make_prompts,
    metric,
)

ELSEWHERE = ("deepseek_v4",)
"""With tests of their own."""
ALIKE = ("qwen2", "qwen3")
"""Like Llama, but for their projections."""
ARCHITECTURES = [name for name in CLASSES if name not in ELSEWHERE]
MODELS = [
    pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in ARCHITECTURES
]
LAYOUTS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
COVERING = {
    ("gemma3_text", "BLHNC"),
    ("gpt_oss", "LBNHC"),
    ("llama4_text", "BHLNC"),
    ("deepseek_v3", "LHBNC"),
}
"""The others are slow to run each time."""
SMALL_POOL = {"num_gpu_blocks_override": 48, "max_num_batched_tokens": 64, "max_num_seqs": 8}
"""Blocks for the longest request and little more, in any grouping of layers."""


@dataclass
class Case:
    folder: Path
    hf: Any
    reference: Generated


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    hf = make_hf_model(request.param, max_position_embeddings=512)
    save(hf, folder)
    with engine(folder, enable_prefix_caching=False) as llm:
        reference = generate(llm, make_prompts(), one_by_one=True)
    return Case(folder, hf, reference)


def test_alone_it_equals_transformers(case):
    assert_equals_transformers(case.reference, case.hf)


def test_prompts_in_chunks(case):
    with engine(case.folder, max_num_batched_tokens=40, max_num_seqs=8) as llm:
        assert_same(generate(llm, case.reference.prompts), case.reference)


def test_in_one_batch_and_again_out_of_the_prefix_cache(case):
    prompts = case.reference.prompts
    with engine(case.folder) as llm:
        first = generate(llm, prompts)
        again = generate(llm, prompts)
    assert_same(first, case.reference)
    assert first.cached == [0] * len(prompts)
    assert_same(again, case.reference)
    # A whole number of blocks each, and at least one token is computed.
    assert again.cached == [(len(prompt) - 1) // 16 * 16 for prompt in prompts]


def test_after_preemption(case):
    with engine(case.folder, **SMALL_POOL) as llm:
        assert_same(generate(llm, case.reference.prompts), case.reference)
        assert metric(llm, "num_preemptions") > 0


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [
        pytest.param(
            model_type, layout, marks=[] if (model_type, layout) in COVERING else pytest.mark.slow
        )
        for model_type in ARCHITECTURES
        for layout in LAYOUTS
    ],
)
def test_in_every_layout(model_type, layout, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_KV_CACHE_DEBUG", "1")
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    hf = make_hf_model(model_type, max_position_embeddings=512)
    with engine(save(hf, tmp_path)) as llm:
        assert_equals_transformers(generate(llm, make_prompts()), hf)


@pytest.mark.parametrize("model_type", ["gemma2", "llama4_text"])
def test_without_the_hybrid_manager(model_type, tmp_path):
    """Windows and chunks keep every token then, and see no more for that."""
    hf = make_hf_model(model_type, max_position_embeddings=512)
    with engine(save(hf, tmp_path), disable_hybrid_kv_cache_manager=True) as llm:
        assert_equals_transformers(generate(llm, make_prompts()), hf)
