"""Llama 4's language model gives the logits of transformers: chunks, no RoPE, experts."""

import pytest
import torch
import transformers

from tests.models.checkpoints import KINDS, SHAPE, make_hf_model, save
from tests.models.harness import TOKENS, PagedModel, make_config
from tests.models.parity import engine
from tests.models.test_llama import BACKENDS, assert_logits_equal, reference
from vllm.errors import ConfigError
from vllm.model_executor.layers.attention import ChunkedLocalAttention
from vllm.model_executor.models.llama4 import Llama4MoE

VARIANTS = {
    "plain": {},
    "no norm over heads": {"use_qk_norm": False},
    "no temperature": {"attn_temperature_tuning": False},
    "two experts a token": {"num_experts_per_tok": 2},
    "experts everywhere": {"interleave_moe_layer_step": 1},
    "experts in some layers": {"moe_layers": [0, 4]},
    "no chunks": {"layer_types": ["full_attention"] * 6},
    "RoPE everywhere": {"no_rope_layers": [1] * 6},
    "biases": {"attention_bias": True},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_llama4_equals_transformers(variant, backend, tmp_path):
    hf = make_hf_model("llama4_text", **VARIANTS[variant])
    paged = PagedModel(make_config(save(hf, tmp_path), backend=backend))
    assert_logits_equal(paged.logits(TOKENS), reference(hf))


@pytest.mark.parametrize("chunk", [1, 9, 32, 45])
def test_steps_need_not_end_where_chunks_do(chunk, tmp_path):
    hf = make_hf_model("llama4_text")
    paged = PagedModel(make_config(save(hf, tmp_path)))
    assert_logits_equal(paged.logits(TOKENS, chunk=chunk), reference(hf))


def test_a_batch_whose_requests_cross_chunks(tmp_path):
    hf = make_hf_model("llama4_text")
    paged = PagedModel(make_config(save(hf, tmp_path)))
    got = {row: [] for row in range(3)}
    for sizes in ({0: 31, 1: 5}, {0: 2, 1: 60, 2: 33}, {0: 1, 1: 1, 2: 31}, {0: 36, 2: 1}):
        chunks = {
            row: TOKENS[paged.computed[row] : paged.computed[row] + size]
            for row, size in sizes.items()
        }
        for row, logits in paged.step(chunks).items():
            got[row].append(logits)
    expected = reference(hf)
    for parts in got.values():
        ours = torch.cat(parts)
        assert_logits_equal(ours, expected[: len(ours)])


def test_kinds_of_layers(tmp_path):
    paged = PagedModel(make_config(save(make_hf_model("llama4_text"), tmp_path)))
    chunked = [isinstance(layer, ChunkedLocalAttention) for layer in paged.layers.values()]
    assert chunked == [True, True, False] * 2
    layers = paged.model.model.layers
    assert [layer.self_attn.rotary_emb is None for layer in layers] == [False, False, True] * 2
    assert [isinstance(layer.mlp, Llama4MoE) for layer in layers] == [False, True] * 3


def test_the_language_model_out_of_one_that_sees(tmp_path):
    text = transformers.Llama4TextConfig(**{**SHAPE, **KINDS["llama4_text"]})
    vision = transformers.Llama4VisionConfig(
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        vision_output_dim=16,
        projector_input_dim=16,
        projector_output_dim=16,
    )
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    hf = transformers.Llama4ForConditionalGeneration(config).eval()
    save(hf, tmp_path)
    paged = PagedModel(make_config(tmp_path))
    assert type(paged.model).__name__ == "Llama4ForConditionalGeneration"
    assert_logits_equal(paged.logits(TOKENS), reference(hf))


def test_blocks_that_do_not_divide_chunks_are_refused(tmp_path):
    save(make_hf_model("llama4_text"), tmp_path)
    with (
        pytest.raises(ConfigError, match="attention_chunk_size 32 is not a multiple of the 64 tok"),
        engine(tmp_path, block_size=64, max_model_len=200),
    ):
        pass
