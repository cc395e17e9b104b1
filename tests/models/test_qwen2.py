"""Qwen2 gives the logits of transformers, with windows from some layer on."""

import pytest

from tests.models.checkpoints import make_hf_model, save
from tests.models.harness import TOKENS, PagedModel, make_config
from tests.models.test_llama import BACKENDS, assert_logits_equal, reference

VARIANTS = {
    "plain": ({}, [None, None, None]),
    "tied": ({"tie_word_embeddings": True}, [None, None, None]),
    "window off": ({"sliding_window": 7, "max_window_layers": 0}, [None, None, None]),
    "window in the last layer": (
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
        [None, None, 9],
    ),
    "window everywhere": (
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
        [9, 9, 9],
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_qwen2_equals_transformers(variant, backend, tmp_path):
    overrides, windows = VARIANTS[variant]
    hf = make_hf_model("qwen2", **overrides)
    paged = PagedModel(make_config(save(hf, tmp_path), backend=backend))
    assert_logits_equal(paged.logits(TOKENS), reference(hf))
    assert [layer.sliding_window for layer in paged.layers.values()] == windows
