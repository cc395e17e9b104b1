"""``--kv-cache-dtype``: what a model says over a quantised cache, and what the cache costs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from tests.engine.conftest import ENGINE_ARGS, VOCAB_SIZE
from vllm import LLM, SamplingParams
from vllm.errors import ConfigError
from vllm.v1.attention.ops.kv_formats import FORMATS, KVFormat, kv_format

NAMES = [name for name in FORMATS if name != "fp8"]
HEAD_SIZE = 16
# Bytes of one token of one layer: two KV heads, K and V.
TOKEN_BYTES = {
    "fp8_e4m3": 4 * HEAD_SIZE,
    "fp8_e5m2": 4 * HEAD_SIZE,
    "int8_per_token_head": 4 * (HEAD_SIZE + 4),
    "fp8_per_token_head": 4 * (HEAD_SIZE + 4),
    "int4_per_token_head": 4 * (HEAD_SIZE // 2 + 4),
    "nvfp4": 4 * (HEAD_SIZE // 2 + HEAD_SIZE // 16),
}


@pytest.fixture
def start(tiny_model, monkeypatch) -> Iterator[Callable[..., LLM]]:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    started: list[LLM] = []

    def make(**options) -> LLM:
        started.append(LLM(str(tiny_model), **ENGINE_ARGS | options))
        return started[-1]

    yield make
    for llm in started:
        llm.shutdown()


def log_probs_by_engine(llm: LLM, prompts: list[list[int]]) -> torch.Tensor:
    """The log-probability of each prompt token but the first ones."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return torch.tensor(
        [
            row[token].logprob
            for output, prompt in zip(outputs, prompts, strict=True)
            for row, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
        ]
    )


def log_probs_by_simulation(
    model: LlamaForCausalLM, prompts: list[list[int]], fmt: KVFormat, patch: pytest.MonkeyPatch
) -> torch.Tensor:
    """transformers in float32, its keys and values quantised by the format's formula and back."""
    plain = modeling_llama.eager_attention_forward

    def attend(module, query, key, value, *args, **kwargs):
        both = fmt.dequantise_kv(fmt.quantise_kv(key, value))
        return plain(module, query, *both.chunk(2, dim=-1), *args, **kwargs)

    patch.setattr(modeling_llama, "eager_attention_forward", attend)
    found = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            rows = model(ids).logits[0, :-1].log_softmax(-1)
            found.append(rows.gather(-1, ids[0, 1:, None]).squeeze(-1))
    return torch.cat(found)


@pytest.fixture(scope="module")
def simulated_model(tiny_model) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    return model.float().eval()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(4, VOCAB_SIZE) for _ in range(n)] for n in (60, 33, 17)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["CPU_ATTN", "TORCH_REF"])
def test_log_probabilities_are_those_of_a_simulation(
    start, simulated_model, prompts, name, backend, monkeypatch
) -> None:
    llm = start(kv_cache_dtype=name, attention_backend=backend)
    ours = log_probs_by_engine(llm, prompts)
    theirs = log_probs_by_simulation(simulated_model, prompts, kv_format(name), monkeypatch)
    # A number at a boundary between two steps may fall on either side.
    assert (ours - theirs).abs().median() < 1e-4
    assert abs(float(ours.mean() - theirs.mean())) < 3e-3


@pytest.mark.parametrize("name", ["int8_per_token_head", "fp8_e4m3"])
def test_a_wrong_scale_would_show(start, simulated_model, prompts, name, monkeypatch) -> None:
    llm = start(kv_cache_dtype=name, attention_backend="TORCH_REF")
    read = KVFormat.dequantise
    monkeypatch.setattr(
        KVFormat, "dequantise", lambda fmt, side, scale=1.0: read(fmt, side, scale) * 1.1
    )
    ours = log_probs_by_engine(llm, prompts)
    monkeypatch.setattr(KVFormat, "dequantise", read)
    theirs = log_probs_by_simulation(simulated_model, prompts, kv_format(name), monkeypatch)
    assert abs(float(ours.mean() - theirs.mean())) > 3e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_shrinks_by_what_the_format_says(start, name) -> None:
    facts = start(kv_cache_dtype=name).llm_engine.client.facts
    block = facts.kv_cache_memory_bytes / facts.num_gpu_blocks
    assert block == 2 * facts.block_size * TOKEN_BYTES[name]


@pytest.mark.parametrize("skipped", [["1"], ["model.layers.1.self_attn.attn"]])
def test_skipped_layers_keep_the_models_dtype(start, prompts, skipped) -> None:
    llm = start(kv_cache_dtype="int8_per_token_head", kv_cache_dtype_skip_layers=skipped)
    facts = llm.llm_engine.client.facts
    block = facts.kv_cache_memory_bytes / facts.num_gpu_blocks
    plain = 4 * HEAD_SIZE * 4
    assert block >= facts.block_size * (TOKEN_BYTES["int8_per_token_head"] + plain)
    both = log_probs_by_engine(start(kv_cache_dtype="int8_per_token_head"), prompts)
    none = log_probs_by_engine(start(), prompts)
    one = log_probs_by_engine(llm, prompts)
    assert not torch.equal(one, none)
    assert not torch.equal(one, both)


@pytest.mark.parametrize("entry", ["2", "-1", "", "model.layers.1", "sliding_window"])
def test_an_entry_that_means_no_layer_is_refused(start, entry) -> None:
    with pytest.raises(ConfigError, match=f"--kv-cache-dtype-skip-layers '{entry}' means no layer"):
        start(kv_cache_dtype="fp8", kv_cache_dtype_skip_layers=[entry])


def test_a_request_that_is_cut_in_chunks_reads_what_it_stored(start, prompts) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    tokens = [
        [output.outputs[0].token_ids for output in llm.generate(given, params, use_tqdm=False)]
        for llm in (
            start(kv_cache_dtype="int4_per_token_head"),
            start(kv_cache_dtype="int4_per_token_head", max_num_batched_tokens=16),
        )
    ]
    assert tokens[0] == tokens[1]


def test_a_backend_without_the_format_says_so(start) -> None:
    with pytest.raises(ConfigError, match="CPU_ATTN: kv cache dtype turboquant_4bit_nc not"):
        start(kv_cache_dtype="turboquant_4bit_nc", attention_backend="CPU_ATTN")


@pytest.mark.parametrize("name", ["turboquant_k8v4", "turboquant_3bit_nc"])
def test_slots_on_a_cpu_are_the_references(
    start, simulated_model, prompts, name, monkeypatch
) -> None:
    ours = log_probs_by_engine(start(kv_cache_dtype=name), prompts)
    theirs = log_probs_by_simulation(simulated_model, prompts, kv_format(name), monkeypatch)
    assert (ours - theirs).abs().median() < 1e-4
