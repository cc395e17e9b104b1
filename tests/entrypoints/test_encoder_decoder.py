"""A model with an encoder behind the HTTP server: a prompt is what the encoder reads."""

import pytest
import torch
import transformers

from tests.entrypoints.server import Server
from vllm.transformers_utils.tokenizer import get_tokenizer

SOURCE = "The quick brown fox jumps over the lazy dog."
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def hf():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=49152,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
        init_std=0.3,
        forced_eos_token_id=None,
    )
    return transformers.BartForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def server(hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bart")
    hf.save_pretrained(folder)
    options = ("--tokenizer", "smollm2", "--dtype", "float32", "--kv-cache-memory-bytes", "16M")
    with Server(folder / "log", *options, "--served-model-name", "bart", model=str(folder)) as one:
        yield one


def test_a_prompt_is_read_by_the_encoder(server, hf):
    tokenizer = get_tokenizer("smollm2")
    source = tokenizer(SOURCE).input_ids
    theirs = hf.generate(
        torch.tensor([source]),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        num_beams=1,
        eos_token_id=-1,
    )
    expected = tokenizer.decode(theirs[0, 1:])
    options = {"max_tokens": NUM_TOKENS, "temperature": 0.0, "extra_body": {"ignore_eos": True}}
    for prompt in (SOURCE, source):
        answer = server.client.completions.create(model="bart", prompt=prompt, **options)
        assert answer.choices[0].text == expected
        assert answer.usage.prompt_tokens == len(source)
        assert answer.usage.completion_tokens == NUM_TOKENS
    parts = server.client.completions.create(model="bart", prompt=SOURCE, stream=True, **options)
    assert "".join(part.choices[0].text for part in parts) == expected


def test_a_source_that_is_too_long_is_refused(server):
    answer = server.post("/v1/completions", {"model": "bart", "prompt": [5] * 129})
    assert answer.status_code == 400
    assert "128" in answer.json()["error"]["message"]
