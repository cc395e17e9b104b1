"""The engine on a GPU: tokens, sampling, quantised caches."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from vllm import SamplingParams
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

pytestmark = pytest.mark.gpu

GREEDY = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, "detokenize": False}


def generate(llm, prompts, **params) -> list[list[int]]:
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(given, SamplingParams(**GREEDY | params), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"async_scheduling": False},
        {"block_size": 16, "max_num_batched_tokens": 64},
        # Blocks for two of the longest requests: most are preempted.
        {"num_gpu_blocks_override": 18, "block_size": 32},
    ],
    ids=["as is", "without graphs", "in turn", "chunks", "preemption"],
)
def test_greedy_float32_tokens_are_those_of_the_cpu(start, prompts, greedy, options) -> None:
    assert generate(start(**options), prompts) == greedy


def test_a_batch_of_one_gets_the_tokens_of_the_whole(start, prompts, greedy) -> None:
    llm = start()
    assert [generate(llm, [prompt])[0] for prompt in prompts[:6]] == greedy[:6]


def test_an_engine_in_its_own_process(start, prompts, greedy, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    assert generate(start(), prompts) == greedy


@pytest.mark.parametrize(
    "params",
    [{}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.05}, {"presence_penalty": 0.5}],
    ids=["plain", "truncated", "min_p", "penalty"],
)
def test_seeds_draw_the_same_tokens_in_any_batch(start, hf_model, prompts, params) -> None:
    llm = start()
    params = {"temperature": 0.9, "seed": 7, **params}
    together = generate(llm, prompts, **params)
    # The second time prompts are in the prefix cache: their last tokens are computed alone.
    others = generate(llm, prompts, **params)
    others += [generate(llm, [prompt], **params)[0] for prompt in prompts[:6]]
    for prompt, one, other in zip(
        prompts + prompts[:6], together + together[:6], others, strict=True
    ):
        pairs = enumerate(zip(other, one, strict=True))
        first = next((i for i, (a, b) in pairs if a != b), None)
        # Sums of other sizes round otherwise, which may move the limit between two tokens.
        if first is not None:
            possible = draws_of(hf_model, prompt, one[:first], params)
            assert {other[first], one[first]} <= possible, (first, possible)
    assert generate(llm, prompts, **params | {"seed": 8}) != together


def draws_of(hf_model, prompt: list[int], output: list[int], params: dict) -> set[int]:
    """Tokens that the seed may draw next, from exact logits that are off by up to 3e-4."""
    with torch.no_grad():
        exact = copy.deepcopy(hf_model).double()(torch.tensor([prompt + output])).logits[0, -1]
    exact[list(set(output))] -= params.get("presence_penalty", 0.0)
    count = 256
    noise = torch.rand((count, exact.numel()), generator=torch.manual_seed(0), dtype=torch.float64)
    rows = {
        name: np.full(count, params[name], dtype=dtype)
        for name, dtype in (("top_k", np.int64), ("top_p", np.float32), ("min_p", np.float32))
        if name in params
    }
    metadata = SamplingMetadata(
        num_rows=count,
        temperature=np.full(count, params["temperature"], dtype=np.float32),
        seeds=np.full(count, params["seed"], dtype=np.uint64),
        positions=np.full(count, len(prompt) + len(output)),
        **rows,
    )
    logits = (exact + (noise - 0.5) * 6e-4).float()
    return set(Sampler()(logits, metadata).sampled_token_ids.tolist())


def test_draws_follow_the_softmax(start, hf_model) -> None:
    prompt = [5, 9, 17]
    with torch.no_grad():
        exact = hf_model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    llm = start(max_num_seqs=256)
    tokens = generate(llm, [prompt] * 4096, temperature=1.0, max_tokens=1)
    counts = torch.bincount(torch.tensor(tokens).flatten(), minlength=exact.numel()) / 4096
    likely = exact > 5 / 4096
    # Chi-square over the likely tokens; five standard deviations.
    chi = float(((counts - exact)[likely] ** 2 / exact[likely]).sum() * 4096)
    freedom = int(likely.sum())
    assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5 + 5


def test_log_probabilities_are_those_of_the_cpu(start, hf_model, prompts) -> None:
    llm = start()
    given = [{"prompt_token_ids": prompts[3]}]
    params = SamplingParams(**GREEDY | {"max_tokens": 3, "logprobs": 4, "prompt_logprobs": 2})
    (output,) = llm.generate(given, params, use_tqdm=False)
    tokens = prompts[3] + list(output.outputs[0].token_ids)
    with torch.no_grad():
        exact = hf_model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    for i, row in enumerate(output.outputs[0].logprobs):
        for token, value in row.items():
            assert value.logprob == pytest.approx(
                float(exact[len(prompts[3]) + i - 1, token]), abs=1e-3
            )
    for i, row in enumerate(output.prompt_logprobs[1:]):
        for token, value in row.items():
            assert value.logprob == pytest.approx(float(exact[i, token]), abs=1e-3)


@pytest.mark.parametrize(
    "name",
    ["fp8", "fp8_e5m2", "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head"],
)
def test_quantised_caches_give_the_tokens_of_the_plain_formula(start, prompts, name) -> None:
    options = {"kv_cache_dtype": name, "block_size": 32}
    ours = generate(start(**options), prompts, max_tokens=12)
    theirs = generate(start(**options, attention_backend="TORCH_REF"), prompts, max_tokens=12)
    # A number at a boundary between two steps of the format may fall on either side.
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 0.7 * len(prompts)
    assert [a[0] for a in ours] == [b[0] for b in theirs]
