"""BART generates what transformers generates, out of caches of its encoder's output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.loader.test_default_loader import edit, load_error
from tests.models.checkpoints import save
from tests.models.harness import VOCAB
from tests.models.parity import (
    GREEDY,
    NUM_TOKENS,
    TOLERANCE,
    Generated,
    assert_same,
    engine,
    generate,
    make_prompts,
    metric,
)
from vllm.errors import VLLMValidationError
from vllm.v1.kv_cache_interface import CrossAttentionSpec, FullAttentionSpec

PROMPTS = make_prompts()
"""Of 1 to 300 tokens, for the encoder."""
START = 2
SMALL_POOL = {"num_gpu_blocks_override": 64, "max_num_batched_tokens": 64, "max_num_seqs": 8}


def make_bart(**overrides: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        **{
            "vocab_size": VOCAB,
            "d_model": 96,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 6,
            "encoder_ffn_dim": 160,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 512,
            "init_std": 0.2,
            "scale_embedding": True,
            "forced_eos_token_id": None,
            **overrides,
        }
    )
    config._attn_implementation = "eager"
    model = transformers.BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                param.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                param.normal_(0, 0.3)
        model.final_logits_bias.normal_(0, 0.3)
    return model


@torch.inference_mode()
def assert_equals(got: Generated, hf: Any, starts: list[list[int]] | None = None) -> None:
    """As ``assert_equals_transformers``: prompts are sources, outputs begin with ``starts``."""
    starts = starts or [[START]] * len(got.prompts)
    for source, start, tokens, logits in zip(
        got.prompts, starts, got.tokens, got.logits, strict=True
    ):
        theirs = hf(
            input_ids=torch.tensor([source]),
            decoder_input_ids=torch.tensor([start + tokens[:-1]]),
        ).logits[0, -NUM_TOKENS:]
        assert theirs.std() > 0.1, "logits that say nothing could not tell a wrong model"
        torch.testing.assert_close(logits, theirs, atol=TOLERANCE, rtol=TOLERANCE)
        assert theirs.argmax(-1).tolist() == tokens, f"source of {len(source)} tokens"


@dataclass
class Case:
    folder: Path
    hf: Any
    reference: Generated


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    hf = make_bart()
    folder = save(hf, tmp_path_factory.mktemp("bart"))
    with engine(folder) as llm:
        reference = generate(llm, PROMPTS, one_by_one=True)
    return Case(folder, hf, reference)


def test_alone_it_equals_transformers(case):
    assert_equals(case.reference, case.hf)
    assert case.reference.cached == [0] * len(PROMPTS), "sources have no token hashes"


def test_transformers_generates_the_same(case):
    """By its own loop, with its own caches."""
    theirs = case.hf.generate(
        torch.tensor([PROMPTS[5]]), max_new_tokens=20, do_sample=False, num_beams=1, eos_token_id=-1
    )
    assert theirs[0, 1:].tolist() == case.reference.tokens[5][:20]


def test_in_one_batch_with_chunks(case):
    with engine(case.folder, max_num_batched_tokens=8, max_num_seqs=8) as llm:
        assert_same(generate(llm, PROMPTS), case.reference)


def test_after_preemption_sources_are_read_again(case, monkeypatch):
    monkeypatch.setenv("VLLM_KV_CACHE_DEBUG", "1")
    with engine(case.folder, **SMALL_POOL) as llm:
        assert_same(generate(llm, PROMPTS), case.reference)
        assert metric(llm, "num_preemptions") > 0


@pytest.mark.parametrize("layout", ["LBNHC", "BHLNC", "LHBNC", "BLHNC", "BLNHC"])
def test_in_other_layouts(case, layout, monkeypatch):
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    with engine(case.folder) as llm:
        got = generate(llm, PROMPTS[-3:])
    reference = case.reference
    assert_same(got, Generated(got.prompts, reference.tokens[-3:], reference.logits[-3:], []))


def test_an_output_may_begin_with_given_tokens(case):
    starts = [[START, *PROMPTS[4][:n]] for n in (0, 1, 20, 40)]
    prompts = [
        {
            "encoder_prompt": {"prompt_token_ids": source},
            "decoder_prompt": {"prompt_token_ids": start[1:] or start},
        }
        for source, start in zip(PROMPTS[1:5], starts, strict=True)
    ]
    with engine(case.folder, max_num_batched_tokens=16, max_num_seqs=8) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.encoder_prompt_token_ids for output in outputs] == PROMPTS[1:5]
    assert [output.prompt_token_ids for output in outputs] == starts
    got = Generated(
        PROMPTS[1:5],
        [list(output.outputs[0].token_ids) for output in outputs],
        [
            torch.tensor([[row[i].logprob for i in range(VOCAB)] for row in o.outputs[0].logprobs])
            for o in outputs
        ],
        [],
    )
    assert_equals(got, case.hf, starts)


def test_two_kinds_of_caches(case):
    with engine(case.folder) as llm:
        config = llm.llm_engine.client._core.scheduler.kv_cache_manager.kv_cache_config
    kinds = {
        name: type(group.spec_of(name))
        for group in config.kv_cache_groups
        for name in group.layer_names
    }
    assert kinds == {
        f"model.decoder.layers.{i}.{part}.attn": spec
        for i in range(3)
        for part, spec in (("self_attn", FullAttentionSpec), ("encoder_attn", CrossAttentionSpec))
    }


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"encoder_prompt": []}, "the encoder's prompt is empty"),
        ({"encoder_prompt": [5] * 401}, "the encoder's prompt has 401 tokens, and may have at m"),
        ({"decoder_prompt": [5]}, "needs encoder_prompt"),
        ({"encoder_prompt": [VOCAB]}, f"encoder_prompt holds token id {VOCAB}"),
        ({"encoder_prompt": [1], "prompt": "x"}, "has no field 'prompt'"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(case, prompt, message):
    with engine(case.folder) as llm, pytest.raises(VLLMValidationError, match=message):
        llm.generate([prompt], GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    "overrides",
    [
        {"tie_word_embeddings": False},
        {"activation_function": "relu", "scale_embedding": False},
    ],
)
def test_variants(overrides, tmp_path):
    hf = make_bart(**overrides)
    with engine(save(hf, tmp_path)) as llm:
        assert_equals(generate(llm, PROMPTS[3:5]), hf)


def test_missing_and_unexpected_weights_are_listed(case, tmp_path):
    save(case.hf, tmp_path)

    def damage(tensors):
        del tensors["model.decoder.layers.1.encoder_attn.k_proj.bias"]
        del tensors["model.encoder.layers.0.self_attn.v_proj.weight"]
        tensors["model.encoder.layers.2.fc1.weight"] = torch.zeros(1)

    edit(tmp_path, damage)
    message = load_error(tmp_path)
    assert "2 missing: " in message and "1 unexpected: model.encoder.layers.2.fc1" in message
    assert "model.decoder.layers.1.encoder_attn.k_proj.bias" in message
    assert "model.encoder.layers.0.self_attn.v_proj.weight" in message
