"""Checkpoints load from one file or many; whatever does not fit is one error that lists it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.checkpoints import make_hf_model, save
from tests.models.harness import TOKENS, PagedModel, make_config
from tests.models.test_llama import assert_logits_equal, reference
from vllm.errors import ConfigError, UnsupportedError
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.base_loader import (
    BaseModelLoader,
    _loaders,
    get_model_loader,
    register_model_loader,
)


@pytest.fixture
def hf():
    return make_hf_model("llama")


def edit(folder, change):
    """Rewrite the single weight file with what ``change`` makes of its tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def load_error(folder, **options):
    with pytest.raises(ConfigError) as raised:
        get_model(make_config(folder, **options))
    message = str(raised.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_shards(hf, tmp_path):
    save(hf, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_logits_equal(PagedModel(make_config(tmp_path)).logits(TOKENS), reference(hf))


def test_shards_without_an_index(hf, tmp_path):
    save(hf, tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_logits_equal(PagedModel(make_config(tmp_path)).logits(TOKENS), reference(hf))


def test_files_outside_the_index_are_left_alone(hf, tmp_path):
    save(hf, tmp_path, max_shard_size="100KB")
    save_file({"other": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    get_model(make_config(tmp_path))


def test_fused_projections(hf, tmp_path):
    save(hf, tmp_path)

    def fuse(tensors):
        for layer in range(3):
            prefix = f"model.layers.{layer}"
            for target, parts in (
                (
                    "self_attn.qkv_proj",
                    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                ),
                ("mlp.gate_up_proj", ["mlp.gate_proj", "mlp.up_proj"]),
            ):
                tensors[f"{prefix}.{target}.weight"] = torch.cat(
                    [tensors.pop(f"{prefix}.{part}.weight") for part in parts]
                )

    edit(tmp_path, fuse)
    assert_logits_equal(PagedModel(make_config(tmp_path)).logits(TOKENS), reference(hf))


def test_a_tied_checkpoint_may_carry_its_head(tmp_path):
    hf = make_hf_model("llama", tie_word_embeddings=True)
    save(hf, tmp_path)

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit(tmp_path, add_head)
    assert_logits_equal(PagedModel(make_config(tmp_path)).logits(TOKENS), reference(hf))


def test_a_tied_head_and_embedding_are_one_copy(tmp_path):
    save(make_hf_model("llama", tie_word_embeddings=True), tmp_path)
    model = get_model(make_config(tmp_path))
    assert model.lm_head is model.model.embed_tokens


def test_old_checkpoints_rotary_buffers_are_ignored(hf, tmp_path):
    save(hf, tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(tmp_path, lambda tensors: tensors.update({name: torch.zeros(8)}))
    get_model(make_config(tmp_path))


def test_parameters_are_packed_and_released(hf, tmp_path):
    model = get_model(make_config(save(hf, tmp_path)))
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in hf.named_parameters() if name.endswith("norm.weight")
    }
    assert not model.training


def test_missing_weights_are_listed_by_their_checkpoint_names(hf, tmp_path):
    save(hf, tmp_path)

    def remove(tensors):
        for name in ("self_attn.k_proj", "mlp.up_proj", "input_layernorm"):
            del tensors[f"model.layers.1.{name}.weight"]

    edit(tmp_path, remove)
    message = load_error(tmp_path)
    assert "3 missing: " in message
    for name in ("self_attn.k_proj", "mlp.up_proj", "input_layernorm"):
        assert f"model.layers.1.{name}.weight" in message


def test_an_untied_model_needs_its_head(tmp_path):
    save(make_hf_model("llama", tie_word_embeddings=True), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": False}))
    assert "1 missing: lm_head.weight" in load_error(tmp_path)


def test_missing_unexpected_and_misshaped_are_one_error(hf, tmp_path):
    save(hf, tmp_path)

    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(96)
        tensors["model.layers.0.self_attn.v_proj.weight"] = torch.zeros(48, 96)

    edit(tmp_path, spoil)
    message = load_error(tmp_path)
    assert "1 missing: model.norm.weight" in message
    assert (
        "1 of a wrong shape: model.layers.0.self_attn.v_proj.weight "
        "has shape [48, 96], expected [32, 96]" in message
    )
    assert "2 unexpected: " in message
    assert "model.layers.9.mlp.up_proj.weight" in message


def test_a_long_list_is_cut(hf, tmp_path):
    save(hf, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 5}))
    assert "18 missing: " in (message := load_error(tmp_path))
    assert " and 10 more" in message


def test_a_directory_without_weights(hf, tmp_path):
    hf.config.architectures = ["LlamaForCausalLM"]
    hf.config.save_pretrained(tmp_path)
    assert "holds no .safetensors weights; use --load-format dummy" in load_error(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert "(there are .bin files, which --model cannot load)" in load_error(tmp_path)


def test_a_damaged_file_is_named(hf, tmp_path):
    save(hf, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is damaged or incomplete" in load_error(tmp_path)


def test_a_shard_that_is_not_there_is_named(hf, tmp_path):
    save(hf, tmp_path, max_shard_size="100KB")
    first = min(tmp_path.glob("*.safetensors"))
    first.unlink()
    assert f"names files that are not there: {first.name}" in load_error(tmp_path)


def test_a_damaged_index_is_named(hf, tmp_path):
    save(hf, tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json is damaged" in load_error(tmp_path)


@pytest.mark.parametrize("name", [5, "/etc/passwd", "../other.safetensors"])
def test_an_index_names_files_of_its_directory(hf, tmp_path, name):
    save(hf, tmp_path, max_shard_size="100KB")
    index = {"weight_map": {"model.norm.weight": name, "x": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"no file of this directory: {name!r}" in load_error(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_need_scales_are_refused(hf, tmp_path, dtype):
    """A quantised checkpoint whose config.json does not say so; its numbers alone mean nothing."""
    save(hf, tmp_path)

    def spoil(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)

    edit(tmp_path, spoil)
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight is stored as .*: quant"):
        get_model(make_config(tmp_path))


def test_weights_of_another_dtype_are_converted(hf, tmp_path):
    rounded = make_hf_model("llama")
    with torch.no_grad():
        for param in rounded.parameters():
            param.copy_(param.bfloat16())
    save(hf.to(torch.bfloat16), tmp_path)
    paged = PagedModel(make_config(tmp_path, dtype="float32"))
    assert_logits_equal(paged.logits(TOKENS), reference(rounded))


def test_a_format_that_does_not_fit_the_path(hf, tmp_path):
    save(hf, tmp_path)
    message = load_error(tmp_path, load_format="gguf")
    assert "--load-format gguf cannot read" in message


def test_an_unknown_format_lists_the_known(hf, tmp_path):
    save(hf, tmp_path)
    with pytest.raises(ConfigError, match="'tensorizer' is not known; these are: auto, dummy, gg"):
        get_model(make_config(tmp_path, load_format="tensorizer"))


def test_a_plug_ins_format(hf, tmp_path, monkeypatch):
    monkeypatch.setattr("vllm.model_executor.model_loader.base_loader._loaders", dict(_loaders))
    save(hf, tmp_path)

    @register_model_loader("from-memory")
    class FromMemory(BaseModelLoader):
        def load_weights(self, model, model_config):
            model.load_weights(hf.state_dict().items())

    config = make_config(tmp_path, load_format="from-memory")
    assert isinstance(get_model_loader(config.load_config, str(tmp_path)), FromMemory)
    (tmp_path / "model.safetensors").unlink()
    assert_logits_equal(PagedModel(config).logits(TOKENS), reference(hf))


def test_only_a_loader_can_be_registered():
    with pytest.raises(ValueError, match="must derive from BaseModelLoader"):
        register_model_loader("x")(dict)
