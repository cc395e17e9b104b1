"""Reasoning parsers by name. Imports no parser before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vllm.utils.import_utils import import_plugin_file
from vllm.utils.parser_manager import ParserManager

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


class ReasoningParserManager(ParserManager):
    kind = "reasoning parser"
    option = "--reasoning-parser"
    base = f"{_PACKAGE}.abs_reasoning_parsers:ReasoningParser"
    _lazy = {name: f"{_PACKAGE}.{path}" for name, path in _OWN.items()}
    reasoning_parsers: ClassVar[dict[str, type[ReasoningParser]]] = {}
    _classes = reasoning_parsers

    @classmethod
    def get_reasoning_parser(cls, name: str) -> type[ReasoningParser]:
        """The parser registered as ``name``.

        Raises:
            ConfigError: nobody has registered the name.
        """
        return cls._get(name)

    @classmethod
    def default_for(cls, model_type: str) -> str:
        """The parser of models of this ``model_type`` where none is named; "" for none."""
        return _DEFAULTS.get(model_type, "")

    @classmethod
    def import_reasoning_parser(cls, plugin_path: str) -> None:
        """Run the Python file ``plugin_path``, which registers its parsers.

        Raises:
            ConfigError: the file cannot be imported.
        """
        import_plugin_file(plugin_path, "--reasoning-parser-plugin")
