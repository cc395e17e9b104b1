"""Structured output: grammars compiled off the step loop, and the masks they make each step."""

from vllm.v1.structured_output.manager import StructuredOutputManager
from vllm.v1.structured_output.request import StructuredOutputRequest

__all__ = ["StructuredOutputManager", "StructuredOutputRequest"]
