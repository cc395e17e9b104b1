"""Architectures on two workers, through the whole engine: the tokens and logits of one worker."""

from __future__ import annotations

import pytest

from tests.models.checkpoints import CLASSES, make_hf_model, save
from tests.models.parity import assert_same, engine, generate, make_prompts, metric
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.errors import ConfigError

COVERING = {"gemma3_text": {}, "gpt_oss": {"num_gpu_blocks_override": 48, "max_num_seqs": 8}}
"""Windows and experts; prompts in chunks and preempted. The others are slow to run each time."""


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=[] if name in COVERING else pytest.mark.slow)
        for name in sorted(CLASSES)
    ],
)
def test_two_workers_generate_what_one_does(model_type, tmp_path):
    folder = save(make_hf_model(model_type, max_position_embeddings=512), tmp_path)
    prompts = make_prompts()
    with engine(folder) as llm:
        expected = generate(llm, prompts)
    options = COVERING.get(model_type, {})
    with engine(folder, tensor_parallel_size=2, max_num_batched_tokens=64, **options) as llm:
        assert_same(generate(llm, prompts), expected)
        if options:
            assert metric(llm, "num_preemptions") > 0


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
            assert {t: e.logprob for t, e in ours.items()} == pytest.approx(
                {t: e.logprob for t, e in theirs.items()}, abs=1e-4
            )


def test_smollm2_on_two_workers_is_refused_with_the_sizes_that_work():
    with pytest.raises(ConfigError, match=r"9 attention heads and 3 KV heads.*can: 1, 3, 9$"):
        EngineArgs(model="smollm2", tensor_parallel_size=2).create_engine_config()
