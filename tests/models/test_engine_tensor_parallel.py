"""Architectures on two workers, through the whole engine: the tokens and logits of transformers.

Each architecture runs in one layout, way of keeping states and size of the pool: all layouts with
all kinds of caches are in ``test_parity``, ``test_state_parity`` and
``test_linear_attention_parity`` on one worker; here each of these settings meets two workers.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.models import checkpoints, linear_attention_checkpoints, state_checkpoints
from tests.models.checkpoints import make_hf_model, save
from tests.models.linear_attention_checkpoints import make_linear_model
from tests.models.parity import (
    assert_equals_transformers,
    assert_same,
    engine,
    generate,
    make_prompts,
    metric,
    smallest_pool,
)
from tests.models.state_checkpoints import make_state_model
from tests.models.test_bart import assert_equals, make_bart
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.errors import ConfigError

EACH_TIME = ("gpt_oss", "deepseek_v3", "lfm2")
"""Windows, sinks and experts; latents; states beside attention. The others are slow to run."""
CHUNKS = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
SMALL, ROOMY = "small pool", "roomy pool"
NONE, ALIGN, ALL = (
    {"mamba_cache_mode": mode, "block_size": 32, "enable_prefix_caching": mode != "none"}
    for mode in ("none", "align", "all")
)
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("BHLNC", SMALL, {}),
    "mistral": ("LHBNC", ROOMY, {}),
    "qwen2": ("LBNHC", SMALL, {}),
    "qwen3": ("BLNHC", ROOMY, {}),
    "gemma2": ("BLHNC", SMALL, {}),
    "gemma3_text": ("BHLNC", ROOMY, {}),
    "mixtral": ("LBHNC", ROOMY, {}),
    "qwen2_moe": ("LHBNC", SMALL, {}),
    "qwen3_moe": ("BLHNC", ROOMY, {}),
    "gpt_oss": ("BLNHC", SMALL, {}),
    "llama4_text": ("LBNHC", ROOMY, {}),
    "deepseek_v2": ("LBHNC", SMALL, {}),
    "deepseek_v3": ("BHLNC", ROOMY, {}),
    "deepseek_v4": ("BLHNC", SMALL, {}),
    "mamba": ("BHLNC", ROOMY, ALL),
    "falcon_mamba": ("LHBNC", SMALL, ALL),
    "mamba2": ("BLNHC", ROOMY, ALIGN),
    "bamba": ("LBHNC", SMALL, ALIGN),
    "granitemoehybrid": ("LBNHC", SMALL, ALL),
    "nemotron_h": ("BLHNC", ROOMY, ALL),
    "jamba": ("BLNHC", SMALL, NONE),
    "falcon_h1": ("BLHNC", SMALL, ALIGN),
    "zamba2": ("LBHNC", ROOMY, ALL),
    "qwen3_next": ("BLHNC", SMALL, ALIGN),
    "lfm2": ("LBNHC", SMALL, NONE),
    "lfm2_moe": ("BLNHC", ROOMY, ALL),
    "kimi_linear": ("BLHNC", ROOMY, ALIGN),
    "minimax": ("LBHNC", SMALL, ALL),
}


def make_model(model_type: str) -> Any:
    if model_type in state_checkpoints.CLASSES:
        return make_state_model(model_type)
    if model_type in linear_attention_checkpoints.CLASSES:
        return make_linear_model(model_type)
    return make_hf_model(model_type, max_position_embeddings=512)


def test_every_architecture_has_a_row():
    classes = (
        checkpoints.CLASSES,
        state_checkpoints.CLASSES,
        linear_attention_checkpoints.CLASSES,
    )
    assert set(ROWS) == {name for group in classes for name in group}


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=[] if name in EACH_TIME else pytest.mark.slow)
        for name in sorted(ROWS)
    ],
)
def test_two_workers_generate_what_transformers_does(model_type, tmp_path, monkeypatch):
    layout, pool, options = ROWS[model_type]
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    hf = make_model(model_type)
    folder = save(hf, tmp_path)
    settings = {**CHUNKS, **options, "tensor_parallel_size": 2}
    if pool == SMALL:
        # The longest request fits, and little beside it.
        settings["num_gpu_blocks_override"] = smallest_pool(folder, **CHUNKS, **options) + 2
    with engine(folder, **settings) as llm:
        first = generate(llm, make_prompts())
        assert_equals_transformers(first, hf)
        if pool == SMALL:
            assert metric(llm, "num_preemptions") > 0
            return
        again = generate(llm, make_prompts())
        assert_same(again, first)
        assert sum(again.cached) > 0


@pytest.mark.slow
def test_an_encoder_and_a_decoder_on_two_workers(tmp_path):
    hf = make_bart()
    with engine(save(hf, tmp_path), **CHUNKS, tensor_parallel_size=2) as llm:
        assert_equals(generate(llm, make_prompts()), hf)


@pytest.mark.slow
def test_smollm2_on_three_workers():
    """9 query heads and 3 KV heads: the first size that shares them out."""
    prompts = [list(range(100 + i, 100 + i + 5 * (i + 1))) for i in range(8)]
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=5)
    results = []
    for size in (1, 3):
        with LLM(
            "smollm2",
            dtype="float32",
            max_model_len=512,
            kv_cache_memory_bytes=1 << 27,
            tensor_parallel_size=size,
        ) as llm:
            outputs = llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
            )
        results.append([output.outputs[0] for output in outputs])
    for one, three in zip(*results, strict=True):
        assert three.token_ids == one.token_ids
        for ours, theirs in zip(three.logprobs, one.logprobs, strict=True):
            # Which of two nearly equal ones is among the best may differ; how good they are, not.
            assert sorted(e.logprob for e in ours.values()) == pytest.approx(
                sorted(e.logprob for e in theirs.values()), abs=1e-4
            )
            for token in ours.keys() & theirs.keys():
                assert ours[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-4)


def test_smollm2_on_two_workers_is_refused_with_the_sizes_that_work():
    with pytest.raises(ConfigError, match=r"9 attention heads and 3 KV heads.*can: 1, 3, 9$"):
        EngineArgs(model="smollm2", tensor_parallel_size=2).create_engine_config()
