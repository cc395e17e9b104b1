"""vLLM's older module for ``LLMEngine``."""

from vllm.v1.engine.llm_engine import LLMEngine

__all__ = ["LLMEngine"]
