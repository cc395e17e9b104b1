"""Every architecture behind ``vllm serve``: answers over HTTP are what transformers generates."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.entrypoints.server import Server
from tests.models.checkpoints import save
from tests.models.parity import make_prompts
from tests.models.test_engine_tensor_parallel import ROWS, make_model

EACH_TIME = ("qwen3_next",)
"""Experts, attention and states. The others are slow to start each time."""
NUM_TOKENS = 24
OPTIONS = (
    *("--skip-tokenizer-init", "--dtype", "float32", "--max-model-len", "400"),
    *("--kv-cache-memory-bytes", "32M", "--max-num-batched-tokens", "64", "--max-num-seqs", "8"),
)


@torch.inference_mode()
def greedy_by_transformers(hf, prompt, tokens):
    """The best token after the prompt and after each of ``tokens`` but the last."""
    return hf(torch.tensor([prompt + tokens[:-1]])).logits[0, -len(tokens) :].argmax(-1).tolist()


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=[] if name in EACH_TIME else pytest.mark.slow)
        for name in sorted(ROWS)
    ],
)
def test_requests_at_once_over_http(model_type, tmp_path):
    hf = make_model(model_type)
    folder = save(hf, tmp_path / "model")
    prompts = make_prompts()
    with (
        Server(tmp_path / "log", *OPTIONS, model=str(folder)) as server,
        ThreadPoolExecutor(len(prompts)) as pool,
    ):

        def tokens_of(prompt):
            answer = server.client.completions.create(
                model=str(folder),
                prompt=prompt,
                max_tokens=NUM_TOKENS,
                temperature=0.0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            return answer.choices[0].token_ids

        answers = list(pool.map(tokens_of, prompts))
    for prompt, tokens in zip(prompts, answers, strict=True):
        assert len(tokens) == NUM_TOKENS
        assert tokens == greedy_by_transformers(hf, prompt, tokens)
