"""Two processes that share a model give the logits of one, by gloo."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models.checkpoints import make_hf_model, save
from tests.models.linear_attention_checkpoints import make_linear_model
from tests.models.test_llama import assert_logits_equal, reference
from vllm.distributed.parallel_state import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    init_distributed_environment,
    initialize_model_parallel,
)

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "tied, biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "own head": ("qwen2", {}),
    "one KV head on both ranks": ("qwen3", {"head_dim": 16, "num_key_value_heads": 1}),
    "norms around branches": ("gemma3_text", {}),
    "experts, one of them shared": ("qwen2_moe", {}),
    "experts with biases, sinks": ("gpt_oss", {}),
    "experts beside a shared one, chunks": ("llama4_text", {}),
}
LINEAR_MODELS = {
    "gated delta nets and gated attention": ("qwen3_next", {}),
    "short convolutions": ("lfm2", {}),
    "lightning attention": ("minimax", {}),
    "Kimi delta attention": ("kimi_linear", {}),
}


def run_ranks(models, folder):
    """What each of two ranks makes of these models, by name."""
    for name, model in models.items():
        save(model, folder / name)
    command = [sys.executable, "-m", "tests.models.tensor_parallel_worker"]
    paths = [str(folder / name) for name in models]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", str(folder / "rendezvous"), str(folder / "out"), *paths],
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=600) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(f"{folder}/out.{rank}") for rank in range(2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks saved, and the models of transformers, by name."""
    models = {name: make_hf_model(kind, **options) for name, (kind, options) in MODELS.items()}
    models |= {
        name: make_linear_model(kind, **options) for name, (kind, options) in LINEAR_MODELS.items()
    }
    return run_ranks(models, tmp_path_factory.mktemp("tensor_parallel")), models


@pytest.mark.parametrize("name", [*MODELS, *LINEAR_MODELS])
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_give_the_logits_of_one(name, rank, ranks):
    saved, models = ranks
    logits = saved[rank]["logits"][list(models).index(name)]
    assert_logits_equal(logits, reference(models[name]))


def test_each_rank_caches_its_own_kv_heads(ranks):
    saved, _ = ranks
    for rank in saved:
        # A latent has no heads.
        assert all(set(heads) == {1} for heads in rank["kv_heads"] if heads)


def test_alone_everything_is_a_no_op():
    init_distributed_environment(1, 0)
    initialize_model_parallel(1)
    x = torch.randn(2, 3)
    group = get_tp_group()
    assert group.all_reduce(x) is group.all_gather(x) is group.gather(x) is group.broadcast(x) is x
    group.barrier()
    assert (group.world_size, group.is_first_rank, group.is_last_rank) == (1, True, True)
    assert (get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()) == (0, 1)
    assert get_pp_group().world_size == 1


def test_sizes_that_do_not_multiply_to_the_world():
    with pytest.raises(ValueError, match="size 2 times pipeline parallel size 1 is not the number"):
        initialize_model_parallel(2)
