"""Architecture names resolve to classes, late; unknown ones are answered with the nearest."""

import subprocess
import sys

import pytest

from tests.models.checkpoints import make_hf_model, save
from tests.models.harness import TOKENS, PagedModel, make_config
from tests.models.test_llama import assert_logits_equal, reference
from vllm.errors import ConfigError
from vllm.model_executor.models.interfaces import VllmModelForTextGeneration
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.registry import ModelRegistry, _ModelRegistry


@pytest.mark.parametrize("name", ModelRegistry.get_supported_archs())
def test_every_built_in_name_resolves_to_its_class(name):
    cls, found = ModelRegistry.resolve_model_cls([name])
    assert (cls.__name__, found) == (name, name)


def test_names_are_known_without_torch():
    code = (
        "import sys; from vllm.model_executor.models.registry import ModelRegistry as r; "
        "r.choose_arch(['Qwen3ForCausalLM']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_first_known_architecture_wins():
    assert ModelRegistry.choose_arch(["Strange", "Qwen2ForCausalLM"]) == "Qwen2ForCausalLM"


def test_a_plug_in_registers_a_class_or_a_path():
    registry = _ModelRegistry({})
    registry.register_model("A", dict)
    registry.register_model("B", "collections:OrderedDict")
    assert registry.resolve_model_cls("A") == (dict, "A")
    assert registry.resolve_model_cls("B")[0].__name__ == "OrderedDict"
    registry.register_model("A", list)
    assert registry.resolve_model_cls("A")[0] is list


def test_a_path_has_a_module_and_a_class():
    with pytest.raises(ConfigError, match=r"'module:Class', not 'collections.OrderedDict'"):
        _ModelRegistry({}).register_model("B", "collections.OrderedDict")


def test_near_misses():
    with pytest.raises(ConfigError, match="Qwen3ForCausalML is not supported; nearest: Qwen3ForC"):
        ModelRegistry.choose_arch(["Qwen3ForCausalML"])
    with pytest.raises(ConfigError, match=r"Zzz is not supported; this engine serves: .*LlamaF"):
        ModelRegistry.choose_arch("Zzz")


class ScaledLlama(LlamaForCausalLM):
    """A plug-in's model: Llama whose logits are doubled."""

    def compute_logits(self, hidden_states):
        return super().compute_logits(hidden_states) * 2


def test_a_plug_ins_model_is_served(tmp_path, monkeypatch):
    monkeypatch.setattr(ModelRegistry, "_models", dict(ModelRegistry._models))
    ModelRegistry.register_model("ScaledLlamaForCausalLM", f"{__name__}:ScaledLlama")
    hf = make_hf_model("llama")
    save(hf, tmp_path)
    overrides = {"architectures": ["ScaledLlamaForCausalLM"]}
    paged = PagedModel(make_config(tmp_path, hf_overrides=overrides))
    assert isinstance(paged.model, VllmModelForTextGeneration)
    assert_logits_equal(paged.logits(TOKENS) / 2, reference(hf))
