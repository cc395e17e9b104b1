"""The compiled extension ``vllm._C``: whether it is there, its instruction sets, threads and codes.

Its kernels take addresses. Whoever calls one checks dtypes, shapes and strides before; this module
must not know any operator.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from vllm.logger import init_logger, log_once

try:
    from vllm import _C as kernels
except ImportError:
    kernels = None

__all__ = [
    "DTYPE_CODES",
    "GATES",
    "address_of",
    "has_extension",
    "isa",
    "kernels",
    "set_isa",
    "set_num_threads",
    "supported_isas",
]

logger = init_logger(__name__)

# DType and Gate in csrc/cpu/types.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GATES = {"silu": 0, "gelu_tanh": 1, "swiglu_oai": 2, "clamped_silu": 3}


def address_of(x: torch.Tensor | None) -> int:
    """Where the first element lies; 0 for None."""
    return 0 if x is None else x.data_ptr()


def has_extension() -> bool:
    """True if ``vllm._C`` was built and could be loaded."""
    return kernels is not None


def isa() -> str:
    """Name of the instruction set that the kernels use; "pytorch" without the extension."""
    return "pytorch" if kernels is None else kernels.isa()


def supported_isas() -> list[str]:
    """Instruction sets that this processor has kernels for, widest first."""
    return [] if kernels is None else kernels.isas()


def set_isa(name: str) -> None:
    """Use the kernels of another instruction set of ``supported_isas``.

    Raises:
        ValueError: not one of them.
    """
    if kernels is None:
        raise ValueError(f"the extension is not built: there are no kernels called {name}")
    kernels.set_isa(name)


def set_num_threads(count: int, cores: Sequence[int] = ()) -> None:
    """Give the extension ``count`` threads; thread i is bound to ``cores[i]`` if there are any."""
    if kernels is None:
        log_once(
            logger,
            logging.WARNING,
            "vllm._C is not built: the CPU kernels are PyTorch's, several times slower "
            "(install a C++ compiler, then run `make install` again)",
        )
        return
    kernels.set_threads(count, *cores)
