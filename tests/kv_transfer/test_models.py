"""Every kind of cache goes from one engine to another: windows, latents, states."""

from __future__ import annotations

import contextlib
import importlib.util

import pytest

from tests.entrypoints.server import free_port
from tests.kv_transfer.test_nixl import config, decode, prefill, wait_until_free
from tests.models.checkpoints import make_hf_model, save
from tests.models.linear_attention_checkpoints import make_linear_model
from tests.models.parity import engine
from tests.models.state_checkpoints import make_state_model

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")),
    reason="needs nixl: pip install 'vllm[nixl]'",
)
MODELS = {
    "windows": lambda: make_hf_model("mistral", sliding_window=24),
    "windows and all tokens": lambda: make_hf_model("gemma2", sliding_window=24),
    "latents": lambda: make_hf_model("deepseek_v3"),
    "Mamba 2 and attention": lambda: make_state_model("bamba"),
    "gated delta net and attention": lambda: make_linear_model("qwen3_next"),
}
PROMPTS = [
    {"prompt_token_ids": [3 + (i * 7 + length) % 90 for i in range(length)]}
    # The window of the last token of 55 begins one token before that of the next: in a block more.
    for length in (2, 17, 40, 55, 100, 161)
]


@pytest.mark.parametrize("model", MODELS)
def test_tokens_are_those_of_one_engine(model, tmp_path, monkeypatch):
    folder = save(MODELS[model](), tmp_path) or tmp_path
    with contextlib.ExitStack() as stack:
        monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
        p = stack.enter_context(
            engine(folder, max_model_len=256, kv_transfer_config=config("kv_producer"))
        )
        monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
        d = stack.enter_context(
            engine(folder, max_model_len=256, kv_transfer_config=config("kv_consumer"))
        )
        plain, _ = decode(d, PROMPTS, [None] * len(PROMPTS), count=12)
        assert d.reset_prefix_cache()
        tokens, outputs = decode(d, PROMPTS, prefill(p, PROMPTS), count=12)
        assert tokens == plain
        lengths = [len(prompt["prompt_token_ids"]) for prompt in PROMPTS]
        assert all(
            out.num_cached_tokens >= length - 1
            for out, length in zip(outputs, lengths, strict=True)
        )
        wait_until_free(p)
        wait_until_free(d)
