"""config.json, GGUF metadata and overrides come to one resolved configuration."""

import json
import pickle
import subprocess
import sys

import pytest
import transformers
from gguf import GGUFWriter

from tests.loader.gguf_writer import write_gguf
from tests.models.checkpoints import CLASSES, SHAPE, make_hf_model
from vllm.errors import ConfigError, UnsupportedError
from vllm.transformers_utils.config import (
    derive_max_model_len,
    load_generation_config,
    load_hf_config,
    resolve_model,
)
from vllm.transformers_utils.hf_config import (
    MODEL_TYPE_DEFAULTS,
    fill_in_config,
    uniform_sliding_window,
)

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}


def write_config(folder, **values):
    (folder / "config.json").write_text(json.dumps({**LLAMA, **values}))
    return str(folder)


# The name of the first release of what transformers calls minimax.
UNKNOWN_TO_TRANSFORMERS = {"minimax_text_01"}
# Which layers attend; where nothing says so, one side names all of them and the other none.
SAID_DIFFERENTLY = {
    ("lfm2", "full_attn_idxs"),
    ("lfm2_moe", "full_attn_idxs"),
    ("lfm2_moe", "layer_types"),
}
# Built from layers that other models give RoPE.
ROPE_UNUSED = {"kimi_linear"}


@pytest.mark.parametrize("model_type", sorted({*MODEL_TYPE_DEFAULTS} - UNKNOWN_TO_TRANSFORMERS))
def test_defaults_are_those_of_the_transformers_class(model_type):
    theirs = transformers.AutoConfig.for_model(model_type)
    ours = fill_in_config({"model_type": model_type})
    if model_type not in ROPE_UNUSED:
        # Models without RoPE have none.
        rope = getattr(theirs, "rope_parameters", None)
        assert getattr(ours, "rope_parameters", None) == rope
    for name in MODEL_TYPE_DEFAULTS[model_type]:
        if name == "head_dim":
            width = getattr(theirs, name, None)
            assert ours.head_dim == (width or theirs.hidden_size // theirs.num_attention_heads)
        elif name == "sliding_window":
            # None or zero: there is none.
            assert (ours.sliding_window or None) == (getattr(theirs, name, None) or None)
        elif hasattr(theirs, name) and (model_type, name) not in SAID_DIFFERENTLY:
            assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_saved_config_reads_as_transformers_reads_it(model_type, tmp_path):
    theirs = CLASSES[model_type][0](**SHAPE)
    theirs.architectures = [CLASSES[model_type][1].__name__]
    theirs.save_pretrained(tmp_path)
    ours = load_hf_config(tmp_path)
    assert ours.rope_parameters == theirs.rope_parameters
    for name in ("hidden_size", "num_key_value_heads", "sliding_window", "layer_types", "head_dim"):
        # None or zero: it says nothing, or there is none.
        if getattr(theirs, name, None):
            assert getattr(ours, name) == getattr(theirs, name), name


def test_resolving_imports_no_torch(tmp_path):
    write_config(tmp_path)
    code = (
        "import sys; from vllm.transformers_utils.config import resolve_model; "
        f"resolve_model({str(tmp_path)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_resolved_model(tmp_path):
    write_config(tmp_path, torch_dtype="float16")
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [2, 7]}')
    resolved = resolve_model(str(tmp_path))
    assert resolved.model_path == resolved.tokenizer == str(tmp_path)
    assert resolved.architecture == "LlamaForCausalLM"
    assert resolved.generation_config == {"temperature": 0.6, "eos_token_id": [2, 7]}
    assert resolved.hf_config.dtype == resolved.hf_config.torch_dtype == "float16"
    assert not resolved.is_gguf
    assert pickle.loads(pickle.dumps(resolved)) == resolved


def test_overrides_replace_fields_and_merge_objects(tmp_path):
    write_config(tmp_path, rope_scaling={"rope_type": "linear", "factor": 2.0})
    config = load_hf_config(
        tmp_path, hf_overrides={"hidden_size": 128, "rope_scaling": {"factor": 3.0}}
    )
    assert config.hidden_size == 128
    assert config.rope_parameters == {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}


def test_a_nested_text_config_is_the_text_config():
    config = fill_in_config({"model_type": "x", "text_config": {**LLAMA, "vocab_size": 7}})
    assert config.get_text_config().vocab_size == 7
    assert config.get_text_config().num_attention_heads == 32
    assert config.to_dict()["text_config"]["vocab_size"] == 7


@pytest.mark.parametrize(
    ("values", "length"),
    [
        ({}, 2048),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 4096),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 1000,
                }
            },
            4000,
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 512,
                }
            },
            2048,
        ),
    ],
)
def test_the_length_that_a_model_was_made_for(values, length):
    assert derive_max_model_len(fill_in_config({**LLAMA, **values})) == length


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "x"),
        ("hidden_size", None),
        ("hidden_size", 3),
        ("hidden_size", True),
        ("num_attention_heads", 0),
        ("max_position_embeddings", -1),
        ("rms_norm_eps", None),
        ("rms_norm_eps", "small"),
        ("rope_theta", "x"),
        ("rope_theta", -1.0),
        ("rope_scaling", "linear"),
        ("rope_scaling", {"rope_type": "linear", "factor": "2"}),
    ],
)
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(ConfigError, match=r"config.json: .*must be") as caught:
        fill_in_config({**LLAMA, "num_attention_heads": 4, "hidden_size": 64, name: value})
    message = str(caught.value)
    assert name in message or (isinstance(value, dict) and "factor" in message)


def test_an_unknown_architecture_names_the_nearest(tmp_path):
    write_config(tmp_path, architectures=["LlamaForCasualLM"])
    with pytest.raises(
        ConfigError, match="LlamaForCasualLM is not supported; nearest: LlamaForCau"
    ):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read .*config.json"),
        ("[]", "must hold a JSON object"),
        (json.dumps({**LLAMA, "hidden_size": -1}), "hidden_size must be a positive whole number"),
        (json.dumps({**LLAMA, "num_hidden_layers": "3"}), "num_hidden_layers must be a positive"),
        (
            json.dumps({**LLAMA, "num_attention_heads": 6, "num_key_value_heads": 4}),
            "num_attention_heads 6 is not a multiple of num_key_value_heads 4",
        ),
        (json.dumps({"model_type": "llama"}), "config.json has no 'architectures'"),
    ],
)
def test_a_bad_config_is_one_line(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        resolve_model(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_directory_without_config(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config.json and no .gguf file"):
        resolve_model(str(tmp_path))


def test_gguf_metadata_of_gemma3(tmp_path):
    hf = make_hf_model("gemma3_text")
    hf.save_pretrained(tmp_path / "hf")
    path = write_gguf(
        tmp_path / "m.gguf",
        hf,
        metadata={"gemma3.attention.sliding_window_pattern": 3, "gemma3.rope.freq_base_swa": 1e3},
    )
    theirs, ours = load_hf_config(tmp_path / "hf"), load_hf_config(path)
    for name in ("layer_types", "sliding_window", "tie_word_embeddings", "head_dim", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_parameters["sliding_attention"] == theirs.rope_parameters["sliding_attention"]
    assert ours.query_pre_attn_scalar == 16
    assert resolve_model(str(path)).architecture == "Gemma3ForCausalLM"


@pytest.mark.parametrize(
    ("arch", "layers", "scalar"),
    [("gemma2", 26, 256), ("gemma2", 46, 144), ("gemma3", 48, 256), ("gemma3", 62, 144)],
)
def test_the_largest_gemmas_scale_scores_by_their_width(arch, layers, scalar, tmp_path):
    writer = GGUFWriter(str(tmp_path / "m.gguf"), arch)
    writer.add_block_count(layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(4608)
    writer.add_feed_forward_length(36864)
    writer.add_head_count(32)
    writer.add_key_length(256)
    writer.add_vocab_size(256000)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert load_hf_config(tmp_path / "m.gguf").query_pre_attn_scalar == scalar


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_gguf_metadata_says_what_config_json_says(model_type, tmp_path):
    extra = {"head_dim": 16} if model_type == "qwen3" else {}
    hf = make_hf_model(model_type, rms_norm_eps=1e-5, **extra)
    hf.save_pretrained(tmp_path / "hf")
    path = write_gguf(
        tmp_path / "m.gguf",
        hf,
        metadata={"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2},
    )
    theirs, ours = load_hf_config(tmp_path / "hf"), load_hf_config(path)
    skipped = {"initializer_range", "bos_token_id", "eos_token_id", "rope_parameters"}
    for name in MODEL_TYPE_DEFAULTS[model_type].keys() - skipped:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_parameters["rope_theta"] == theirs.rope_parameters["rope_theta"]
    resolved = resolve_model(str(path))
    assert resolved.is_gguf
    assert resolved.generation_config["eos_token_id"] == 2


def test_the_default_model(smollm2_gguf):
    config = resolve_model("smollm2").hf_config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    assert config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings
    assert config.eos_token_id == 2


def test_a_chat_models_end_of_turn_ends_an_answer(tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf",
        make_hf_model("llama"),
        metadata={"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 9},
    )
    assert load_generation_config(path)["eos_token_id"] == [2, 9]
    assert load_hf_config(path).eos_token_id == 2


def test_gguf_without_what_every_model_needs(tmp_path):
    writer = GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"lacks llama\.embedding_length, llama\.feed_forward"):
        load_hf_config(tmp_path / "m.gguf")


def test_gguf_scaling_forms(tmp_path):
    hf = make_hf_model("llama")
    linear = write_gguf(
        tmp_path / "l.gguf",
        hf,
        metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    )
    assert load_hf_config(linear).rope_parameters["factor"] == 4.0
    strange = write_gguf(tmp_path / "s.gguf", hf, metadata={"llama.rope.scaling.type": "spiral"})
    with pytest.raises(UnsupportedError, match="rope scaling 'spiral' in GGUF is not supported"):
        load_hf_config(strange)


def test_an_unknown_gguf_architecture_is_refused_by_name(tmp_path):
    hf = make_hf_model("llama")
    hf.config.model_type = "rwkv7"
    path = write_gguf(tmp_path / "m.gguf", hf)
    with pytest.raises(UnsupportedError, match="GGUF architecture 'rwkv7' is not supported"):
        load_hf_config(path)


@pytest.mark.parametrize(
    ("layer_types", "window"),
    [
        (None, 8),
        (["sliding_attention"] * 2, 8),
        (["sliding_attention", "full_attention"], None),
        (["full_attention"] * 2, None),
    ],
)
def test_the_window_of_some_layers_is_not_that_of_all(layer_types, window):
    config = fill_in_config({"sliding_window": 8, "layer_types": layer_types})
    assert uniform_sliding_window(config) == window
