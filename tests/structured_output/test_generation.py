"""A random model's output, held by a grammar, is what was asked for, through the whole engine."""

import json
import re

import pytest
import torch
import transformers

from tests.structured_output.conftest import VOCAB_SIZE
from vllm import LLM, SamplingParams
from vllm.errors import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output import manager as manager_module

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "sizes": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
PROMPT = {"prompt_token_ids": [1, 5, 9]}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A tiny random Llama with the default model's tokenizer, and room for few tokens."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("random")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield LLM(
            model=str(folder),
            tokenizer="smollm2",
            dtype="float32",
            max_model_len=256,
            num_gpu_blocks_override=25,
            block_size=16,
            max_num_seqs=16,
        )


def params(constraint: dict, **fields) -> SamplingParams:
    fields = {"temperature": 1.5, "max_tokens": 200, **fields}
    return SamplingParams(structured_outputs=StructuredOutputsParams(**constraint), **fields)


def check_json(text: str) -> None:
    value = json.loads(text)
    assert value.keys() == {"name", "sizes"}
    assert len(value["name"]) <= 6
    assert len(value["sizes"]) <= 3 and all(size <= 99 for size in value["sizes"])


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_json_is_valid(llm, temperature):
    (output,) = llm.generate([PROMPT], params({"json": SCHEMA}, temperature=temperature, seed=3))
    # The greedy choice of a random model may be to write digits for ever.
    if output.outputs[0].finish_reason == "stop":
        check_json(output.outputs[0].text)
    else:
        assert temperature == 0.0


def test_sequences_of_one_request_are_held_apart(llm):
    (output,) = llm.generate([PROMPT], params({"regex": "[ab]{3}[0-9]"}, n=4, seed=1))
    texts = [sequence.text for sequence in output.outputs]
    assert all(re.fullmatch("[ab]{3}[0-9]", text) for text in texts)
    assert len(set(texts)) > 1


def test_constraints_survive_preemption(llm):
    # 24 blocks of 16 tokens cannot hold 14 requests of 40 and more.
    constraint = {"regex": "([a-z]{2} ){40}end"}
    outputs = llm.generate([PROMPT] * 14, params(constraint))
    assert sum(output.metrics.num_preemptions for output in outputs if output.metrics) > 0
    for output in outputs:
        assert re.fullmatch("([a-z]{2} ){40}end", output.outputs[0].text)


def test_plain_requests_beside_structured_ones_are_not_touched(llm):
    plain = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    (alone,) = llm.generate([PROMPT], plain)
    mixed = llm.generate(
        [PROMPT, PROMPT, PROMPT], [params({"choice": ["yes", "no"]}), plain, params({"regex": "x"})]
    )
    assert mixed[0].outputs[0].text in ("yes", "no")
    assert mixed[1].outputs[0].token_ids == alone.outputs[0].token_ids
    assert mixed[2].outputs[0].text == "x"


def test_max_tokens_and_stop_strings_end_it_early(llm):
    (output,) = llm.generate([PROMPT], params({"regex": "[a-z]+ [a-z]+"}, max_tokens=3))
    assert output.outputs[0].finish_reason in ("length", "stop")
    assert len(output.outputs[0].token_ids) <= 3
    (output,) = llm.generate([PROMPT], params({"regex": "aaaa(bbbb){3}"}, stop=["ab"]))
    assert output.outputs[0].text == "aaa"


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 50}])
def test_a_complete_output_ends_whatever_else_is_asked(llm, fields):
    (output,) = llm.generate([PROMPT], params({"choice": ["yes"]}, **fields))
    assert output.outputs[0].text == "yes"
    assert output.outputs[0].finish_reason == "stop"


def test_logprobs_of_constrained_tokens(llm):
    (output,) = llm.generate([PROMPT], params({"choice": ["yes"]}, logprobs=2))
    sequence = output.outputs[0]
    assert len(sequence.logprobs) == len(sequence.token_ids)
    for token, row in zip(sequence.token_ids, sequence.logprobs, strict=True):
        assert row[token].logprob < 0 and row[token].rank >= 1


@pytest.mark.parametrize("constraint", [{"regex": "("}, {"json": {"type": "nonsense"}}])
def test_a_bad_constraint_is_the_callers_error_and_nobody_elses(llm, constraint):
    with pytest.raises(VLLMValidationError, match="structured_outputs"):
        llm.generate([PROMPT, PROMPT], [params(constraint), params({"choice": ["yes"]})])
    (output,) = llm.generate([PROMPT], params({"choice": ["yes"]}))
    assert output.outputs[0].text == "yes"


def test_a_grammar_that_nobody_can_follow_is_its_requests_error(llm, monkeypatch):
    """Short, legal, and worse with each token: all others would wait for it."""
    manager = llm.llm_engine.client._core.structured_output_manager
    monkeypatch.setattr(manager_module, "_FOLLOW_SECONDS_WHILE_OTHERS_HANG", 2.0)
    monkeypatch.setattr(manager, "_follow_seconds", 2.0)
    endless = params({"regex": "(.*)*" * 30 + "b"}, ignore_eos=True)
    with pytest.raises(VLLMValidationError, match="following the grammar took longer than"):
        llm.generate([PROMPT, PROMPT], [endless, params({"choice": ["yes"]})], use_tqdm=False)
    (output,) = llm.generate(PROMPT, params({"choice": ["yes"]}), use_tqdm=False)
    assert output.outputs[0].text == "yes"
