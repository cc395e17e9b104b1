"""A config.json that no model could be built from is refused by the name of its field."""

import pytest

from vllm.errors import ConfigError
from vllm.transformers_utils.hf_config import MODEL_TYPE_DEFAULTS, fill_in_config

FULL = "full_attention"


@pytest.mark.parametrize(
    ("model_type", "field", "value", "told"),
    [
        ("mistral", "sliding_window", "8", "sliding_window must be a whole number, not '8'"),
        ("llama4_text", "attention_chunk_size", [8], "attention_chunk_size must be a whole number"),
        ("mixtral", "num_local_experts", "x", "num_local_experts must be a number, not 'x'"),
        ("qwen2_moe", "decoder_sparse_step", 0, "decoder_sparse_step must be a whole number of at"),
        ("zamba2", "num_mem_blocks", 0, "num_mem_blocks must be a whole number of at least 1"),
        ("mamba", "conv_kernel", 1, "conv_kernel must be a whole number of at least 2, not 1"),
        ("mamba2", "n_groups", 3, "num_heads 128 is not a multiple of n_groups 3"),
        ("qwen3_next", "linear_num_value_heads", 17, "not a multiple of linear_num_key_heads 16"),
        ("granitemoehybrid", "logits_scaling", 0, "logits_scaling must be a number above 0, not 0"),
        ("gemma2", "query_pre_attn_scalar", None, "query_pre_attn_scalar must be a number above 0"),
        ("gpt_oss", "swiglu_limit", None, "swiglu_limit must be a number above 0, not None"),
        ("llama4_text", "floor_scale", 0, "floor_scale must be a number above 0, not 0"),
        ("qwen3", "layer_types", FULL, "layer_types must be a list of names, one a layer"),
        ("qwen3", "layer_types", [{}, FULL], "layer_types must be a list of names, one a layer"),
        ("qwen3", "layer_types", [FULL], "layer_types names 1 layers, but num_hidden_layers is 32"),
        ("qwen3", "layer_types", ["odd"] * 32, "may be full_attention or sliding_attention in th"),
        (
            "llama",
            "layer_types",
            ["chunked_attention"] * 32,
            "in this model, not chunked_attention",
        ),
        ("llama4_text", "layer_types", ["sliding_attention"] * 48, "may be full_attention or chun"),
        ("llama", "eos_token_id", "</s>", "eos_token_id must be a token id or a list of them"),
        ("llama", "eos_token_id", [1, [2]], "eos_token_id must be a token id or a list of them"),
        ("llama4_text", "moe_layers", "all", "moe_layers must be a list of whole numbers"),
        ("kimi_linear", "mlp_layer_types", ["dense"], "mlp_layer_types names 1 layers, but num_hi"),
        ("kimi_linear", "mlp_layer_types", ["odd"] * 99, "may be dense or sparse in this model"),
    ],
)
def test_a_field_that_no_model_can_be_built_from_is_named(model_type, field, value, told):
    with pytest.raises(ConfigError, match=told):
        fill_in_config({"model_type": model_type, field: value})


@pytest.mark.parametrize("model_type", sorted(MODEL_TYPE_DEFAULTS))
def test_numbers_must_be_numbers_in_every_model(model_type):
    with pytest.raises(ConfigError, match=r"config\.json: hidden_size|config\.json: d_model"):
        field = "d_model" if model_type == "bart" else "hidden_size"
        fill_in_config({"model_type": model_type, field: "64"})


def test_null_numbers_and_several_ends_of_a_text_are_fine():
    config = fill_in_config(
        {"model_type": "llama", "eos_token_id": [1, 2], "num_key_value_heads": None}
    )
    assert config.eos_token_id == [1, 2]
    assert config.num_key_value_heads == config.num_attention_heads


def test_models_of_plug_ins_name_their_layers_as_they_like():
    config = fill_in_config({"model_type": "mine", "layer_types": ["a", "b"]})
    assert config.layer_types == ["a", "b"]
