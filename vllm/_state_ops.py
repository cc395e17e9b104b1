"""Operators of layers that keep a state: convolutions, scans, and the norm behind them.

Each continues states that lie in blocks of a cache, in place, and takes every address from the
cache view's strides; ``StateSegments`` says which block a token continues and where states are
kept. On the CPU the compiled extension does the work where it knows the dtypes; else PyTorch does.
This module owns the check of dtypes, shapes and strides before an address is handed to C++; it
must not know layers, caches' owners or models.

Letters: T tokens, R requests, S segments, B cache blocks, I channels, H heads, P width of a head,
G groups, N state size.
"""

from __future__ import annotations

import torch

from vllm import _torch_state_ops
from vllm._torch_state_ops import StateSegments

__all__ = ["StateSegments", "causal_conv1d", "gated_rms_norm", "selective_scan", "ssd_scan"]


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    segments: StateSegments,
    activation: str | None = "silu",
) -> torch.Tensor:
    """Depthwise convolution over each request's tokens: ``sum_k weight[k] * x[t - K + 1 + k]``.

    Args:
        x: (T, I), rows may be strided.
        weight: (K, I) float32, dense: the last tap is the token's own.
        bias: (I,) float32.
        conv_state: (B, K - 1, I), any strides: the rows before a request's next token. A layer
            whose cache has the order DS passes the transposed view.
        activation: "silu", or None.

    Returns:
        (T, I), dense, dtype of x.
    """
    return _torch_state_ops.causal_conv1d(x, weight, bias, conv_state, segments, activation)


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    ssm_state: torch.Tensor,
    segments: StateSegments,
) -> torch.Tensor:
    """Mamba 1's recurrence (Gu and Dao 2023, algorithm 2), a state of N for each channel.

    ``dt = softplus(dt + dt_bias)``, ``h = exp(dt * a) * h + dt * b * x``,
    ``y = (c . h + d * x) * silu(z)``.

    Args:
        x, dt, z: (T, I), rows may be strided.
        a: (I, N) float32, below 0.
        b, c: (T, N), rows may be strided.
        d, dt_bias: (I,) float32.
        ssm_state: (B, I, N), the block's stride is any, the others dense.

    Returns:
        (T, I), dense, dtype of x.
    """
    return _torch_state_ops.selective_scan(x, dt, a, b, c, d, z, dt_bias, ssm_state, segments)


def ssd_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    ssm_state: torch.Tensor,
    segments: StateSegments,
) -> torch.Tensor:
    """Mamba 2's recurrence (Dao and Gu 2024), a state (P, N) and one decay for each head.

    ``dt = clamp(softplus(dt + dt_bias), *dt_limit)``, ``h = exp(dt * a) * h + dt * x b^T``,
    ``y = h c + d * x``. Heads share b and c by groups.

    Args:
        x: (T, H, P), rows may be strided, a row is dense.
        dt: (T, H), rows may be strided.
        a, d, dt_bias: (H,) float32; a below 0.
        b, c: (T, G, N), rows may be strided, a row is dense; G divides H.
        ssm_state: (B, H, P, N), the block's stride is any, the others dense.

    Returns:
        (T, H, P), dense, dtype of x.
    """
    return _torch_state_ops.ssd_scan(x, dt, a, b, c, d, dt_bias, dt_limit, ssm_state, segments)


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    num_groups: int = 1,
    norm_before_gate: bool = False,
) -> torch.Tensor:
    """``rms_norm(x * silu(gate)) * weight``, each of the groups of a row normed by itself.

    Args:
        x, gate: (T, I), rows may be strided.
        weight: (I,) float32.
        norm_before_gate: ``rms_norm(x) * weight * silu(gate)`` instead.

    Returns:
        (T, I), dense, dtype of x.
    """
    return _torch_state_ops.gated_rms_norm(x, gate, weight, eps, num_groups, norm_before_gate)
