"""Qwen3-Next, LFM2, Kimi Linear and MiniMax-Text-01 generate what transformers generates, whatever
the scheduler does: the tests of ``test_state_parity``, and every layout and order of states.
"""

from __future__ import annotations

import pytest

from tests.models.checkpoints import save
from tests.models.linear_attention_checkpoints import CLASSES, make_linear_model
from tests.models.parity import assert_equals_transformers, engine, generate, make_prompts
from tests.models.test_state_parity import (  # noqa: F401 - run with the fixture below
    BLOCK,
    Case,
    test_a_prefix_of_others_is_continued,
    test_after_preemption,
    test_alone_it_equals_transformers,
    test_in_one_batch_and_again_out_of_the_prefix_cache,
    test_prompts_in_chunks,
)
from vllm.errors import ConfigError

ALIKE = ("lfm2_moe", "kimi_linear")
"""Variants of those that run each time."""
MODELS = [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in CLASSES]
LAYOUTS = ("LBHNC", "LBNHC", "BLHNC", "BLNHC")
"""Those that keep a page together, as pages of unlike layers must be."""
BLOCKS_OUTERMOST = ("BLHNC", "BLNHC")
"""A latent's page cannot be padded to those of states: they lie side by side in a block."""
REFUSED = [
    (kind, layout, "does not keep a page together")
    for kind in CLASSES
    if kind != "kimi_linear"
    for layout in ("LHBNC", "BHLNC")
] + [
    ("kimi_linear", layout, "what works: BLHNC, BLNHC")
    for layout in ("LBHNC", "LBNHC", "LHBNC", "BHLNC")
]
KEEPS_STATES = {"mamba_cache_mode": "align", "block_size": BLOCK, "enable_prefix_caching": True}
COVERING = {
    ("qwen3_next", "BLNHC", "DS"),
    ("lfm2", "LBHNC", "SD"),
    ("minimax", "LBNHC", "DS"),
    ("kimi_linear", "BLHNC", "SD"),
}
"""The others are slow to run each time."""


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    hf = make_linear_model(request.param)
    save(hf, folder)
    with engine(folder, enable_prefix_caching=False) as llm:
        reference = generate(llm, make_prompts(), one_by_one=True)
    return Case(folder, hf, reference, has_attention=True)


@pytest.mark.parametrize(
    ("model_type", "layout", "conv_order"),
    [
        pytest.param(*row, marks=[] if row in COVERING else pytest.mark.slow)
        for row in (
            (model_type, layout, order)
            for model_type in CLASSES
            for layout in (BLOCKS_OUTERMOST if model_type == "kimi_linear" else LAYOUTS)
            for order in ("SD", "DS")
        )
    ],
)
def test_in_every_layout(model_type, layout, conv_order, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_KV_CACHE_DEBUG", "1")
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", conv_order)
    hf = make_linear_model(model_type)
    with engine(save(hf, tmp_path), **KEEPS_STATES) as llm:
        assert_equals_transformers(generate(llm, make_prompts()), hf)


@pytest.mark.parametrize(("model_type", "layout", "reason"), REFUSED)
def test_other_layouts_are_refused_with_the_reason(
    model_type, layout, reason, tmp_path, monkeypatch
):
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    save(make_linear_model(model_type), tmp_path)
    with pytest.raises(ConfigError, match=f"{layout} .*{reason}"), engine(tmp_path, **KEEPS_STATES):
        pass
