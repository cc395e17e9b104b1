"""SmolLM2 twice: as transformers reads the GGUF file itself (the judge), and as prompts."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.effort import by_effort
from vllm.transformers_utils.config import resolve_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Judge = Callable[[list[int], list[int]], torch.Tensor]


@pytest.fixture(scope="session")
def gguf_file() -> Path:
    return Path(resolve_model("smollm2").model_path)


@pytest.fixture(scope="session")
def judging_model(gguf_file: Path) -> LlamaForCausalLM:
    """SmolLM2 in float32 by transformers."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="session")
def judge(judging_model: LlamaForCausalLM) -> Judge:
    """float32 log-probabilities by transformers of each output position, ``(len(output), V)``.

    One forward pass over prompt and output: if the argmax of every row is the token that
    follows, greedy generation by transformers gives exactly these tokens.
    """

    def logprobs(prompt: list[int], output: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            ids = torch.tensor([prompt + output[:-1]])
            logits = judging_model(ids, logits_to_keep=len(output)).logits[0]
        return logits.log_softmax(-1)

    return logprobs


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """20 prompts of 5 to 900 tokens, some with a common prefix of 200; quick tests take eight."""
    rng = random.Random(20)
    lengths = [
        5,
        7,
        11,
        16,
        17,
        31,
        32,
        33,
        48,
        64,
        100,
        128,
        129,
        200,
        255,
        300,
        420,
        512,
        700,
        900,
    ]
    shared = [rng.randrange(100, 49000) for _ in range(200)]
    made = []
    for index, length in enumerate(lengths):
        own = [rng.randrange(100, 49000) for _ in range(length)]
        made.append((shared + own)[:length] if index % 2 and length > 200 else own)
    return [made[index] for index in by_effort([0, 3, 4, 7, 10, 12, 15, 17], range(len(made)))]
