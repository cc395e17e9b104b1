"""Greedy tokens in float32 equal transformers', whatever the scheduler and the cache do."""

from __future__ import annotations

import pytest
import torch

from tests.e2e.conftest import Judge
from tests.effort import by_effort
from vllm import LLM, SamplingParams

# Twenty prompts by the judge and by us, one after the other: minutes on a busy machine.
pytestmark = pytest.mark.timeout(1200)

NUM_TOKENS = by_effort(40, 64)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=5)


def make_llm(**kwargs: object) -> LLM:
    defaults = {
        "model": "smollm2",
        "dtype": "float32",
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 1 << 29,
    }
    return LLM(**(defaults | kwargs))


def generate(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(requests, GREEDY, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def reference(prompts: list[list[int]], judge: Judge) -> list[list[int]]:
    """Our tokens for each prompt alone, proved equal to transformers' greedy ones."""
    llm = make_llm(enable_prefix_caching=False)
    try:
        tokens = []
        for prompt in prompts:
            (output,) = llm.generate([{"prompt_token_ids": prompt}], GREEDY, use_tqdm=False)
            (completion,) = output.outputs
            theirs = judge(prompt, list(completion.token_ids))
            assert theirs.argmax(-1).tolist() == list(completion.token_ids), len(prompt)
            assert completion.logprobs is not None
            for row, position in zip(theirs, completion.logprobs, strict=True):
                for token_id, entry in position.items():
                    assert abs(entry.logprob - row[token_id].item()) < 1e-3
            tokens.append(list(completion.token_ids))
    finally:
        llm.shutdown()
    return tokens


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {"block_size": 16, "enable_prefix_caching": False},
            id="batched-16",
            marks=pytest.mark.slow,
        ),
        pytest.param({"block_size": 32, "enable_prefix_caching": True}, id="prefix-cache-32"),
        pytest.param(
            {"block_size": 128, "enable_prefix_caching": True},
            id="prefix-cache-128",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"block_size": 16, "max_num_batched_tokens": 96, "max_num_seqs": 8}, id="chunked-16"
        ),
        pytest.param(
            {
                "block_size": 32,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": 1024,
            },
            id="whole-prompts-32",
        ),
        pytest.param(
            # 80 blocks of 16 hold the longest request and little more: others are preempted.
            {"block_size": 16, "num_gpu_blocks_override": 80, "max_num_seqs": 8},
            id="preempted-16",
        ),
        pytest.param(
            {"block_size": 128, "num_gpu_blocks_override": 12, "max_num_batched_tokens": 200},
            id="preempted-chunked-128",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_tokens_do_not_depend_on_batching_caching_or_preemption(
    settings: dict[str, object], prompts: list[list[int]], reference: list[list[int]]
) -> None:
    llm = make_llm(**settings)
    try:
        assert generate(llm, prompts) == reference
        # Again, so that with prefix caching whole prompts come from the cache.
        assert generate(llm, prompts) == reference
        preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
        hits = sum(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")
    finally:
        llm.shutdown()
    if "num_gpu_blocks_override" in settings:
        assert preemptions > 0
    if settings.get("enable_prefix_caching") and "num_gpu_blocks_override" not in settings:
        assert hits > sum(map(len, prompts)) / 2


def test_prompt_logprobs_equal_transformers(prompts: list[list[int]], judge: Judge) -> None:
    llm = make_llm(max_num_batched_tokens=128)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=2)
    try:
        for prompt in prompts[4:16:5]:
            (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
            assert output.prompt_logprobs is not None
            assert output.prompt_logprobs[0] is None
            theirs = judge(prompt[:1], prompt[1:])
            for row, token, position in zip(
                theirs, prompt[1:], output.prompt_logprobs[1:], strict=True
            ):
                assert position is not None
                assert abs(position[token].logprob - row[token].item()) < 1e-3
                assert torch.topk(row, 2).indices[0].item() in position
    finally:
        llm.shutdown()
