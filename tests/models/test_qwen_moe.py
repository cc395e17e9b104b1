"""Qwen2-MoE and Qwen3-MoE give the logits of transformers, whichever layers have experts."""

import pytest

from tests.loader.test_default_loader import edit, load_error
from tests.models.checkpoints import WINDOW, make_hf_model, save
from tests.models.harness import TOKENS, PagedModel, make_config
from tests.models.test_llama import BACKENDS, assert_logits_equal, reference
from vllm.model_executor.models.qwen2_moe import QwenSparseMoE

QWEN2_VARIANTS = {
    "experts in every second layer": {},
    "experts everywhere": {"decoder_sparse_step": 1},
    "weights that sum to one": {"norm_topk_prob": True},
    "no window": {"use_sliding_window": False},
    "no biases": {"qkv_bias": False},
    "some layers dense": {"decoder_sparse_step": 1, "mlp_only_layers": [2]},
}
QWEN3_VARIANTS = {
    "some layers dense": {},
    "weights as they are": {"norm_topk_prob": False},
    "experts in every second layer": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "window": {"use_sliding_window": True, "sliding_window": WINDOW},
    "biases": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
}


def sparse_layers(paged):
    return [isinstance(layer.mlp, QwenSparseMoE) for layer in paged.model.model.layers]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", QWEN2_VARIANTS)
def test_qwen2_moe_equals_transformers(variant, backend, tmp_path):
    hf = make_hf_model("qwen2_moe", **QWEN2_VARIANTS[variant])
    paged = PagedModel(make_config(save(hf, tmp_path), backend=backend))
    assert_logits_equal(paged.logits(TOKENS), reference(hf))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", QWEN3_VARIANTS)
def test_qwen3_moe_equals_transformers(variant, backend, tmp_path):
    hf = make_hf_model("qwen3_moe", **QWEN3_VARIANTS[variant])
    paged = PagedModel(make_config(save(hf, tmp_path), backend=backend))
    assert_logits_equal(paged.logits(TOKENS), reference(hf))


def test_which_layers_have_experts(tmp_path):
    two = PagedModel(make_config(save(make_hf_model("qwen2_moe"), tmp_path / "2")))
    assert sparse_layers(two) == [False, True, False, True]
    three = PagedModel(make_config(save(make_hf_model("qwen3_moe"), tmp_path / "3")))
    assert sparse_layers(three) == [True, False, True, True, False]


def test_windows_alternate_as_qwen2_moe_says(tmp_path):
    paged = PagedModel(make_config(save(make_hf_model("qwen2_moe"), tmp_path)))
    assert [layer.sliding_window for layer in paged.layers.values()] == [WINDOW, None] * 2


def test_missing_experts_are_listed_by_their_checkpoint_names(tmp_path):
    save(make_hf_model("qwen2_moe"), tmp_path)
    prefix = "model.layers.3.mlp"
    names = [
        f"{prefix}.experts.2.down_proj.weight",
        f"{prefix}.shared_expert.up_proj.weight",
        f"{prefix}.shared_expert_gate.weight",
    ]

    def remove(tensors):
        for name in names:
            del tensors[name]

    edit(tmp_path, remove)
    message = load_error(tmp_path)
    assert "3 missing: " in message
    for name in names:
        assert name in message
