"""Gemma 2 gives the logits of transformers: soft caps, norms around branches, mixed windows."""

import pytest
import torch

from tests.models.checkpoints import WINDOW, make_hf_model, save
from tests.models.harness import TOKENS, PagedModel, make_config
from tests.models.test_llama import BACKENDS, assert_logits_equal, reference
from vllm.errors import UnsupportedError
from vllm.model_executor.model_loader import get_model
from vllm.transformers_utils.hf_config import fill_in_config

VARIANTS = {
    "plain": {},
    "no soft caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "own head": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True},
    "exact gelu": {"hidden_activation": "gelu"},
    "all windows": {"layer_types": ["sliding_attention"] * 4},
    "one kv head": {"num_key_value_heads": 1},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gemma2_equals_transformers(variant, backend, tmp_path):
    hf = make_hf_model("gemma2", **VARIANTS[variant])
    paged = PagedModel(make_config(save(hf, tmp_path), backend=backend))
    assert_logits_equal(paged.logits(TOKENS), reference(hf))


def test_a_full_layer_between_windowed_ones_stays_full(tmp_path):
    paged = PagedModel(make_config(save(make_hf_model("gemma2"), tmp_path)))
    assert [layer.sliding_window for layer in paged.layers.values()] == [WINDOW, None] * 2


def test_the_scale_of_embeddings_is_rounded_as_they_are(tmp_path):
    """The root of 96 is 9.798 in float32 and 9.8125 in bfloat16."""
    hf = make_hf_model("gemma2").to(torch.bfloat16)
    model = get_model(make_config(save(hf, tmp_path), dtype="bfloat16"))
    ids = torch.tensor(TOKENS)
    assert torch.equal(model.embed_input_ids(ids), hf.model.embed_tokens(ids))


def test_sixteen_bit_norms_come_close(tmp_path):
    hf = make_hf_model("gemma2", initializer_range=0.05)
    paged = PagedModel(make_config(save(hf, tmp_path), dtype="bfloat16"))
    assert torch.cosine_similarity(paged.logits(TOKENS), reference(hf)).min() > 0.99


def test_an_encoder_is_refused():
    with pytest.raises(UnsupportedError, match="use_bidirectional_attention makes an encoder"):
        fill_in_config({"model_type": "gemma2", "use_bidirectional_attention": True})


def test_an_unknown_activation_is_refused(tmp_path):
    save(make_hf_model("gemma2"), tmp_path)
    config = make_config(tmp_path, hf_overrides={"hidden_activation": "relu6"})
    with pytest.raises(UnsupportedError, match="the activation 'relu6' is not supported"):
        get_model(config)
