"""Tool parsers by name. Imports no parser before it is asked for, and nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vllm.utils.import_utils import import_plugin_file
from vllm.utils.parser_manager import ParserManager

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


class ToolParserManager(ParserManager):
    kind = "tool parser"
    option = "--tool-call-parser"
    base = f"{_PACKAGE}.abstract_tool_parser:ToolParser"
    _lazy = {name: f"{_PACKAGE}.{path}" for name, path in _OWN.items()}
    tool_parsers: ClassVar[dict[str, type[ToolParser]]] = {}
    _classes = tool_parsers

    @classmethod
    def get_tool_parser(cls, name: str) -> type[ToolParser]:
        """The parser registered as ``name``.

        Raises:
            ConfigError: nobody has registered the name.
        """
        return cls._get(name)

    @classmethod
    def import_tool_parser(cls, plugin_path: str) -> None:
        """Run the Python file ``plugin_path``, which registers its parsers.

        Raises:
            ConfigError: the file cannot be imported.
        """
        import_plugin_file(plugin_path, "--tool-parser-plugin")
