"""Mixtral gives the logits of transformers; its experts load in every form."""

import pytest
import torch

from tests.loader.test_default_loader import edit, load_error
from tests.models.checkpoints import make_hf_model, save
from tests.models.harness import TOKENS, PagedModel, make_config
from tests.models.test_llama import BACKENDS, assert_logits_equal, reference

VARIANTS = {
    "plain": {},
    "window": {"sliding_window": 20},
    "every expert": {"num_experts_per_tok": 5},
    "narrow experts": {"intermediate_size": 40},
}


@pytest.fixture
def hf():
    return make_hf_model("mixtral")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_mixtral_equals_transformers(variant, backend, tmp_path):
    hf = make_hf_model("mixtral", **VARIANTS[variant])
    paged = PagedModel(make_config(save(hf, tmp_path), backend=backend))
    assert_logits_equal(paged.logits(TOKENS), reference(hf))


def test_one_token_at_a_time(hf, tmp_path):
    paged = PagedModel(make_config(save(hf, tmp_path)))
    assert_logits_equal(paged.logits(TOKENS, chunk=1), reference(hf))


def test_shards(hf, tmp_path):
    """A layer's experts may lie in different files."""
    save(hf, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 10
    assert_logits_equal(PagedModel(make_config(tmp_path)).logits(TOKENS), reference(hf))


def test_experts_in_one_tensor(hf, tmp_path):
    save(hf, tmp_path)

    def join(tensors):
        for layer in range(3):
            old, new = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
            w1, w2, w3 = (
                torch.stack([tensors.pop(f"{old}.experts.{e}.w{n}.weight") for e in range(5)])
                for n in (1, 2, 3)
            )
            tensors[f"{new}.experts.gate_up_proj"] = torch.cat((w1, w3), 1)
            tensors[f"{new}.experts.down_proj"] = w2
            tensors[f"{new}.gate.weight"] = tensors.pop(f"{old}.gate.weight")

    edit(tmp_path, join)
    assert_logits_equal(PagedModel(make_config(tmp_path)).logits(TOKENS), reference(hf))


def test_missing_experts_are_listed_by_their_checkpoint_names(hf, tmp_path):
    save(hf, tmp_path)
    prefix = "model.layers.1.block_sparse_moe"
    names = [f"{prefix}.experts.{part}.weight" for part in ("3.w1", "4.w2")]
    names.append(f"{prefix}.gate.weight")

    def remove(tensors):
        for name in names:
            del tensors[name]

    edit(tmp_path, remove)
    message = load_error(tmp_path)
    assert "3 missing: " in message
    for name in names:
        assert name in message


def test_an_expert_too_many_is_unexpected(hf, tmp_path):
    save(hf, tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.5.w1.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: torch.zeros(160, 96)}))
    assert f"1 unexpected: {name}" in load_error(tmp_path)


def test_a_misshaped_expert_is_told_once(hf, tmp_path):
    save(hf, tmp_path)
    name = "model.layers.2.block_sparse_moe.experts.0.w2.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: torch.zeros(96, 161)}))
    message = load_error(tmp_path)
    assert f"1 of a wrong shape: {name} has shape [96, 161], expected [96, 160]" in message
    assert "missing" not in message


def test_experts_are_packed_and_released(hf, tmp_path):
    model = PagedModel(make_config(save(hf, tmp_path))).model
    left = {name for name, _ in model.named_parameters()}
    assert all(name.endswith("norm.weight") for name in left)
