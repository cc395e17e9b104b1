"""Qwen3-Next, LFM2 and MiniMax-Text-01 give the logits of transformers, whole and in chunks."""

import pytest
import torch

from tests.models.checkpoints import make_hf_model, save
from tests.models.harness import TOKENS, PagedModel, make_config
from tests.models.test_llama import BACKENDS, assert_logits_equal, reference

VARIANTS = {
    "qwen3_next": {
        "plain": {},
        "a value head for each key head": {"linear_num_value_heads": 2},
        "heads of equal size": {"linear_value_head_dim": 16},
        "wide kernel": {"linear_conv_kernel_dim": 7},
        "experts everywhere": {"mlp_only_layers": []},
        "biases": {"attention_bias": True},
    },
    "lfm2": {
        "plain": {},
        "biases": {"conv_bias": True},
        "wide kernel": {"conv_L_cache": 5},
        "inner size as it is": {"block_auto_adjust_ff_dim": False},
        "multiple of 48": {"block_ffn_dim_multiplier": 1.3, "block_multiple_of": 48},
        "own head": {"tie_word_embeddings": False},
    },
    "lfm2_moe": {
        "plain": {},
        "no bias": {"use_expert_bias": False},
        "weights as they are": {"norm_topk_prob": False, "routed_scaling_factor": 1.7},
    },
    "minimax": {
        "plain": {},
        "as many heads as a power of two": {"num_attention_heads": 4},
        "three experts a token": {"num_experts_per_tok": 3},
    },
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("model_type", "variant"), [(kind, name) for kind in VARIANTS for name in VARIANTS[kind]]
)
def test_logits_equal_transformers(model_type, variant, backend, tmp_path):
    hf = make_hf_model(model_type, **VARIANTS[model_type][variant])
    paged = PagedModel(make_config(save(hf, tmp_path), backend=backend))
    assert_logits_equal(paged.logits(TOKENS), reference(hf))


@pytest.mark.parametrize("chunk", [1, 9, 33])
@pytest.mark.parametrize("model_type", VARIANTS)
def test_chunks_continue_states(model_type, chunk, tmp_path):
    hf = make_hf_model(model_type)
    paged = PagedModel(make_config(save(hf, tmp_path)))
    assert_logits_equal(paged.logits(TOKENS, chunk=chunk), reference(hf))


@pytest.mark.parametrize("model_type", VARIANTS)
def test_requests_of_a_batch_have_states_of_their_own(model_type, tmp_path):
    hf = make_hf_model(model_type)
    paged = PagedModel(make_config(save(hf, tmp_path)))
    got = {row: [] for row in range(3)}
    for sizes in ({0: 31, 1: 5}, {0: 2, 1: 60, 2: 33}, {0: 1, 1: 1, 2: 1}, {0: 36, 2: 1}):
        chunks = {
            row: TOKENS[paged.computed[row] : paged.computed[row] + size]
            for row, size in sizes.items()
        }
        for row, logits in paged.step(chunks).items():
            got[row].append(logits)
    expected = reference(hf)
    for parts in got.values():
        ours = torch.cat(parts)
        assert_logits_equal(ours, expected[: len(ours)])
