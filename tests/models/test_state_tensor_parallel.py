"""Two processes share out heads, channels and states, and give the logits of one."""

import pytest

from tests.models.state_checkpoints import make_state_model
from tests.models.test_llama import assert_logits_equal, reference
from tests.models.test_tensor_parallel import run_ranks

MODELS = {
    "channels": ("mamba", {"use_bias": True}),
    "groups": ("mamba2", {"use_bias": True}),
    "one group, normed over both ranks": ("mamba2", {"n_groups": 1}),
    "one group of a hybrid": ("bamba", {"mamba_n_groups": 1}),
    "experts beside a shared MLP": ("granitemoehybrid", {}),
    "squared ReLU, experts without a gate": ("nemotron_h", {}),
    "experts of a latent": ("nemotron_h", {"mlp_bias": True, "moe_latent_size": 24}),
    "experts and channels": ("jamba", {}),
    "norm before the gate, over both ranks": (
        "falcon_h1",
        {"mamba_n_groups": 1, "mamba_rms_norm": True},
    ),
    "gated and not normed": ("falcon_h1", {}),
    "shared blocks with adapters": ("zamba2", {"use_shared_attention_adapter": True}),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks saved, and the models of transformers, by name."""
    models = {name: make_state_model(kind, **options) for name, (kind, options) in MODELS.items()}
    return run_ranks(models, tmp_path_factory.mktemp("state_tensor_parallel")), models


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_give_the_logits_of_one(ranks, name):
    outputs, models = ranks
    expected = reference(models[name])
    for output in outputs:
        assert_logits_equal(output["logits"][list(MODELS).index(name)], expected)
