"""Random weights are the same for the same seed, and say something."""

import pytest
import torch

from tests.models.checkpoints import make_hf_model
from tests.models.harness import TOKENS, PagedModel, make_config


def dummy(tmp_path, model_type="llama", **options):
    model = make_hf_model(model_type)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    return PagedModel(make_config(tmp_path, load_format="dummy", **options)).logits(TOKENS)


def test_the_same_seed_gives_the_same_weights(tmp_path):
    first, again = dummy(tmp_path), dummy(tmp_path)
    assert torch.equal(first, again)
    assert not torch.equal(first, dummy(tmp_path, seed=1))


def test_the_weights_make_a_difference(tmp_path):
    logits = dummy(tmp_path)
    assert logits.isfinite().all()
    assert logits.std() > 0.01
    assert len(logits.argmax(-1).unique()) > 5


def test_sixteen_bit(tmp_path):
    assert dummy(tmp_path, dtype="bfloat16").isfinite().all()


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen2_moe", "gpt_oss", "llama4_text"])
def test_experts_sinks_and_all_kinds_of_norms(model_type, tmp_path):
    logits = dummy(tmp_path, model_type)
    assert logits.isfinite().all()
    assert len(logits.argmax(-1).unique()) > 5
