"""Qwen3 gives the logits of transformers, norms over heads included."""

import pytest

from tests.models.checkpoints import make_hf_model, save
from tests.models.harness import TOKENS, PagedModel, make_config
from tests.models.test_llama import BACKENDS, assert_logits_equal, reference

VARIANTS = {
    "plain": {"head_dim": 16},
    "tied": {"head_dim": 16, "tie_word_embeddings": True},
    "wide heads": {"head_dim": 48},
    "biases": {"head_dim": 16, "attention_bias": True},
    "window": {
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_qwen3_equals_transformers(variant, backend, tmp_path):
    hf = make_hf_model("qwen3", **VARIANTS[variant])
    paged = PagedModel(make_config(save(hf, tmp_path), backend=backend))
    assert_logits_equal(paged.logits(TOKENS), reference(hf))


def test_one_token_at_a_time(tmp_path):
    hf = make_hf_model("qwen3", head_dim=16)
    paged = PagedModel(make_config(save(hf, tmp_path)))
    assert_logits_equal(paged.logits(TOKENS, chunk=1), reference(hf))
