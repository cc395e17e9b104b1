"""Two GPUs compute what one does: tokens in float32, and log-probabilities.

One test at a time: sums of several programs on the same GPUs wait for each other's turns.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu.test_engine_on_gpu import GREEDY, generate
from vllm import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("symmetric", ["1", "0"], ids=["symmetric memory", "NCCL"])
@pytest.mark.parametrize(
    "options",
    [{}, {"enforce_eager": True}, {"num_gpu_blocks_override": 18, "block_size": 32}],
    ids=["as is", "without graphs", "preemption"],
)
def test_float32_tokens_are_those_of_one(
    start, prompts, greedy, monkeypatch, symmetric, options
) -> None:
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_SYMM_MEM", symmetric)
    assert generate(start(tensor_parallel_size=2, **options), prompts) == greedy


def test_log_probabilities_are_those_of_one(start, prompts) -> None:
    params = SamplingParams(**GREEDY | {"logprobs": 5, "prompt_logprobs": 2, "max_tokens": 16})
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    results = []
    for size in (1, 2):
        llm = start(tensor_parallel_size=size)
        results.append(llm.generate(given, params, use_tqdm=False))
        llm.shutdown()
    for one, two in zip(*results, strict=True):
        assert two.outputs[0].token_ids == one.outputs[0].token_ids
        rows = [*one.outputs[0].logprobs, *one.prompt_logprobs[1:]]
        others = [*two.outputs[0].logprobs, *two.prompt_logprobs[1:]]
        for row, other in zip(rows, others, strict=True):
            expected = {token: entry.logprob for token, entry in row.items()}
            assert {t: e.logprob for t, e in other.items()} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("level", [1, 2])
def test_both_sleep_and_wake(start, prompts, greedy, level) -> None:
    llm = start(tensor_parallel_size=2, enable_sleep_mode=True)
    assert generate(llm, prompts) == greedy
    llm.sleep(level=level)
    llm.wake_up()
    assert generate(llm, prompts) == greedy
