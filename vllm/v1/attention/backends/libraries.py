"""Libraries with attention kernels that may or may not be installed.

Owns when they are imported (on first use, never at start), and what is said where they are not.
"""

from __future__ import annotations

import functools
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from vllm.errors import ConfigError

__all__ = ["capability", "library", "why_missing"]

_PACKAGES = {
    "flash_attn.cute": "flash-attn-4",
    "flashinfer": "flashinfer-python",
    "aiter": "amd-aiter, on a machine with AMD GPUs",
}


def why_missing(module: str) -> list[str]:
    """A reason to decline where the library is not installed; imports nothing of it but a parent.

    Args:
        module: "flash_attn.cute", "flashinfer" or "aiter".
    """
    parent = module.partition(".")[0]
    if find_spec(parent) is not None and find_spec(module) is not None:
        return []
    return [f"{module} is not installed (pip install {_PACKAGES[module]})"]


@functools.cache
def library(module: str) -> ModuleType:
    """The library, imported on first use.

    Raises:
        ConfigError: it is not installed, with the package to install.
    """
    top = next(name for name in _PACKAGES if module == name or module.startswith(f"{name}."))
    for reason in why_missing(top):
        raise ConfigError(
            f"--attention-backend: {reason}, or choose another", parameter="attention_backend"
        )
    return import_module(module)


@functools.cache
def capability() -> tuple[int, int]:
    """Compute capability of the NVIDIA GPU; (0, 0) without one."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return (0, 0)
    return torch.cuda.get_device_capability()
