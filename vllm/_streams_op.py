"""Operators of models with several residual streams: the kernels, and PyTorch's form of them.

Owns what ``_C.streams`` and ``_C.join_streams`` take; as ``_custom_ops``, it checks what C++ will
not, and knows no layer and no model. A branch takes a weighted sum of the streams and gives to
each; the streams are mixed by a matrix that is brought near to a doubly stochastic one (Sinkhorn
and Knopp), so that their size is kept.

Letters: T tokens, N streams.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vllm import _custom_ops as ops
from vllm import _extension

__all__ = ["join_streams", "take_from_streams", "unit_mean_square"]


def unit_mean_square(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Float32 at least, over the last dim."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _kernel_takes(streams: torch.Tensor) -> bool:
    return (
        ops.has_extension()
        and streams.is_cpu
        and streams.dtype in ops.DTYPE_CODES
        and streams.stride(2) == 1
    )


def take_from_streams(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    num_iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a branch takes of the streams, and how they go on.

    Args:
        streams: (T, N, hidden); tokens and streams may be strided.
        fn: (N * (2 + N), N * hidden) float32; base: (N * (2 + N),) and scale: (3,), float32.
        num_iterations: divisions of the mix by the sums of its columns; those by rows are one less.

    Returns:
        What the branch takes (T, hidden), dtype of the streams; its weights in the streams (T, N)
        and their mix (T, N, N), from the first N to the second, float32.
    """
    num_tokens, count, size = streams.shape
    rows = count * (2 + count)
    assert fn.shape == (rows, count * size) and base.shape == (rows,) and scale.shape == (3,)
    if not _kernel_takes(streams):
        return _take(streams, fn, base, scale, num_iterations, eps, norm_eps)
    for x in (fn, base, scale):
        assert x.dtype is torch.float32 and x.is_contiguous()
    branch = torch.empty((num_tokens, size), dtype=streams.dtype)
    given = torch.empty((num_tokens, count), dtype=torch.float32)
    mix = torch.empty((num_tokens, count, count), dtype=torch.float32)
    _extension.kernels.streams(
        streams.data_ptr(),
        streams.stride(0),
        streams.stride(1),
        fn.data_ptr(),
        base.data_ptr(),
        scale.data_ptr(),
        branch.data_ptr(),
        given.data_ptr(),
        mix.data_ptr(),
        num_tokens,
        count,
        size,
        num_iterations,
        eps,
        norm_eps,
        ops.DTYPE_CODES[streams.dtype],
    )
    return branch, given, mix


def _take(
    streams: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    num_iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = streams.shape[1]
    sizes = [count, count, count * count]
    weights = F.linear(unit_mean_square(streams.flatten(1), norm_eps), fn)
    scales = scale.repeat_interleave(torch.tensor(sizes, device=scale.device))
    taken, given, mixed = (weights * scales + base).split(sizes, dim=-1)
    mix = mixed.unflatten(-1, (count, count)).softmax(-1) + eps
    mix = mix / (mix.sum(-2, keepdim=True) + eps)
    for _ in range(num_iterations - 1):
        mix = mix / (mix.sum(-1, keepdim=True) + eps)
        mix = mix / (mix.sum(-2, keepdim=True) + eps)
    taken = taken.sigmoid() + eps
    branch = (taken.unsqueeze(-1) * streams).sum(1).to(streams.dtype)
    return branch, 2 * given.sigmoid(), mix


def join_streams(
    branch: torch.Tensor, streams: torch.Tensor, given: torch.Tensor, mix: torch.Tensor
) -> torch.Tensor:
    """The streams (T, N, hidden) after a branch (T, hidden); see ``take_from_streams``."""
    num_tokens, count, size = streams.shape
    if not _kernel_takes(streams) or branch.dtype is not streams.dtype or branch.stride(1) != 1:
        dtype = streams.dtype
        mixed = torch.matmul(mix.to(dtype).transpose(-1, -2), streams)
        return mixed.add_(given.to(dtype).unsqueeze(-1) * branch.unsqueeze(1))
    assert branch.shape == (num_tokens, size)
    assert given.shape == (num_tokens, count) and mix.shape == (num_tokens, count, count)
    assert given.is_contiguous() and mix.is_contiguous()
    assert given.dtype is torch.float32 and mix.dtype is torch.float32
    out = torch.empty(streams.shape, dtype=streams.dtype)
    _extension.kernels.join_streams(
        branch.data_ptr(),
        branch.stride(0),
        streams.data_ptr(),
        streams.stride(0),
        streams.stride(1),
        given.data_ptr(),
        mix.data_ptr(),
        out.data_ptr(),
        num_tokens,
        count,
        size,
        ops.DTYPE_CODES[streams.dtype],
    )
    return out
