"""Greedy generation by the whole engine, in this process, held against transformers in float32."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.effort import by_effort
from tests.models.harness import BLOCK_SIZE, VOCAB
from vllm import LLM, SamplingParams
from vllm.errors import CapacityError

NUM_TOKENS = by_effort(40, 64)
MAX_MODEL_LEN = 400
TOLERANCE = 1e-4
LENGTHS = (1, 5, 16, 33, 64, 100, 170, 300)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=-1)


def make_prompts(vocab: int = VOCAB) -> list[list[int]]:
    """8 prompts of 1 to 300 tokens: shorter and longer than blocks, windows and chunks."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in LENGTHS]


@dataclass
class Generated:
    """What came of each prompt: tokens, and the logits (tokens, V) that they are the best of."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: list[torch.Tensor]
    cached: list[int]
    """Prompt tokens that were found in the cache."""


@contextlib.contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[LLM]:
    """An engine in this process whose logprobs are logits."""
    defaults = {
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "max_model_len": MAX_MODEL_LEN,
        "kv_cache_memory_bytes": 1 << 23,
        "skip_tokenizer_init": True,
        "max_logprobs": -1,
        "logprobs_mode": "raw_logits",
    }
    with mock.patch.dict("os.environ", VLLM_ENABLE_V1_MULTIPROCESSING="0"):
        llm = LLM(model=str(folder), **{**defaults, **settings})
    try:
        yield llm
    finally:
        llm.shutdown()


def generate(llm: LLM, prompts: list[list[int]], one_by_one: bool = False) -> Generated:
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    batches = [[request] for request in requests] if one_by_one else [requests]
    outputs = [
        output for batch in batches for output in llm.generate(batch, GREEDY, use_tqdm=False)
    ]
    tokens, logits = [], []
    for output in outputs:
        (completion,) = output.outputs
        tokens.append(list(completion.token_ids))
        assert completion.logprobs is not None
        logits.append(
            torch.tensor([[row[i].logprob for i in range(len(row))] for row in completion.logprobs])
        )
    return Generated(prompts, tokens, logits, [output.num_cached_tokens or 0 for output in outputs])


@torch.inference_mode()
def assert_equals_transformers(got: Generated, hf: Any) -> None:
    """One forward pass over prompt and output: if each position's best token is the one that
    follows, greedy generation by transformers gives exactly these tokens.
    """
    for prompt, tokens, logits in zip(got.prompts, got.tokens, got.logits, strict=True):
        assert len(tokens) == NUM_TOKENS
        theirs = hf(torch.tensor([prompt + tokens[:-1]])).logits[0, -NUM_TOKENS:]
        assert theirs.std() > 0.1, "logits that say nothing could not tell a wrong model"
        torch.testing.assert_close(logits, theirs, atol=TOLERANCE, rtol=TOLERANCE)
        assert theirs.argmax(-1).tolist() == tokens, f"prompt of {len(prompt)} tokens"


def assert_same(got: Generated, expected: Generated) -> None:
    assert got.tokens == expected.tokens
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def metric(llm: LLM, name: str) -> int:
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def smallest_pool(folder: Path, **settings: Any) -> int:
    """Blocks with which an engine of these settings can just start, as it says itself."""
    try:
        with engine(folder, **settings, num_gpu_blocks_override=2):
            return 2
    except CapacityError as error:
        needed = re.search(r"needs (\d+) cache blocks", str(error))
        assert needed is not None, error
        return 1 + int(needed[1])
