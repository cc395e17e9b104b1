"""vLLM's older module for ``AsyncLLMEngine``."""

from vllm.v1.engine.async_llm import AsyncLLM as AsyncLLMEngine

__all__ = ["AsyncLLMEngine"]
