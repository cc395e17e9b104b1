"""Tiny models on disk, and engines on the GPU that serve them."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch

from tests.worker.driver import hf_greedy, make_hf_model

SHAPE = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip
"""Heads of 16."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak-seconds", type=float, default=300.0, help="how long the GPU's soak test runs"
    )


@pytest.fixture(scope="session")
def hf_model():
    return make_hf_model(**SHAPE)


@pytest.fixture(scope="session")
def model(hf_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu-llama")
    hf_model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [
        [rng.randrange(SHAPE["vocab_size"]) for _ in range(rng.choice([1, 2, 17, 64, 65, 200]))]
        for _ in range(20)
    ]


@pytest.fixture(scope="session")
def greedy(hf_model, prompts) -> list[list[int]]:
    """Forty tokens for each prompt, by transformers in float32 on the CPU."""
    # Tests may run in many processes: a team of threads each would keep the others waiting.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [hf_greedy(hf_model, prompt, 40) for prompt in prompts]
    finally:
        torch.set_num_threads(before)


class _Start:
    """Starts engines, and ends them with the test."""

    def __init__(self, model: str) -> None:
        self._defaults = {
            "model": model, "skip_tokenizer_init": True, "max_model_len": 512,
            "dtype": "float32", "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 32,
        }  # fmt: skip
        self._started: list[Any] = []

    def __call__(self, **options: Any) -> Any:
        from vllm import LLM

        self._started.append(LLM(**self._defaults | options))
        return self._started[-1]

    def forget(self) -> None:
        """End all that was started and free what it held."""
        for llm in self._started:
            llm.shutdown()
        self._started.clear()
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def start(model, monkeypatch):
    """``start(**options)``: an ``LLM`` on the tiny model in float32, in this process."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    starting = _Start(model)
    yield starting
    starting.forget()
