"""Random weights are the same for the same seed, and say something."""

import subprocess
import sys

import pytest
import torch

from tests.models.checkpoints import CLASSES, make_hf_model
from tests.models.harness import TOKENS, PagedModel, make_config
from tests.models.linear_attention_checkpoints import CLASSES as LINEAR_CLASSES
from tests.models.linear_attention_checkpoints import make_linear_model
from tests.models.state_checkpoints import CLASSES as STATE_CLASSES
from tests.models.state_checkpoints import make_state_model
from tests.models.test_tensor_parallel import ROOT
from vllm.model_executor.layers.weight_loading import make_parameter, whole_shape

MAKERS = {
    **dict.fromkeys(CLASSES, make_hf_model),
    **dict.fromkeys(STATE_CLASSES, make_state_model),
    **dict.fromkeys(LINEAR_CLASSES, make_linear_model),
}
NEEDS_THE_ENGINE = ("deepseek_v4",)


def write_config(folder, model_type):
    model = MAKERS[model_type](model_type)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return folder


def logits_of(folder, **options):
    return PagedModel(make_config(folder, load_format="dummy", **options)).logits(TOKENS)


def dummy(tmp_path, model_type="llama", **options):
    return logits_of(write_config(tmp_path, model_type), **options)


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


@pytest.mark.parametrize("model_type", sorted({*MAKERS} - {*NEEDS_THE_ENGINE}))
def test_every_architecture(model_type, tmp_path):
    logits = dummy(tmp_path, model_type)
    assert logits.isfinite().all()
    assert logits.std() > 1e-4


def test_the_shape_of_a_whole_tensor_is_its_loaders():
    param = make_parameter(3, 5)
    assert whole_shape(param, None) == (3, 5)
    bare = torch.nn.Parameter(torch.zeros(4))
    assert whole_shape(bare, None) == (4,)


def test_two_ranks_have_the_weights_of_one(tmp_path):
    """Every architecture; experts, states, latents and heads are cut each in its own way."""
    kinds = sorted({*MAKERS} - {*NEEDS_THE_ENGINE})
    folders = [write_config(tmp_path / kind, kind) for kind in kinds]
    command = [sys.executable, "-m", "tests.models.tensor_parallel_worker", "--dummy"]
    rest = [str(tmp_path / "rendezvous"), str(tmp_path / "out"), *map(str, folders)]
    ranks = [subprocess.Popen([*command, str(r), "2", *rest], cwd=ROOT) for r in range(2)]
    try:
        expected = [logits_of(folder) for folder in folders]
        assert [rank.wait(timeout=600) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    for rank in range(2):
        saved = torch.load(tmp_path / f"out.{rank}")["logits"]
        for kind, ours, theirs in zip(kinds, saved, expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6), kind
