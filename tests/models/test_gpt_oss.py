"""gpt-oss gives the logits of transformers, from plain weights and from MXFP4."""

import json

import pytest
import torch

from tests.loader.test_default_loader import edit, load_error
from tests.models.checkpoints import WINDOW, make_hf_model, save
from tests.models.harness import TOKENS, PagedModel, make_config
from tests.models.parity import engine
from tests.models.test_llama import BACKENDS, assert_logits_equal, reference
from tests.models.test_mxfp4 import GROUP, expand_by_definition, quantise
from vllm.errors import UnsupportedError

VARIANTS = {
    "plain": {},
    "looser clamp": {"swiglu_limit": 7.0},
    "no biases in attention": {"attention_bias": False},
    "all full": {"layer_types": ["full_attention"] * 4},
}
EXPERTS = ("gate_up_proj", "down_proj")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gpt_oss_equals_transformers(variant, backend, tmp_path):
    hf = make_hf_model("gpt_oss", **VARIANTS[variant])
    paged = PagedModel(make_config(save(hf, tmp_path), backend=backend))
    assert_logits_equal(paged.logits(TOKENS), reference(hf))


def test_windows_alternate(tmp_path):
    paged = PagedModel(make_config(save(make_hf_model("gpt_oss"), tmp_path)))
    assert [layer.sliding_window for layer in paged.layers.values()] == [WINDOW, None] * 2


@torch.no_grad()
def test_sinks_take_part(tmp_path):
    hf = make_hf_model("gpt_oss")
    before = reference(hf)
    for layer in hf.model.layers:
        layer.self_attn.sinks.add_(3)
    assert not torch.allclose(reference(hf), before, atol=0.1)
    assert_logits_equal(PagedModel(make_config(save(hf, tmp_path))).logits(TOKENS), reference(hf))


def test_sixteen_bit_weights_come_close(tmp_path):
    hf = make_hf_model("gpt_oss", initializer_range=0.05)
    paged = PagedModel(make_config(save(hf, tmp_path), dtype="bfloat16"))
    # Rounding may send a token to another expert where two are nearly as good.
    assert torch.cosine_similarity(paged.logits(TOKENS), reference(hf)).quantile(0.2) > 0.99


def save_as_mxfp4(hf, folder):
    """``hf`` with experts that MXFP4 can hold, saved as it would be released."""
    stored = {}
    with torch.no_grad():
        for index, layer in enumerate(hf.model.layers):
            for name in EXPERTS:
                param = getattr(layer.mlp.experts, name)
                blocks, scales = quantise(param.transpose(1, 2))
                param.copy_(expand_by_definition(blocks, scales).transpose(1, 2))
                prefix = f"model.layers.{index}.mlp.experts.{name}"
                stored |= {f"{prefix}_blocks": blocks, f"{prefix}_scales": scales}
    save(hf, folder)

    def replace(tensors):
        for name in [name for name in tensors if name.endswith(EXPERTS)]:
            del tensors[name]
        tensors.update(stored)

    edit(folder, replace)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(values))


@pytest.fixture
def mxfp4(tmp_path):
    # Every input of an expert is a whole number of groups.
    hf = make_hf_model("gpt_oss", hidden_size=96, intermediate_size=2 * GROUP)
    save_as_mxfp4(hf, tmp_path)
    return hf, tmp_path


def test_mxfp4_is_expanded_while_it_is_loaded(mxfp4):
    hf, folder = mxfp4
    assert_logits_equal(PagedModel(make_config(folder)).logits(TOKENS), reference(hf))


def test_an_engine_takes_mxfp4(mxfp4):
    _, folder = mxfp4
    with engine(folder) as llm:
        assert llm.generate([{"prompt_token_ids": TOKENS}], use_tqdm=False)[0].outputs[0].token_ids


def test_blocks_without_scales_are_told(mxfp4):
    _, folder = mxfp4
    stem = "model.layers.2.mlp.experts.down_proj"
    edit(folder, lambda tensors: tensors.pop(f"{stem}_scales"))
    message = load_error(folder)
    assert f"1 missing: {stem}" in message
    assert f"1 unexpected: {stem}_blocks" in message


def test_mxfp4_of_another_model_is_refused(tmp_path):
    save(make_hf_model("mixtral"), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with (
        pytest.raises(UnsupportedError, match=r"its weights are quantised \(mxfp4\)"),
        engine(tmp_path),
    ):
        pass
