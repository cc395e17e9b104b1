"""Reasoning parsers by name. Imports no parser before it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vllm.errors import ConfigError
from vllm.utils.import_utils import import_plugin_file

if TYPE_CHECKING:
    from vllm.reasoning.abs_reasoning_parsers import ReasoningParser

__all__ = ["ReasoningParserManager"]

_PACKAGE = __name__.rpartition(".")[0]
_OWN = {
    "deepseek_r1": "tag_reasoning_parsers:DeepSeekR1ReasoningParser",
    "deepseek_v3": "tag_reasoning_parsers:ThinkTagReasoningParser",
    "mistral": "tag_reasoning_parsers:MistralReasoningParser",
    "nemotron_v3": "tag_reasoning_parsers:ThinkTagReasoningParser",
    "openai_gptoss": "gptoss_reasoning_parser:GptOssReasoningParser",
    "qwen3": "tag_reasoning_parsers:ThinkTagReasoningParser",
}
# Models whose answers make no sense unparsed.
_DEFAULTS = {"gpt_oss": "openai_gptoss"}


class ReasoningParserManager:
    """The registry, with vLLM's names for plug-ins."""

    _lazy: dict[str, str] = {name: f"{_PACKAGE}.{path}" for name, path in _OWN.items()}
    reasoning_parsers: dict[str, type[ReasoningParser]] = {}

    @classmethod
    def check(cls, name: str) -> None:
        """Raises ConfigError where nobody has registered ``name``."""
        if name not in cls.list_registered():
            raise ConfigError(
                f"--reasoning-parser: no parser named {name!r}; there are "
                f"{', '.join(cls.list_registered())}",
                parameter="--reasoning-parser",
                value=name,
            )

    @classmethod
    def get_reasoning_parser(cls, name: str) -> type[ReasoningParser]:
        """The parser registered as ``name``.

        Raises:
            ConfigError: nobody has registered the name.
        """
        cls.check(name)
        if name not in cls.reasoning_parsers:
            module, _, attribute = cls._lazy[name].partition(":")
            cls.reasoning_parsers[name] = getattr(importlib.import_module(module), attribute)
        return cls.reasoning_parsers[name]

    @classmethod
    def default_for(cls, model_type: str) -> str:
        """The parser of models of this ``model_type`` where none is named; "" for none."""
        return _DEFAULTS.get(model_type, "")

    @classmethod
    def list_registered(cls) -> list[str]:
        return sorted({*cls._lazy, *cls.reasoning_parsers})

    @classmethod
    def register_module(
        cls,
        name: str | list[str] | None = None,
        force: bool = True,
        module: type[ReasoningParser] | None = None,
    ) -> Any:
        """Register ``module`` as ``name``, or decorate a class so: ``@register_module("mine")``.

        Raises:
            KeyError: the name is taken and ``force`` is off.
            TypeError: the class is no ReasoningParser.
        """
        from vllm.reasoning.abs_reasoning_parsers import ReasoningParser

        def register(parser: type[ReasoningParser]) -> type[ReasoningParser]:
            if not (isinstance(parser, type) and issubclass(parser, ReasoningParser)):
                raise TypeError(f"{parser!r} must derive from ReasoningParser")
            names = [name] if isinstance(name, str) else name or [parser.__name__]
            for each in names:
                if not force and each in cls.list_registered():
                    raise KeyError(f"a reasoning parser named {each!r} is registered already")
                cls.reasoning_parsers[each] = parser
            return parser

        return register if module is None else register(module)

    @classmethod
    def register_lazy_module(cls, name: str, module_path: str, class_name: str) -> None:
        """Register a class that is imported when first asked for."""
        cls._lazy[name] = f"{module_path}:{class_name}"

    @classmethod
    def import_reasoning_parser(cls, plugin_path: str) -> None:
        """Run the Python file ``plugin_path``, which registers its parsers.

        Raises:
            ConfigError: the file cannot be imported.
        """
        import_plugin_file(plugin_path, "--reasoning-parser-plugin")
