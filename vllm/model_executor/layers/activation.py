"""Activation functions of gated MLPs: (..., 2 * i), gate before up -> (..., i); and of plain ones,
(..., i) -> (..., i), which may write to what they are given.
"""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from vllm import _custom_ops as ops
from vllm.errors import UnsupportedError

__all__ = [
    "ClampedSiluAndMul",
    "GatedActivation",
    "GeluAndMul",
    "SiluAndMul",
    "SquaredReLU",
    "SwigluOAI",
    "get_activation",
    "get_gated_activation",
]


class GatedActivation(nn.Module):
    """``kernel`` names a gate of the CPU kernels, which may take numbers; None: there is none."""

    kernel: str | None = None
    alpha = limit = 0.0


class SiluAndMul(GatedActivation):
    """``silu(first half) * second half``: (..., 2 * i) -> (..., i)."""

    kernel = "silu"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.silu_and_mul(x)


class ClampedSiluAndMul(GatedActivation):
    """``silu(gate) * up``: the gate at most ``limit``, ``up`` within ``[-limit, limit]``."""

    kernel = "clamped_silu"

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate.clamp(max=self.limit)).mul_(up.clamp(-self.limit, self.limit))

    def extra_repr(self) -> str:
        return f"limit={self.limit}"


class GeluAndMul(GatedActivation):
    """``gelu(first half) * second half``; ``approximate`` is "none" or "tanh"."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate
        self.kernel = "gelu_tanh" if approximate == "tanh" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.approximate == "tanh":
            return ops.gelu_tanh_and_mul(x)
        gate, up = x.chunk(2, dim=-1)
        return F.gelu(gate, approximate=self.approximate).mul_(up)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate}"


class SwigluOAI(GatedActivation):
    """gpt-oss's: ``(up + 1) * gate * sigmoid(alpha * gate)``, both clamped.

    The gate is at most ``limit``, the up projection within ``[-limit, limit]``.
    """

    kernel = "swiglu_oai"

    def __init__(self, alpha: float = 1.702, limit: float = 7.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.limit = limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.swiglu_oai_and_mul(x, self.alpha, self.limit)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, limit={self.limit}"


class SquaredReLU(nn.Module):
    """``relu(x) ** 2``, in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu_().square_()


_PLAIN: dict[str, Callable[[], nn.Module]] = {"relu2": SquaredReLU}
_GATED: dict[str, Callable[[], GatedActivation]] = {
    "silu": SiluAndMul,
    "swish": SiluAndMul,
    "gelu": GeluAndMul,
    "gelu_pytorch_tanh": lambda: GeluAndMul("tanh"),
    "gelu_tanh": lambda: GeluAndMul("tanh"),
}


def get_activation(name: str) -> nn.Module:
    """The activation of an MLP without a gate that config.json calls ``name``.

    Raises:
        UnsupportedError: there is none of that name.
    """
    return _find(_PLAIN, name)


def get_gated_activation(name: str) -> GatedActivation:
    """The gated form of the activation that config.json calls ``name``.

    Raises:
        UnsupportedError: there is none of that name.
    """
    return _find(_GATED, name)


_Made = TypeVar("_Made", bound=nn.Module)


def _find(known: Mapping[str, Callable[[], _Made]], name: str) -> _Made:
    if name not in known:
        raise UnsupportedError(
            f"config.json: the activation {name!r} is not supported; these are: {', '.join(known)}",
            parameter="model",
        )
    return known[name]()
