"""Calls as Hermes and Qwen models write them: ``<tool_call>{"name": ..., ...}</tool_call>``."""

from vllm.entrypoints.openai.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.tool_parsers.abstract_tool_parser import ScanningToolParser
from vllm.entrypoints.openai.tool_parsers.scanners import Scanner, TaggedJSONScanner

__all__ = ["HermesToolParser"]


class HermesToolParser(ScanningToolParser):
    # In some of these models' tokenizers the tags are special tokens.
    keeps_special_tokens = True

    def make_scanner(self, request: ChatCompletionRequest) -> Scanner:
        return TaggedJSONScanner("<tool_call>", "</tool_call>")
