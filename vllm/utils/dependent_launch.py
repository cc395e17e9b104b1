"""Programmatic dependent launch: a kernel begins while the one before it ends.

A kernel that is launched with ``options(device)`` may run as soon as every program of the kernel
before it has called ``release``; what it does before ``await_previous`` must read nothing but what
never changes (weights). After that call everything launched earlier has been written: each
kernel's end waits for its predecessor's. Hopper and later; elsewhere nothing changes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["await_previous", "is_hopper", "options", "release"]


@triton.jit
def release(PDL: tl.constexpr) -> None:
    """Let the next kernel begin once all programs are here."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_previous(PDL: tl.constexpr) -> None:
    """Wait until the kernels before this one have written all they write."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """An NVIDIA GPU of compute capability 9.0 or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch: whether the kernel may use the two calls above."""
    if not is_hopper(device):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
