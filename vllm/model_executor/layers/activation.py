"""Activation functions of gated MLPs: (..., 2 * i), gate before up -> (..., i); and of plain ones,
(..., i) -> (..., i), which may write to what they are given.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from vllm import _custom_ops as ops
from vllm.errors import UnsupportedError

__all__ = [
    "ClampedSiluAndMul",
    "GeluAndMul",
    "SiluAndMul",
    "SquaredReLU",
    "SwigluOAI",
    "get_activation",
    "get_gated_activation",
]


class SiluAndMul(nn.Module):
    """``silu(first half) * second half``: (..., 2 * i) -> (..., i)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.silu_and_mul(x)


class ClampedSiluAndMul(nn.Module):
    """``silu(gate) * up``: the gate at most ``limit``, ``up`` within ``[-limit, limit]``."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate.clamp(max=self.limit)).mul_(up.clamp(-self.limit, self.limit))

    def extra_repr(self) -> str:
        return f"limit={self.limit}"


class GeluAndMul(nn.Module):
    """``gelu(first half) * second half``; ``approximate`` is "none" or "tanh"."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.approximate == "tanh":
            return ops.gelu_tanh_and_mul(x)
        gate, up = x.chunk(2, dim=-1)
        return F.gelu(gate, approximate=self.approximate).mul_(up)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate}"


class SwigluOAI(nn.Module):
    """gpt-oss's: ``(up + 1) * gate * sigmoid(alpha * gate)``, both clamped.

    The gate is at most ``limit``, the up projection within ``[-limit, limit]``.
    """

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
_GATED: dict[str, Callable[[], nn.Module]] = {
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


def get_gated_activation(name: str) -> nn.Module:
    """The gated form of the activation that config.json calls ``name``.

    Raises:
        UnsupportedError: there is none of that name.
    """
    return _find(_GATED, name)


def _find(known: dict[str, Callable[[], nn.Module]], name: str) -> nn.Module:
    if name not in known:
        raise UnsupportedError(
            f"config.json: the activation {name!r} is not supported; these are: {', '.join(known)}",
            parameter="model",
        )
    return known[name]()
