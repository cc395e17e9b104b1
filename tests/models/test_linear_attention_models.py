"""Models with linear attention and short convolutions give the logits of transformers: Qwen3-Next,
LFM2, Kimi Linear and MiniMax-Text-01, whole, in chunks and in batches.
"""

import json

import pytest
import torch

from tests.loader.test_default_loader import edit, load_error
from tests.models.checkpoints import save
from tests.models.harness import TOKENS, PagedModel, make_config
from tests.models.linear_attention_checkpoints import make_linear_model
from tests.models.test_llama import BACKENDS, assert_logits_equal, reference
from vllm.errors import VLLMValidationError

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
    "kimi_linear": {
        "plain": {},
        "low-rank queries": {"q_lora_rank": 24},
        "weights as they are": {"norm_topk_prob": False, "n_group": 1, "topk_group": 1},
        "wide kernel": {"linear_conv_kernel_dim": 6},
    },
    "minimax": {
        "plain": {},
        "as many heads as a power of two": {"num_attention_heads": 4},
        "three experts a token": {"num_experts_per_tok": 3},
    },
}


@pytest.mark.parametrize(
    ("model_type", "variant", "backend"),
    [
        (kind, name, backend)
        for kind in VARIANTS
        for name in VARIANTS[kind]
        # Latents have backends of their own.
        for backend in ([None] if kind == "kimi_linear" else BACKENDS)
    ],
)
def test_logits_equal_transformers(model_type, variant, backend, tmp_path):
    hf = make_linear_model(model_type, **VARIANTS[model_type][variant])
    paged = PagedModel(make_config(save(hf, tmp_path), backend=backend))
    assert_logits_equal(paged.logits(TOKENS), reference(hf))


@pytest.mark.parametrize("chunk", [1, 9, 33])
@pytest.mark.parametrize("model_type", VARIANTS)
def test_chunks_continue_states(model_type, chunk, tmp_path):
    hf = make_linear_model(model_type)
    paged = PagedModel(make_config(save(hf, tmp_path)))
    assert_logits_equal(paged.logits(TOKENS, chunk=chunk), reference(hf))


@pytest.mark.parametrize("model_type", VARIANTS)
def test_requests_of_a_batch_have_states_of_their_own(model_type, tmp_path):
    hf = make_linear_model(model_type)
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


def edit_config(folder, change):
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def test_minimax_by_the_names_of_its_first_release(tmp_path):
    hf = make_linear_model("minimax")
    save(hf, tmp_path)

    def rename(values):
        kinds = values.pop("layer_types")
        values["architectures"] = ["MiniMaxText01ForCausalLM"]
        values["model_type"] = "minimax_text_01"
        values["attn_type_list"] = [int(kind == "full_attention") for kind in kinds]
        values["rotary_dim"] = values["head_dim"]
        for part, old in (
            ("full_attn", "full_attention"),
            ("linear_attn", "linear_attention"),
            ("mlp", "mlp"),
        ):
            for which in ("alpha", "beta"):
                values[f"layernorm_{old}_{which}"] = values.pop(f"{part}_{which}_factor")

    edit_config(tmp_path, rename)
    paged = PagedModel(make_config(tmp_path))
    assert type(paged.model).__name__ == "MiniMaxText01ForCausalLM"
    assert_logits_equal(paged.logits(TOKENS), reference(hf))


def test_lfm2_by_older_names(tmp_path):
    hf = make_linear_model("lfm2")
    save(hf, tmp_path)

    def rename(values):
        values["block_ff_dim"] = values.pop("intermediate_size")
        values["tie_embedding"] = values.pop("tie_word_embeddings")
        kinds = values.pop("layer_types")
        values["full_attn_idxs"] = [i for i, kind in enumerate(kinds) if kind == "full_attention"]

    edit_config(tmp_path, rename)
    assert_logits_equal(PagedModel(make_config(tmp_path)).logits(TOKENS), reference(hf))


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("lfm2", {"layer_types": ["conv"]}, "layer_types names 1 layers, but num_hidden_layers"),
        ("qwen3_next", {"layer_types": ["conv"] * 6}, "may be linear_attention or full_attention"),
        ("qwen3_next", {"hidden_act": "gelu"}, "activation 'gelu' of a gated delta net"),
        ("minimax", {"hidden_act": "gelu"}, "activation 'gelu' of lightning attention"),
        ("minimax", {"shared_intermediate_size": 64}, "shared_intermediate_size is not supported"),
        ("minimax", {"postnorm": False}, "postnorm false is not supported"),
    ],
)
def test_what_is_not_there_is_said(model_type, change, message, tmp_path):
    save(make_linear_model(model_type), tmp_path)
    edit_config(tmp_path, lambda values: values.update(change))
    with pytest.raises(VLLMValidationError, match=message):
        PagedModel(make_config(tmp_path))


def test_missing_weights_have_their_checkpoint_names(tmp_path):
    save(make_linear_model("qwen3_next"), tmp_path / "qwen")
    save(make_linear_model("lfm2"), tmp_path / "lfm")
    gone = {
        "qwen": ["linear_attn.in_proj_ba.weight", "linear_attn.conv1d.weight", "linear_attn.A_log"],
        "lfm": ["conv.in_proj.weight", "feed_forward.w3.weight", "operator_norm.weight"],
    }
    for folder, names in gone.items():
        names = [f"model.layers.0.{name}" for name in names]

        def remove(tensors, names=names):
            for name in names:
                del tensors[name]

        edit(tmp_path / folder, remove)
        message = load_error(tmp_path / folder)
        assert "3 missing: " in message
        for name in names:
            assert name in message


def test_layers_that_predict_several_tokens_are_left_out(tmp_path):
    hf = make_linear_model("qwen3_next")
    save(hf, tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"mtp.fc.weight": torch.zeros(2, 2)}))
    assert_logits_equal(PagedModel(make_config(tmp_path)).logits(TOKENS), reference(hf))
