"""Models with latents and with states on a GPU: the tokens of transformers, by Triton's kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.checkpoints import make_hf_model, save
from tests.models.linear_attention_checkpoints import make_linear_model
from tests.models.parity import engine, generate, make_prompts
from tests.models.state_checkpoints import make_state_model

pytestmark = pytest.mark.gpu

LATENTS = ("deepseek_v2", "deepseek_v3", "deepseek_v4")
STATES = (
    "mamba",
    "falcon_mamba",
    "mamba2",
    "bamba",
    "granitemoehybrid",
    "nemotron_h",
    "jamba",
    "falcon_h1",
    "zamba2",
)
LINEAR = ("qwen3_next", "lfm2", "lfm2_moe", "kimi_linear", "minimax")
DENSE = ("mamba", "falcon_mamba", "mamba2", "bamba", "falcon_h1", "zamba2", "lfm2")
"""Without experts, whose numbers of rows the host has to know: their decodes are captured."""


CHANGES: dict[str, dict[str, Any]] = {
    # Before 5.20 transformers norms all groups of a gated norm as one.
    "mamba2": {"n_groups": 1},
    "bamba": {"mamba_n_groups": 1},
    "granitemoehybrid": {"mamba_n_groups": 1},
    # Heads that TRITON_ATTN takes.
    "nemotron_h": {"head_dim": 32},
}


def make(model_type: str) -> Any:
    if model_type in LATENTS:
        longest = {} if model_type == "deepseek_v4" else {"max_position_embeddings": 512}
        return make_hf_model(model_type, **longest)
    maker = make_state_model if model_type in STATES else make_linear_model
    return maker(model_type, **CHANGES.get(model_type, {}))


@pytest.mark.parametrize("eager", [False, True], ids=["as is", "without graphs"])
@pytest.mark.parametrize("model_type", [*LATENTS, *STATES, *LINEAR])
def test_greedy_tokens_are_those_of_transformers(model_type, eager, tmp_path) -> None:
    torch.set_num_threads(2)
    hf = make(model_type)
    save(hf, tmp_path)
    settings: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": eager}
    if model_type != "deepseek_v4":
        settings["block_size"] = 32
    with engine(tmp_path, **settings) as llm:
        runner = llm.llm_engine.client._core.executor.worker.model_runner
        backends = {layer.get_attn_backend().get_name() for layer in runner.layers.values()}
        assert backends <= {"TRITON_ATTN", "TRITON_MLA", "STATE", "LATENT_STATES"}
        assert runner.captures == (not eager and model_type in DENSE)
        got = generate(llm, make_prompts())
    for prompt, tokens, logits in zip(got.prompts, got.tokens, got.logits, strict=True):
        with torch.inference_mode():
            whole = hf(torch.tensor([prompt + tokens[:-1]])).logits[0, -len(tokens) :]
        assert (logits - whole).abs().max() < 2e-3, f"prompt of {len(prompt)} tokens"
        assert whole.argmax(-1).tolist() == tokens, f"prompt of {len(prompt)} tokens"
