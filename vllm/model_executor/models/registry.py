"""Which class implements which architecture name; dotted paths, imported when first resolved.

Plug-ins add theirs with ``ModelRegistry.register_model``. Importing this module imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from vllm.errors import ConfigError

__all__ = ["ModelRegistry"]

_MODELS = "vllm.model_executor.models"
_BUILT_IN: dict[str, str] = {
    "BambaForCausalLM": f"{_MODELS}.bamba:BambaForCausalLM",
    "BartForConditionalGeneration": f"{_MODELS}.bart:BartForConditionalGeneration",
    "DeepseekV2ForCausalLM": f"{_MODELS}.deepseek_v2:DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM": f"{_MODELS}.deepseek_v2:DeepseekV3ForCausalLM",
    "DeepseekV4ForCausalLM": f"{_MODELS}.deepseek_v4:DeepseekV4ForCausalLM",
    "FalconH1ForCausalLM": f"{_MODELS}.falcon_h1:FalconH1ForCausalLM",
    "FalconMambaForCausalLM": f"{_MODELS}.mamba:FalconMambaForCausalLM",
    "Gemma2ForCausalLM": f"{_MODELS}.gemma2:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": f"{_MODELS}.gemma3:Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration": f"{_MODELS}.gemma3:Gemma3ForConditionalGeneration",
    "GptOssForCausalLM": f"{_MODELS}.gpt_oss:GptOssForCausalLM",
    "GraniteMoeHybridForCausalLM": f"{_MODELS}.granitemoehybrid:GraniteMoeHybridForCausalLM",
    "JambaForCausalLM": f"{_MODELS}.jamba:JambaForCausalLM",
    "KimiLinearForCausalLM": f"{_MODELS}.kimi_linear:KimiLinearForCausalLM",
    "Lfm2ForCausalLM": f"{_MODELS}.lfm2:Lfm2ForCausalLM",
    "Lfm2MoeForCausalLM": f"{_MODELS}.lfm2:Lfm2MoeForCausalLM",
    "Llama4ForCausalLM": f"{_MODELS}.llama4:Llama4ForCausalLM",
    "Llama4ForConditionalGeneration": f"{_MODELS}.llama4:Llama4ForConditionalGeneration",
    "LlamaForCausalLM": f"{_MODELS}.llama:LlamaForCausalLM",
    "Mamba2ForCausalLM": f"{_MODELS}.mamba2:Mamba2ForCausalLM",
    "MambaForCausalLM": f"{_MODELS}.mamba:MambaForCausalLM",
    "MiniMaxForCausalLM": f"{_MODELS}.minimax_text_01:MiniMaxForCausalLM",
    "MiniMaxText01ForCausalLM": f"{_MODELS}.minimax_text_01:MiniMaxText01ForCausalLM",
    "MistralForCausalLM": f"{_MODELS}.llama:MistralForCausalLM",
    "MixtralForCausalLM": f"{_MODELS}.mixtral:MixtralForCausalLM",
    "NemotronHForCausalLM": f"{_MODELS}.nemotron_h:NemotronHForCausalLM",
    "Qwen2ForCausalLM": f"{_MODELS}.qwen2:Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM": f"{_MODELS}.qwen2_moe:Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM": f"{_MODELS}.qwen3:Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM": f"{_MODELS}.qwen3_moe:Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM": f"{_MODELS}.qwen3_next:Qwen3NextForCausalLM",
    "Zamba2ForCausalLM": f"{_MODELS}.zamba2:Zamba2ForCausalLM",
}


class _ModelRegistry:
    def __init__(self, models: dict[str, str]) -> None:
        self._models: dict[str, str | type] = dict(models)

    def get_supported_archs(self) -> list[str]:
        return sorted(self._models)

    def register_model(self, model_arch: str, model_cls: str | type) -> None:
        """Let ``model_cls`` (a class, or ``"module:Class"``) serve ``model_arch``.

        A later registration of the same name wins, so that a plug-in can replace a model.

        Raises:
            ConfigError: a string that isn't of the form ``module:Class``.
        """
        if isinstance(model_cls, str) and len(model_cls.split(":")) != 2:
            raise ConfigError(
                f"register_model({model_arch!r}): give a class or 'module:Class', not {model_cls!r}"
            )
        self._models[model_arch] = model_cls

    def choose_arch(self, architectures: str | Iterable[str] | None) -> str:
        """The first of a model's ``architectures`` that is known; imports nothing.

        Raises:
            ConfigError: none is; the message names the nearest known ones.
        """
        names = [architectures] if isinstance(architectures, str) else list(architectures or ())
        for name in names:
            if name in self._models:
                return name
        known = self.get_supported_archs()
        if not names:
            raise ConfigError(
                "config.json has no 'architectures'; this engine serves: " + ", ".join(known)
            )
        near = difflib.get_close_matches(names[0], known, n=3, cutoff=0.6)
        hint = f"nearest: {', '.join(near)}" if near else f"this engine serves: {', '.join(known)}"
        raise ConfigError(f"the architecture {', '.join(names)} is not supported; {hint}")

    def resolve_model_cls(self, architectures: str | Iterable[str] | None) -> tuple[Any, str]:
        """The model's class, imported now, and the architecture name that it was found under."""
        name = self.choose_arch(architectures)
        target = self._models[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = getattr(import_module(module), attribute)
            self._models[name] = target
        return target, name


ModelRegistry = _ModelRegistry(_BUILT_IN)
