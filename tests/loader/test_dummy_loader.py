"""Random weights are the same for the same seed, and say something."""

import torch

from tests.models.checkpoints import make_hf_model
from tests.models.harness import TOKENS, PagedModel, make_config


def dummy(tmp_path, **options):
    config = make_hf_model("llama", **options.pop("shape", {})).config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
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
