"""Models with state layers give the logits of transformers, in every variant of their layers."""

import json

import pytest
import torch

from tests.loader.test_default_loader import edit, load_error
from tests.models.checkpoints import save
from tests.models.harness import TOKENS, PagedModel, make_config
from tests.models.state_checkpoints import make_state_model
from tests.models.test_llama import assert_logits_equal, reference
from vllm.errors import VLLMValidationError

NO_EXPERTS = ["linear_attention", "mlp", "full_attention"] * 3
VARIANTS = {
    "mamba": {
        "plain": {},
        "biases": {"use_bias": True},
        "no conv bias": {"use_conv_bias": False},
        "untied": {"tie_word_embeddings": False},
        "short kernel": {"conv_kernel": 2},
        "wide": {"expand": 3, "time_step_rank": 7},
        "stream in the model's dtype": {"residual_in_fp32": False},
    },
    "falcon_mamba": {"plain": {}, "eps": {"mixer_rms_eps": 0.5}},
    "mamba2": {
        "plain": {},
        "biases": {"use_bias": True},
        "no conv bias": {"use_conv_bias": False},
        "tied": {"tie_word_embeddings": True},
        "one group": {"n_groups": 1},
        "group of each head": {"n_groups": 8},
        "bounded steps": {"time_step_limit": (0.4, 1.2)},
        "eps": {"layer_norm_epsilon": 0.3},
    },
    "bamba": {
        "plain": {},
        "biases": {"attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True},
        "head width left open": {"mamba_d_head": "auto"},
        "tied": {"tie_word_embeddings": True},
    },
    "granitemoehybrid": {
        "plain": {},
        "rope": {"position_embedding_type": "rope"},
        "no experts": {"num_local_experts": 0},
    },
    "nemotron_h": {
        "plain": {},
        "biases": {"use_bias": True, "mlp_bias": True, "layers_block_type": NO_EXPERTS},
        "eps": {"layer_norm_epsilon": 0.3},
        "experts of a latent": {"moe_latent_size": 24, "mlp_bias": True},
        "weights as they are": {"norm_topk_prob": False, "n_group": 1, "topk_group": 1},
    },
    "jamba": {
        "plain": {},
        "one expert": {"num_experts": 1, "num_experts_per_tok": 1},
        "biases": {"mamba_proj_bias": True},
    },
    "falcon_h1": {
        "plain": {},
        "norm before the gate": {"mamba_rms_norm": True},
        "norm after the gate": {"mamba_rms_norm": True, "mamba_norm_before_gate": False},
        "biases": {"mamba_proj_bias": True, "projectors_bias": True, "attention_bias": True},
        "no multipliers": {"mlp_multipliers": None, "ssm_multipliers": None},
    },
    "zamba2": {
        "plain": {},
        "adapters": {"use_shared_attention_adapter": True},
        "rope": {"use_mem_rope": True},
        "one shared block": {"num_mem_blocks": 1},
        "biases": {"add_bias_linear": True},
    },
}

CASES = [(kind, variant) for kind, variants in VARIANTS.items() for variant in variants]


@pytest.mark.parametrize(("model_type", "variant"), CASES)
def test_logits_equal_transformers(model_type, variant, tmp_path):
    hf = make_state_model(model_type, **VARIANTS[model_type][variant])
    paged = PagedModel(make_config(save(hf, tmp_path)))
    assert_logits_equal(paged.logits(TOKENS), reference(hf))


@pytest.mark.parametrize("model_type", VARIANTS)
@pytest.mark.parametrize("chunk", [1, 9])
def test_chunks_continue_from_the_cached_state(model_type, chunk, tmp_path):
    hf = make_state_model(model_type)
    paged = PagedModel(make_config(save(hf, tmp_path)))
    assert_logits_equal(paged.logits(TOKENS, chunk=chunk), reference(hf))


@pytest.mark.parametrize("model_type", VARIANTS)
def test_a_batch_keeps_its_states_apart(model_type, tmp_path):
    hf = make_state_model(model_type)
    paged = PagedModel(make_config(save(hf, tmp_path)))
    texts = {0: TOKENS[:30], 2: TOKENS[10:11], 3: TOKENS[5:45]}
    for row, logits in paged.step(texts).items():
        assert_logits_equal(logits, reference(hf, texts[row]))
    more = {3: TOKENS[45:46], 0: TOKENS[30:33], 2: TOKENS[11:40]}
    for row, logits in paged.step(more).items():
        whole = reference(hf, texts[row] + more[row])
        assert_logits_equal(logits, whole[len(texts[row]) :])


def test_what_experts_of_nemotron_miss_has_its_checkpoint_names(tmp_path):
    save(make_state_model("nemotron_h", moe_latent_size=24), tmp_path)
    gone = [
        "layers.2.mixer.experts.5.up_proj.weight",
        "layers.7.mixer.experts.0.down_proj.weight",
        "layers.7.mixer.gate.e_score_correction_bias",
        "layers.7.mixer.fc2_latent_proj.weight",
        "layers.7.mixer.shared_experts.up_proj.weight",
    ]

    def damage(tensors):
        for name in gone:
            del tensors[next(full for full in tensors if full.endswith(name))]
        tensors["backbone.layers.2.mixer.experts.8.up_proj.weight"] = torch.zeros(40, 24)
        tensors["mtp.layers.0.mixer.up_proj.weight"] = torch.zeros(2, 2)

    edit(tmp_path, damage)
    message = load_error(tmp_path)
    assert "5 missing: " in message
    for name in gone:
        assert f"backbone.{name}" in message
    assert "1 unexpected: backbone.layers.2.mixer.experts.8.up_proj.weight" in message


def test_nemotron_by_the_names_of_its_releases(tmp_path):
    """Kinds of layers as one word; layers that guess further tokens are passed over."""
    hf = make_state_model("nemotron_h")
    save(hf, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for name in ("layers_block_type", "layer_types"):
        values.pop(name, None)
    values |= {"hybrid_override_pattern": "M-EM*-ME*", "num_hidden_layers": 9}
    (tmp_path / "config.json").write_text(json.dumps(values))
    edit(tmp_path, lambda tensors: tensors.update({"mtp.norm.weight": torch.zeros(1)}))
    assert_logits_equal(PagedModel(make_config(tmp_path)).logits(TOKENS), reference(hf))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers_block_type": ["linear_attention", "hybrid"]}, "kind 'hybrid' are not known in"),
        ({"mlp_hidden_act": "gelu"}, "activation 'gelu' is not supported; these are: relu2"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 must be between 1 and the number"),
    ],
)
def test_what_nemotron_does_not_have_is_said(values, message, tmp_path):
    save(make_state_model("nemotron_h"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(VLLMValidationError, match=message):
        PagedModel(make_config(tmp_path))
