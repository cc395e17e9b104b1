"""Every model with state layers generates what transformers generates, whatever the scheduler does.

As ``test_parity``: greedy tokens and logits for 8 prompts, in float32, through the whole engine.
States are kept for reuse in two modes; a hit continues a state that another request left, and
changes no token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.models.checkpoints import save
from tests.models.parity import (
    Generated,
    assert_equals_transformers,
    assert_same,
    engine,
    generate,
    make_prompts,
    metric,
    smallest_pool,
)
from tests.models.state_checkpoints import CLASSES, make_state_model
from vllm.errors import ConfigError

EACH_TIME = ("mamba", "bamba")
"""One of each recurrence, one with attention. The others are slow to run each time."""
MODELS = [
    pytest.param(name, marks=[] if name in EACH_TIME else pytest.mark.slow) for name in CLASSES
]
BLOCK = 32
"""Of caches that keep states: attention's blocks have as many tokens."""
EVERY_BLOCK = {"mamba_cache_mode": "all", "block_size": BLOCK}
"""A state at the end of each block is kept; by default one for the whole request is."""
WITHOUT_ATTENTION = ("mamba", "falcon_mamba", "mamba2")
COVERING = {("mamba2", "BHLNC"), ("bamba", "BLNHC"), ("zamba2", "LHBNC")}
LAYOUTS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


@dataclass
class Case:
    folder: Path
    hf: Any
    reference: Generated
    has_attention: bool


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    hf = make_state_model(request.param)
    save(hf, folder)
    with engine(folder, enable_prefix_caching=False, **EVERY_BLOCK) as llm:
        reference = generate(llm, make_prompts(), one_by_one=True)
    return Case(folder, hf, reference, request.param not in WITHOUT_ATTENTION)


def possible_hit(length: int, mode: str) -> int:
    """Tokens of a prompt, computed before, that need not be computed again: at least one must be.

    In mode "align" only the last whole block of a prompt that one step takes has left a state.
    """
    if mode == "all":
        return (length - 1) // BLOCK * BLOCK
    kept = length // BLOCK * BLOCK
    return kept if kept < length else 0


def test_alone_it_equals_transformers(case):
    assert_equals_transformers(case.reference, case.hf)


def test_prompts_in_chunks(case):
    with engine(case.folder, max_num_batched_tokens=40, max_num_seqs=8) as llm:
        assert_same(generate(llm, case.reference.prompts), case.reference)


@pytest.mark.parametrize("mode", ["align", "all"])
def test_in_one_batch_and_again_out_of_the_prefix_cache(case, mode):
    prompts = case.reference.prompts
    settings = {
        "mamba_cache_mode": mode,
        "block_size": BLOCK,
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": 1 << 25,
    }
    with engine(case.folder, **settings) as llm:
        first = generate(llm, prompts)
        again = generate(llm, prompts)
    assert_same(first, case.reference)
    assert first.cached == [0] * len(prompts)
    assert_same(again, case.reference)
    assert again.cached == [possible_hit(len(prompt), mode) for prompt in prompts]


@pytest.mark.parametrize("mode", ["align", "all"])
def test_a_prefix_of_others_is_continued(case, mode):
    """Prompts that begin alike: states of the first one's blocks are where the others begin."""
    shared = case.reference.prompts[-1][: 3 * BLOCK]
    prompts = [shared + prompt for prompt in case.reference.prompts[:4]]
    settings = {
        "mamba_cache_mode": mode,
        "block_size": BLOCK,
        "enable_prefix_caching": True,
        # Steps that end where blocks do leave a state at the end of each, in both modes.
        "max_num_batched_tokens": BLOCK,
        "max_num_seqs": 8,
    }
    with engine(case.folder, **settings) as llm:
        first = generate(llm, prompts[:1])
        others = generate(llm, prompts[1:])
    assert_equals_transformers(first, case.hf)
    assert_equals_transformers(others, case.hf)
    assert first.cached == [0]
    assert others.cached == [len(shared)] * len(others.prompts)


@pytest.mark.parametrize("mode", ["none", "align", "all"])
def test_after_preemption(case, mode):
    settings = {
        "mamba_cache_mode": mode,
        "block_size": BLOCK,
        "enable_prefix_caching": mode == "align",
    }
    # The longest request fits, and little beside it.
    blocks = smallest_pool(case.folder, **settings) + 2
    with engine(case.folder, **settings, num_gpu_blocks_override=blocks) as llm:
        assert_same(generate(llm, case.reference.prompts), case.reference)
        # One state for a whole request is there from its beginning to its end.
        runs_out = case.has_attention or mode != "none"
        assert (metric(llm, "num_preemptions") > 0) is runs_out


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [
        pytest.param(
            model_type, layout, marks=[] if (model_type, layout) in COVERING else pytest.mark.slow
        )
        for model_type in CLASSES
        for layout in LAYOUTS
    ],
)
def test_in_every_layout(model_type, layout, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_KV_CACHE_DEBUG", "1")
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    hf = make_state_model(model_type)
    save(hf, tmp_path)
    splits_pages = layout in ("LHBNC", "BHLNC")
    if splits_pages and model_type not in WITHOUT_ATTENTION:
        with pytest.raises(ConfigError, match=f"{layout} does not keep a page together"):
            engine(tmp_path).__enter__()
        return
    with engine(tmp_path) as llm:
        assert_equals_transformers(generate(llm, make_prompts()), hf)


@pytest.mark.parametrize("model_type", EACH_TIME)
def test_nothing_is_written_outside_of_what_a_step_owns(model_type, tmp_path, monkeypatch):
    """The debug mode watches every byte of the caches."""
    monkeypatch.setenv("VLLM_KV_CACHE_DEBUG", "1")
    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", "DS")
    hf = make_state_model(model_type)
    with engine(save(hf, tmp_path), **EVERY_BLOCK, enable_prefix_caching=True) as llm:
        assert_equals_transformers(generate(llm, make_prompts()[:5]), hf)
