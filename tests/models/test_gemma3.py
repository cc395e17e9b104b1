"""Gemma 3 gives the logits of transformers: norms over heads, a RoPE for each kind of layer."""

import json

import pytest
import torch
import transformers

from tests.models.checkpoints import KINDS, SHAPE, WINDOW, make_hf_model, save
from tests.models.harness import TOKENS, PagedModel, make_config
from tests.models.test_llama import BACKENDS, assert_logits_equal, reference
from vllm.errors import ConfigError

VARIANTS = {
    "plain": {},
    "capped logits": {"final_logit_softcapping": 4.0},
    "biases": {"attention_bias": True},
    "every second layer full": {"sliding_window_pattern": 2},
    "all windows": {"sliding_window_pattern": 7},
}
TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gemma3_equals_transformers(variant, backend, tmp_path):
    hf = make_hf_model("gemma3_text", **VARIANTS[variant])
    paged = PagedModel(make_config(save(hf, tmp_path), backend=backend))
    assert_logits_equal(paged.logits(TOKENS), reference(hf))


def test_kinds_of_layers_share_a_rope_each(tmp_path):
    paged = PagedModel(make_config(save(make_hf_model("gemma3_text"), tmp_path)))
    windows = [layer.sliding_window for layer in paged.layers.values()]
    assert windows == [WINDOW, WINDOW, None] * 2
    ropes = [layer.self_attn.rotary_emb for layer in paged.model.model.layers]
    assert ropes[0] is ropes[1] is ropes[4]
    assert ropes[2] is ropes[5] is not ropes[0]


def test_the_older_config_form_means_the_same(tmp_path):
    hf = make_hf_model("gemma3_text")
    save(hf, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        del values[name]
    values |= {
        "sliding_window_pattern": 3,
        "rope_theta": 100000.0,
        "rope_local_base_freq": 1000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert_logits_equal(PagedModel(make_config(tmp_path)).logits(TOKENS), reference(hf))


def test_too_few_layer_types_are_told(tmp_path):
    save(make_hf_model("gemma3_text"), tmp_path)
    with pytest.raises(ConfigError, match="layer_types names 1 layers, but num_hidden_layers is 6"):
        make_config(tmp_path, hf_overrides={"layer_types": ["full_attention"]})


def test_the_language_model_out_of_one_that_sees(tmp_path):
    text = transformers.Gemma3TextConfig(**{**SHAPE, **KINDS["gemma3_text"]})
    vision = transformers.SiglipVisionConfig(**TINY_VISION)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=198
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    hf = transformers.Gemma3ForConditionalGeneration(config).eval()
    save(hf, tmp_path)
    paged = PagedModel(make_config(tmp_path))
    assert type(paged.model).__name__ == "Gemma3ForConditionalGeneration"
    assert_logits_equal(paged.logits(TOKENS), reference(hf))
