"""The version, where packages that extend vLLM look for it."""

from vllm import __version__

__all__ = ["__version__"]
