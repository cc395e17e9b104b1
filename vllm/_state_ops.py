"""Operators of layers that keep a state: convolutions, scans, and the norm behind them.

Each continues states that lie in blocks of a cache, in place, and takes every address from the
cache view's strides; ``StateSegments`` says which block a token continues and where states are
kept. On the CPU the compiled extension does the work where it knows the dtypes, on a GPU Triton
(``_triton_state_ops``); else PyTorch does.
This module owns the check of dtypes, shapes and strides before an address is handed to C++; it
must not know layers, caches' owners or models.

Letters: T tokens, R requests, S segments, B cache blocks, I channels, H heads, P width of a head,
G groups, N state size.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm import _extension, _torch_state_ops
from vllm._extension import DTYPE_CODES, address_of
from vllm._torch_state_ops import StateSegments

__all__ = ["StateSegments", "causal_conv1d", "gated_rms_norm", "selective_scan", "ssd_scan"]

# kMaxSteps + 1 and kMaxStates in csrc/cpu/state.cpp.
_MAX_KERNEL = 16
_MAX_STATE_SIZE = 256


def _kernel_takes(state: torch.Tensor, *inputs: torch.Tensor | None) -> bool:
    """The extension knows the dtypes, and rows of the inputs are dense."""
    first = inputs[0]
    assert first is not None
    dtype = first.dtype
    return (
        _extension.kernels is not None
        and first.is_cpu
        and dtype in DTYPE_CODES
        and state.dtype in DTYPE_CODES
        and all(x is None or (x.dtype is dtype and x.stride(-1) == 1) for x in inputs)
    )


def _triton_takes(state: torch.Tensor, *tensors: torch.Tensor | None) -> bool:
    """On a GPU: the dtypes are known and last axes dense; where not, PyTorch computes."""
    return state.is_cuda and all(
        x is None or (x.dtype in DTYPE_CODES and x.stride(-1) == 1) for x in (state, *tensors)
    )


def _parameters_fit(*parameters: torch.Tensor | None) -> bool:
    return all(
        p is None or (p.dtype is torch.float32 and p.is_contiguous() and p.is_cpu)
        for p in parameters
    )


def _heads_are_dense(*inputs: torch.Tensor) -> bool:
    """Heads of (T, H, P) lie side by side in a row."""
    return all(x.shape[1] == 1 or x.stride(1) == x.shape[2] for x in inputs)


def _rows(x: torch.Tensor | None) -> tuple[int, int]:
    """Address and stride of rows; zeros for None."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def _where(segments: StateSegments, state: torch.Tensor, x: torch.Tensor) -> tuple[Any, ...]:
    """The arguments that every kernel on states begins with."""
    tensors = (
        segments.token_starts,
        segments.request_starts,
        segments.sources,
        segments.targets,
    )
    for tensor in tensors:
        assert tensor.dtype is torch.int32 and tensor.is_contiguous()
    return (
        *(tensor.data_ptr() for tensor in tensors),
        segments.num_requests,
        segments.num_tokens,
        state.data_ptr(),
        state.stride(0),
        DTYPE_CODES[x.dtype],
        DTYPE_CODES[state.dtype],
    )


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
    if x.is_cuda and weight.shape[0] > 1 and _triton_takes(x, weight, bias):
        from vllm import _triton_state_ops

        return _triton_state_ops.causal_conv1d(x, weight, bias, conv_state, segments, activation)
    if (
        not _kernel_takes(conv_state, x)
        or not _parameters_fit(weight, bias)
        or not 2 <= weight.shape[0] <= _MAX_KERNEL
        or activation not in (None, "silu")
    ):
        return _torch_state_ops.causal_conv1d(x, weight, bias, conv_state, segments, activation)
    out = torch.empty(x.shape, dtype=x.dtype)
    _extension.kernels.causal_conv1d(
        *_where(segments, conv_state, x),
        conv_state.stride(1),
        conv_state.stride(2),
        *_rows(x),
        out.data_ptr(),
        weight.data_ptr(),
        address_of(bias),
        x.shape[1],
        weight.shape[0],
        activation == "silu",
    )
    return out


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
    if ssm_state[0].is_contiguous() and _triton_takes(ssm_state, x, dt, a, b, c, d, z, dt_bias):
        from vllm import _triton_state_ops

        return _triton_state_ops.selective_scan(x, dt, a, b, c, d, z, dt_bias, ssm_state, segments)
    if (
        not _kernel_takes(ssm_state, x, dt, b, c, z)
        or not _parameters_fit(a, d, dt_bias)
        or not ssm_state[0].is_contiguous()
        or a.shape[1] > _MAX_STATE_SIZE
    ):
        return _torch_state_ops.selective_scan(x, dt, a, b, c, d, z, dt_bias, ssm_state, segments)
    out = torch.empty(x.shape, dtype=x.dtype)
    _extension.kernels.selective_scan(
        *_where(segments, ssm_state, x),
        *_rows(x),
        *_rows(dt),
        *_rows(z),
        *_rows(b),
        *_rows(c),
        out.data_ptr(),
        a.data_ptr(),
        d.data_ptr(),
        address_of(dt_bias),
        *a.shape,
    )
    return out


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
    if ssm_state[0].is_contiguous() and _triton_takes(ssm_state, x, dt, a, b, c, d, dt_bias):
        from vllm import _triton_state_ops

        return _triton_state_ops.ssd_scan(x, dt, a, b, c, d, dt_bias, dt_limit, ssm_state, segments)
    if (
        not _kernel_takes(ssm_state, x, dt, b, c)
        or not _heads_are_dense(x, b, c)
        or not _parameters_fit(a, d, dt_bias)
        or not ssm_state[0].is_contiguous()
    ):
        return _torch_state_ops.ssd_scan(x, dt, a, b, c, d, dt_bias, dt_limit, ssm_state, segments)
    out = torch.empty(x.shape, dtype=x.dtype)
    _extension.kernels.ssd_scan(
        *_where(segments, ssm_state, x),
        *_rows(x),
        *_rows(dt),
        *_rows(b),
        *_rows(c),
        out.data_ptr(),
        a.data_ptr(),
        d.data_ptr(),
        dt_bias.data_ptr(),
        *dt_limit,
        *x.shape[1:],
        *b.shape[1:],
    )
    return out


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
    if _triton_takes(x, gate, weight):
        from vllm import _triton_state_ops

        return _triton_state_ops.gated_rms_norm(x, gate, weight, eps, num_groups, norm_before_gate)
    if not _kernel_takes(x, x, gate) or not _parameters_fit(weight):
        return _torch_state_ops.gated_rms_norm(x, gate, weight, eps, num_groups, norm_before_gate)
    out = torch.empty(x.shape, dtype=x.dtype)
    _extension.kernels.gated_rms_norm(
        *_rows(x),
        *_rows(gate),
        weight.data_ptr(),
        out.data_ptr(),
        *x.shape,
        num_groups,
        eps,
        norm_before_gate,
        DTYPE_CODES[x.dtype],
    )
    return out
