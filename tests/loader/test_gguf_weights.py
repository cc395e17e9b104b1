"""GGUF tensors become exactly the weights that the gguf package's arithmetic gives."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, dequantize

from tests.loader.gguf_writer import write_gguf, write_mamba_gguf
from tests.models.checkpoints import make_hf_model
from tests.models.harness import TOKENS, PagedModel, make_config
from tests.models.parity import assert_equals_transformers, engine, generate
from tests.models.state_checkpoints import make_state_model
from tests.models.test_llama import assert_logits_equal, reference
from vllm.errors import ConfigError, UnsupportedError
from vllm.model_executor.model_loader import get_model, gguf_weights
from vllm.model_executor.model_loader.gguf_weights import gguf_weights as read_weights
from vllm.transformers_utils.gguf_file import read_gguf

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


def make_smollm2_name(name):
    """The names that the conversion script of the default model gives."""
    parts = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    *block, part, kind = name.split(".")
    return ".".join([*(["model.layers", block[1]] if block else []), parts[part], kind])


def round_to_bfloat16(weight):
    """Bits of bfloat16, nearest even."""
    bits = np.ascontiguousarray(weight, dtype="<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def test_the_default_model_is_bit_for_bit_what_numpy_makes_of_it(smollm2_gguf):
    gguf = read_gguf(smollm2_gguf)
    data = np.memmap(smollm2_gguf, dtype=np.uint8)
    theirs = {make_smollm2_name(name): tensor for name, tensor in gguf.tensors.items()}
    layers = ("model.embed", "model.norm", "model.layers.0.", "model.layers.17.")
    seen, compared = set(), 0
    for name, narrow in read_weights(gguf, torch.bfloat16):
        seen.add(name)
        if not name.startswith(layers):
            continue
        compared += 1
        tensor = theirs[name]
        kind = GGMLQuantizationType(tensor.type_id)
        block, size = GGML_QUANT_SIZES[kind]
        end = tensor.offset + int(np.prod(tensor.shape)) // block * size
        raw = data[tensor.offset : end].reshape(tensor.shape[0], -1)
        weight = dequantize(raw, kind).reshape(tensor.shape)
        heads = {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
        if heads:
            rows, columns = weight.shape
            pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
            weight = pairs.swapaxes(1, 2).reshape(rows, columns)
        bits = narrow.view(torch.uint16).numpy()
        assert np.array_equal(bits, round_to_bfloat16(weight)), name
    assert seen == theirs.keys()
    assert compared == 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_format_equals_the_packages_arithmetic(kind, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_weights, "_CHUNK", 96 * 32)  # several chunks, the last one short
    hf = make_hf_model("qwen2")  # rows are not reordered
    path = write_gguf(tmp_path / "m.gguf", hf, quantization=GGMLQuantizationType[kind])
    ours = dict(read_weights(read_gguf(path), dtype))
    assert ours.keys() == hf.state_dict().keys()
    for tensor in GGUFReader(path).tensors:
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        (name,) = (
            n
            for n, t in gguf_weights.gguf_weight_names(read_gguf(path)).items()
            if t.name == tensor.name
        )
        assert torch.equal(ours[name], weight.to(dtype)), name


def test_k_quants_go_through_the_package(tmp_path):
    hf = make_hf_model("qwen2", hidden_size=256, num_attention_heads=4, intermediate_size=256)
    path = write_gguf(tmp_path / "m.gguf", hf, quantization=GGMLQuantizationType.Q8_0)
    gguf = read_gguf(path)
    raw = torch.randint(0, 256, (4, 144), dtype=torch.uint8)
    raw[:, :4] = torch.tensor([0, 60, 0, 56], dtype=torch.uint8)  # finite scales
    (tmp_path / "raw").write_bytes(raw.numpy().tobytes())
    tensor = type(next(iter(gguf.tensors.values())))(
        name="t", shape=(4, 256), type_id=int(GGMLQuantizationType.Q4_K), offset=0
    )
    got = gguf_weights._read(raw.flatten(), tensor, torch.float32, gguf, raw.numel())
    expected = dequantize(raw.numpy(), GGMLQuantizationType.Q4_K)
    assert np.array_equal(got.numpy(), expected.reshape(4, 256))


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_a_float_file_gives_the_logits_of_the_model_it_came_from(model_type, overrides, tmp_path):
    hf = make_hf_model(model_type, **overrides)
    path = write_gguf(tmp_path / "m.gguf", hf)
    assert_logits_equal(PagedModel(make_config(path)).logits(TOKENS), reference(hf))


def test_gemma2_out_of_a_file(tmp_path):
    hf = make_hf_model("gemma2", query_pre_attn_scalar=16)
    caps = {"gemma2.attn_logit_softcapping": 3.0, "gemma2.final_logit_softcapping": 5.0}
    path = write_gguf(tmp_path / "m.gguf", hf, metadata=caps)
    assert_logits_equal(PagedModel(make_config(path)).logits(TOKENS), reference(hf))


@pytest.mark.parametrize("listed", [True, False])
def test_gemma3_out_of_a_file(listed, tmp_path):
    """The pattern of windows is a list of layers, or a number, or six."""
    pattern = {} if listed else {"sliding_window_pattern": 6}
    hf = make_hf_model("gemma3_text", query_pre_attn_scalar=16, **pattern)
    metadata = {
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 4.0,
        "gemma3.rope.freq_base_swa": 1000.0,
    }
    if listed:
        metadata["gemma3.attention.sliding_window_pattern"] = [True, True, False] * 2
    path = write_gguf(tmp_path / "m.gguf", hf, metadata=metadata)
    assert_logits_equal(PagedModel(make_config(path)).logits(TOKENS), reference(hf))


def test_gemmas_norms_keep_their_digits(tmp_path):
    """0.00123 less one and in 16 bits would come back as 0."""
    hf = make_hf_model("gemma3_text").to(torch.bfloat16)
    hf.model.norm.weight.data.fill_(0.00123)
    path = write_gguf(tmp_path / "m.gguf", hf)
    weights = dict(read_weights(read_gguf(path), torch.bfloat16))
    assert torch.equal(weights["model.norm.weight"], hf.model.norm.weight.data)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_loaded_model_holds_weights_rounded_once(dtype, tmp_path):
    hf = make_hf_model("llama")
    path = write_gguf(tmp_path / "m.gguf", hf, quantization=GGMLQuantizationType.Q4_1)
    model = get_model(make_config(path, dtype=dtype))
    wide = dict(read_weights(read_gguf(path), torch.float32))
    layer = model.model.layers[1]
    expected = torch.cat([wide[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv"])
    assert torch.equal(
        layer.self_attn.qkv_proj.packed_weight.unpack(), expected.to(getattr(torch, dtype))
    )
    down = wide["model.layers.1.mlp.down_proj.weight"].to(getattr(torch, dtype))
    assert torch.equal(layer.mlp.down_proj.packed_weight.unpack(), down)


def test_frequency_factors_are_llama3s_scaling(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    hf = make_hf_model("llama", rope_parameters=rope)
    plain = 1.0 / 5000.0 ** (np.arange(0, 16, 2) / 16)
    factors = plain / hf.model.rotary_emb.inv_freq.numpy()
    path = write_gguf(
        tmp_path / "m.gguf", hf, extra={"rope_freqs.weight": factors.astype(np.float32)}
    )
    assert_logits_equal(PagedModel(make_config(path)).logits(TOKENS), reference(hf))


def test_a_file_cut_off_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make_hf_model("llama"))
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(ConfigError, match=r"is incomplete: tensor .* ends at byte"):
        get_model(make_config(path))


def test_a_missing_tensor_is_listed_under_its_hugging_face_name(tmp_path):
    hf = make_hf_model("llama")
    state = {k: v for k, v in hf.state_dict().items() if "layers.2.mlp.up_proj" not in k}
    hf.state_dict = lambda: state
    path = write_gguf(tmp_path / "m.gguf", hf)
    with pytest.raises(ConfigError, match=r"1 missing: model.layers.2.mlp.up_proj.weight"):
        get_model(make_config(path))


def test_an_unknown_tensor_is_listed_under_its_own_name(tmp_path):
    extra = {"blk.0.ffn_gate_exps.weight": np.zeros((2, 2), dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", make_hf_model("llama"), extra=extra)
    with pytest.raises(ConfigError, match=r"1 unexpected: blk.0.ffn_gate_exps.weight"):
        get_model(make_config(path))


def test_an_unknown_type_is_refused_by_number(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make_hf_model("llama"))
    gguf = read_gguf(path)
    tensor = next(iter(gguf.tensors.values()))
    strange = type(tensor)(name="t", shape=(1,), type_id=999, offset=0)
    with pytest.raises(UnsupportedError, match="tensor t has the unknown type 999"):
        gguf_weights._read(torch.zeros(8, dtype=torch.uint8), strange, torch.float32, gguf, 8)


@pytest.mark.parametrize("overrides", [{}, {"use_bias": True, "use_conv_bias": False}])
@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba"])
def test_a_mamba_file_gives_the_logits_of_the_model_it_came_from(model_type, overrides, tmp_path):
    hf = make_state_model(model_type, **overrides)
    if model_type == "falcon_mamba":
        hf.config.mixer_rms_eps = hf.config.layer_norm_epsilon
        hf = reload_state_model(hf)
    path = write_mamba_gguf(tmp_path / "m.gguf", hf)
    with engine(path) as llm:
        assert_equals_transformers(generate(llm, [TOKENS]), hf)


def reload_state_model(hf):
    """The same weights under what the configuration says now: a file has one epsilon for all."""
    again = type(hf)(hf.config).eval()
    again.load_state_dict(hf.state_dict())
    return again


def test_a_quantised_mamba_file_is_expanded(tmp_path):
    hf = make_state_model("mamba", state_size=16)
    path = write_mamba_gguf(tmp_path / "m.gguf", hf, GGMLQuantizationType.Q8_0)
    ours = dict(read_weights(read_gguf(path), torch.float32))
    assert ours.keys() == {n for n in hf.state_dict() if n != "lm_head.weight"}
    for name, theirs in hf.state_dict().items():
        if name != "lm_head.weight":
            assert ours[name].shape == theirs.shape
            most = theirs.abs().max().item()
            assert torch.allclose(ours[name], theirs, atol=most / 100, rtol=1e-5), name
