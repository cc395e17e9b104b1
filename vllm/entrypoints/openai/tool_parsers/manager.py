"""Tool parsers by name. Imports no parser before it is asked for, and nothing heavy."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vllm.errors import ConfigError
from vllm.utils.import_utils import import_plugin_file

if TYPE_CHECKING:
    from vllm.entrypoints.openai.tool_parsers.abstract_tool_parser import ToolParser

__all__ = ["ToolParserManager"]

_PACKAGE = __name__.rpartition(".")[0]
_OWN = {
    "hermes": "hermes_tool_parser:HermesToolParser",
    "llama3_json": "llama_tool_parser:Llama3JsonToolParser",
    "llama4_json": "llama_tool_parser:Llama3JsonToolParser",
    "llama4_pythonic": "pythonic_tool_parser:Llama4PythonicToolParser",
    "mistral": "mistral_tool_parser:MistralToolParser",
    "openai": "gptoss_tool_parser:GptOssToolParser",
    "pythonic": "pythonic_tool_parser:PythonicToolParser",
    "qwen3_coder": "qwen3coder_tool_parser:Qwen3CoderToolParser",
    "qwen3_xml": "qwen3coder_tool_parser:Qwen3CoderToolParser",
}


class ToolParserManager:
    """The registry, with vLLM's names for plug-ins."""

    _lazy: dict[str, str] = {name: f"{_PACKAGE}.{path}" for name, path in _OWN.items()}
    tool_parsers: dict[str, type[ToolParser]] = {}

    @classmethod
    def check(cls, name: str) -> None:
        """Raises ConfigError where nobody has registered ``name``."""
        if name not in cls.list_registered():
            raise ConfigError(
                f"--tool-call-parser: no parser named {name!r}; there are "
                f"{', '.join(cls.list_registered())}",
                parameter="--tool-call-parser",
                value=name,
            )

    @classmethod
    def get_tool_parser(cls, name: str) -> type[ToolParser]:
        """The parser registered as ``name``.

        Raises:
            ConfigError: nobody has registered the name.
        """
        cls.check(name)
        if name not in cls.tool_parsers:
            module, _, attribute = cls._lazy[name].partition(":")
            cls.tool_parsers[name] = getattr(importlib.import_module(module), attribute)
        return cls.tool_parsers[name]

    @classmethod
    def list_registered(cls) -> list[str]:
        return sorted({*cls._lazy, *cls.tool_parsers})

    @classmethod
    def register_module(
        cls,
        name: str | list[str] | None = None,
        force: bool = True,
        module: type[ToolParser] | None = None,
    ) -> Any:
        """Register ``module`` as ``name``, or decorate a class so: ``@register_module("mine")``.

        Raises:
            KeyError: the name is taken and ``force`` is off.
            TypeError: the class is no ToolParser.
        """
        from vllm.entrypoints.openai.tool_parsers.abstract_tool_parser import ToolParser

        def register(parser: type[ToolParser]) -> type[ToolParser]:
            if not (isinstance(parser, type) and issubclass(parser, ToolParser)):
                raise TypeError(f"{parser!r} must derive from ToolParser")
            names = [name] if isinstance(name, str) else name or [parser.__name__]
            for each in names:
                if not force and each in cls.list_registered():
                    raise KeyError(f"a tool parser named {each!r} is registered already")
                cls.tool_parsers[each] = parser
            return parser

        return register if module is None else register(module)

    @classmethod
    def register_lazy_module(cls, name: str, module_path: str, class_name: str) -> None:
        """Register a class that is imported when first asked for."""
        cls._lazy[name] = f"{module_path}:{class_name}"

    @classmethod
    def import_tool_parser(cls, plugin_path: str) -> None:
        """Run the Python file ``plugin_path``, which registers its parsers.

        Raises:
            ConfigError: the file cannot be imported.
        """
        import_plugin_file(plugin_path, "--tool-parser-plugin")
