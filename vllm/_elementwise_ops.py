"""Norms, gated activations and the largest value of a row.

Like ``_custom_ops``, whose names these are too, this module checks what C++ will not, and must not
know layers or models. Letters: T tokens, h hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vllm import _extension, _torch_ops
from vllm._extension import DTYPE_CODES, GATES, address_of

_cuda_ops: Any = None
if torch.version.cuda is not None:
    from vllm import _cuda_ops

__all__ = [
    "argmax",
    "fused_add_rms_norm",
    "gelu_tanh_and_mul",
    "layer_norm",
    "rms_norm",
    "silu_and_mul",
    "swiglu_oai_and_mul",
]


def _rows_of(x: torch.Tensor) -> tuple[int, int, int, int] | None:
    """(outer, inner, outer stride, inner stride) of the rows along the last dim, if so told."""
    if x.stride(-1) != 1:
        return None
    if x.dim() == 2:
        return x.shape[0], 1, x.stride(0), 0
    if x.dim() == 3:
        return x.shape[0], x.shape[1], x.stride(0), x.stride(1)
    return (1, 1, 0, 0) if x.dim() == 1 else None


def _norm_kernel_takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        _extension.kernels is not None
        and x.is_cpu
        and x.dtype in DTYPE_CODES
        and (weight.dtype is x.dtype or weight.dtype is torch.float32)
        and weight.is_contiguous()
    )


def _norm_kernel(x: torch.Tensor, weight: torch.Tensor) -> Any:
    return (
        _extension.kernels.rms_norm
        if weight.dtype is x.dtype
        else _extension.kernels.rms_norm_float_weight
    )


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """RMSNorm over the last dim, in fp32 inside; x (..., h) may be strided; weight (h,).

    ``out`` may be ``x`` itself. The weight has the dtype of x, or float32.
    """
    if x.is_cuda and x.dim() <= 3 and x.stride(-1) == 1:
        return _cuda_ops.rms_norm(x, weight, eps, out)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if _norm_kernel_takes(x, weight):
        rows, out_rows = _rows_of(x), _rows_of(out)
        if rows is not None and out_rows is not None:
            _norm_kernel(x, weight)(
                x.data_ptr(),
                out.data_ptr(),
                0,
                weight.data_ptr(),
                rows[0],
                rows[1],
                x.shape[-1],
                rows[2],
                rows[3],
                out_rows[2],
                out_rows[3],
                0,
                eps,
                DTYPE_CODES[x.dtype],
            )
            return out
    return _torch_ops.rms_norm(x, weight, eps, out)


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """In place: ``residual += x``, then ``x = rms_norm(residual)``; both (T, h)."""
    if _norm_kernel_takes(x, weight) and x.dim() == 2 and residual.dtype is x.dtype:
        rows, size = x.shape
        stride = x.stride(0)
        _norm_kernel(x, weight)(
            x.data_ptr(),
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            rows,
            1,
            size,
            stride,
            0,
            stride,
            0,
            residual.stride(0),
            eps,
            DTYPE_CODES[x.dtype],
        )
        return
    if x.is_cuda and x.dim() == 2:
        _cuda_ops.fused_add_rms_norm(x, residual, weight, eps)
        return
    _torch_ops.fused_add_rms_norm(x, residual, weight, eps)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Layer norm of the rows of ``x``, or of ``x + residual``, all (T, h); weight, bias (h,)."""
    rows = [x] if residual is None else [x, residual]
    if (
        _extension.kernels is None
        or not x.is_cpu
        or x.dtype not in DTYPE_CODES
        or any(r.dim() != 2 or r.shape != x.shape or r.stride(1) != 1 for r in rows)
        or any(t.dtype is not x.dtype or t.stride(-1) != 1 for t in (*rows, weight, bias))
    ):
        whole = x if residual is None else x + residual
        return F.layer_norm(whole, whole.shape[-1:], weight, bias, eps)
    out = torch.empty(x.shape, dtype=x.dtype)
    _extension.kernels.layer_norm(
        x.data_ptr(),
        address_of(residual),
        weight.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        *x.shape,
        eps,
        DTYPE_CODES[x.dtype],
    )
    return out


def _gate_kernel_takes(x: torch.Tensor) -> bool:
    return (
        _extension.kernels is not None
        and x.is_cpu
        and x.dtype in DTYPE_CODES
        and x.dim() == 2
        and x.stride(1) == 1
    )


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(x[..., :i]) * x[..., i:]``; x (..., 2 * i) -> (..., i)."""
    if x.is_cuda and x.dim() == 2 and x.stride(1) == 1:
        return _cuda_ops.silu_and_mul(x)
    if not _gate_kernel_takes(x):
        return _torch_ops.silu_and_mul(x)
    rows, width = x.shape
    out = torch.empty((rows, width // 2), dtype=x.dtype)
    _extension.kernels.silu_mul(
        x.data_ptr(), x.stride(0), out.data_ptr(), rows, width // 2, DTYPE_CODES[x.dtype]
    )
    return out


def gelu_tanh_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``gelu(x[..., :i]) * x[..., i:]``, gelu by its tanh formula; x (..., 2 * i) -> (..., i)."""
    out = _gated_mul(x, GATES["gelu_tanh"], 0.0, 0.0)
    return _torch_ops.gelu_tanh_and_mul(x) if out is None else out


def swiglu_oai_and_mul(x: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """``(up + 1) * gate * sigmoid(alpha * gate)``; x (..., 2 * i), gate before up -> (..., i).

    The gate is at most ``limit``, up within ``[-limit, limit]``.
    """
    out = _gated_mul(x, GATES["swiglu_oai"], alpha, limit)
    return _torch_ops.swiglu_oai_and_mul(x, alpha, limit) if out is None else out


def _gated_mul(x: torch.Tensor, gate: int, alpha: float, limit: float) -> torch.Tensor | None:
    """By the kernel; None where it does not take x."""
    if not _gate_kernel_takes(x):
        return None
    rows, width = x.shape
    out = torch.empty((rows, width // 2), dtype=x.dtype)
    _extension.kernels.gated_mul(
        x.data_ptr(),
        x.stride(0),
        out.data_ptr(),
        rows,
        width // 2,
        DTYPE_CODES[x.dtype],
        gate,
        alpha,
        limit,
    )
    return out


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Index of the largest value of each row, the first of equal ones: (T, v) -> (T,) int64.

    A NaN counts as the largest; -1 where the largest is not finite.
    """
    if (
        _extension.kernels is None
        or not logits.is_cpu
        or logits.dtype not in DTYPE_CODES
        or logits.stride(1) != 1
    ):
        return _torch_ops.argmax(logits)
    rows, size = logits.shape
    out = torch.empty(rows, dtype=torch.int64)
    code = DTYPE_CODES[logits.dtype]
    _extension.kernels.argmax(logits.data_ptr(), logits.stride(0), out.data_ptr(), rows, size, code)
    return out
