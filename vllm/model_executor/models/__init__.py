"""The models that this engine serves, and the registry of their names (imports no torch)."""

from vllm.model_executor.models.registry import ModelRegistry

__all__ = ["ModelRegistry"]
