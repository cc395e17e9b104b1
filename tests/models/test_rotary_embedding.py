"""Every rotary scaling gives the logits of transformers; unknown ones are refused by name."""

import json

import pytest
import torch

from tests.models.checkpoints import make_hf_model, save
from tests.models.harness import VOCAB, PagedModel, make_config
from tests.models.test_llama import assert_logits_equal, reference
from vllm.errors import ConfigError, UnsupportedError
from vllm.model_executor.layers.rotary_embedding import get_rope

TOKENS = torch.randint(0, VOCAB, (120,), generator=torch.Generator().manual_seed(4)).tolist()
THETA = {"rope_theta": 5000.0}
SCALINGS = {
    "default": THETA,
    "linear": {**THETA, "rope_type": "linear", "factor": 2.5},
    "dynamic, not reached": {**THETA, "rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        **THETA,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        **THETA,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn with magnitudes": {
        **THETA,
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    "yarn with a given attention factor": {
        **THETA,
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 0.9,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scaling_equals_transformers(name, tmp_path):
    hf = make_hf_model("llama", rope_parameters=dict(SCALINGS[name]))
    save(hf, tmp_path)
    paged = PagedModel(make_config(tmp_path))
    assert_logits_equal(paged.logits(TOKENS, chunk=50), reference(hf, TOKENS))


@pytest.mark.parametrize("name", [n for n in SCALINGS if n != "default"])
def test_the_older_config_form_means_the_same(name, tmp_path):
    hf = make_hf_model("llama", rope_parameters=dict(SCALINGS[name]))
    save(hf, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    values["rope_scaling"] = rope
    (tmp_path / "config.json").write_text(json.dumps(values))
    paged = PagedModel(make_config(tmp_path))
    assert_logits_equal(paged.logits(TOKENS), reference(hf, TOKENS))


def test_dynamic_scaling_is_that_of_the_longest_request(tmp_path):
    """transformers grows the base with the sequence; keys in a cache need one base for all."""
    rope = {**THETA, "rope_type": "dynamic", "factor": 4.0}
    hf = make_hf_model("llama", rope_parameters=rope, max_position_embeddings=64)
    paged = PagedModel(make_config(save(hf, tmp_path), max_model_len=len(TOKENS)))
    assert_logits_equal(paged.logits(TOKENS), reference(hf, TOKENS))


def test_frequency_factors_are_what_llama3_scaling_computes():
    scaled = get_rope(16, 64, rope_parameters=SCALINGS["llama3"])
    plain = get_rope(16, 64, rope_parameters=THETA)
    angle = torch.atan2(*reversed(scaled.cos_sin_cache[1].chunk(2)))
    factors = torch.atan2(*reversed(plain.cos_sin_cache[1].chunk(2))) / angle
    given = {**THETA, "rope_type": "frequency_factors", "factors": factors.tolist()}
    again = get_rope(16, 64, rope_parameters=given)
    torch.testing.assert_close(again.cos_sin_cache, scaled.cos_sin_cache, atol=1e-4, rtol=1e-4)


def test_layers_of_a_model_share_one_table():
    assert get_rope(16, 64, rope_parameters=THETA) is get_rope(16, 64, rope_parameters=dict(THETA))


def test_the_table_is_float32_in_a_sixteen_bit_model():
    torch.set_default_dtype(torch.bfloat16)
    try:
        rope = get_rope(16, 4096, rope_parameters=THETA)
    finally:
        torch.set_default_dtype(torch.float32)
    assert rope.cos_sin_cache.dtype == torch.float32
    assert len(rope.cos_sin_cache[:, 0].unique()) > 4000


def test_rotation_keeps_positions_relative():
    rope = get_rope(16, 200, is_neox_style=False)
    query, key = torch.randn(2, 1, 16)
    scores = []
    for shift in (0, 90):
        q, k = query.clone(), key.clone()
        rope(torch.tensor([7 + shift]), q)
        rope(torch.tensor([2 + shift]), k)
        scores.append((q @ k.T).item())
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_a_partial_factor_leaves_the_rest_of_a_head_alone():
    partial = get_rope(16, 64, rope_parameters={**THETA, "partial_rotary_factor": 0.5})
    whole = get_rope(8, 64, rope_parameters=THETA)
    heads = torch.randn(3, 2, 16)
    positions = torch.tensor([0, 5, 63])
    got, rotated = heads.clone(), heads[..., :8].reshape(3, 16).clone()
    partial(positions, got.view(3, 32))
    whole(positions, rotated)
    assert torch.equal(got[..., 8:], heads[..., 8:])
    torch.testing.assert_close(got[..., :8], rotated.view(3, 2, 8))


def test_an_unknown_scaling_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"rope_type 'longrope' is not supported.*yarn"):
        get_rope(16, 64, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4})


def test_a_missing_parameter_is_named():
    with pytest.raises(ConfigError, match="'llama3' needs low_freq_factor, high_freq_factor"):
        get_rope(16, 64, rope_parameters={"rope_type": "llama3", "factor": 8.0})


@pytest.mark.parametrize(("head_size", "share"), [(7, 1.0), (10, 0.5), (8, 0.1), (8, 1.5)])
def test_dimensions_that_make_no_pairs_are_refused(head_size, share):
    with pytest.raises(ConfigError, match="RoPE turns pairs"):
        get_rope(head_size, 16, rope_parameters={"partial_rotary_factor": share})
