"""vLLM's module for the engine's exceptions; they live in ``vllm.errors``."""

from vllm.errors import EngineDeadError, EngineGenerateError

__all__ = ["EngineDeadError", "EngineGenerateError"]
