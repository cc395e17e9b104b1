"""Linear attention, whose state is one matrix a head: the kernel, and PyTorch's form of it.

Owns what ``_C.linear_attention`` takes; as ``_custom_ops``, it checks what C++ will not, and knows
no layer, no cache's owner and no model. The formulas are those of csrc/cpu/linear_attention.cpp.

Letters: T tokens, H heads of values, Hk heads of keys, Dk and Dv their sizes, B cache blocks,
R requests, S segments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vllm import _custom_ops as ops
from vllm import _extension
from vllm._extension import address_of
from vllm._torch_state_ops import StateSegments

__all__ = ["gated_delta_rule", "lightning_attention"]

_NORM_EPS = 1e-6


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    beta: torch.Tensor,
    rates: torch.Tensor,
    biases: torch.Tensor,
    state: torch.Tensor,
    segments: StateSegments,
) -> torch.Tensor:
    """Gated delta rule (arXiv:2412.06464) over the new tokens of several requests.

    For each token and head, with ``g = -rate * softplus(gate + bias)``, ``b = sigmoid(beta)``, keys
    and queries of length one, queries over ``sqrt(Dk)``::

        S = exp(g) * S;  S += b * (v - S k) k^T;  out = S q

    Args:
        query, key: (T, Hk, Dk), value: (T, H, Dv); rows and heads may be strided. H is a multiple
            of Hk: each of their heads serves that many neighbours.
        gate: (T, H), or (T, H, Dk) where each number of a key has a decay of its own, as in Kimi
            delta attention (arXiv:2510.26692). Rows may be strided.
        beta: (T, H), rows may be strided.
        rates: (H,) float32; biases: float32, of the shape of a token's gates.
        state: (B, H, Dv, Dk); blocks and heads may be strided.

    Returns:
        (T, H, Dv), dtype of value. Tokens outside the segments are undefined.
    """
    return _run(
        query,
        key,
        value,
        gate,
        beta,
        rates,
        biases,
        state,
        segments,
        scale=key.shape[2] ** -0.5,
        normalize=True,
    )


def lightning_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rates: torch.Tensor,
    state: torch.Tensor,
    segments: StateSegments,
) -> torch.Tensor:
    """Linear attention that forgets at a fixed rate (arXiv:2401.04658)::

        S = exp(-rate) * S;  S += v k^T;  out = S q

    Arguments as of ``gated_delta_rule``.
    """
    return _run(
        query,
        key,
        value,
        None,
        None,
        rates,
        None,
        state,
        segments,
        scale=1.0,
        normalize=False,
    )


def _run(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor | None,
    beta: torch.Tensor | None,
    rates: torch.Tensor,
    biases: torch.Tensor | None,
    state: torch.Tensor,
    segments: StateSegments,
    scale: float,
    normalize: bool,
) -> torch.Tensor:
    num_tokens, num_heads, value_size = value.shape
    num_key_heads, key_size = key.shape[1:]
    _check_shapes(query, key, value, state)
    if gate is not None and gate.dim() == 3 and gate.shape != (num_tokens, num_heads, key_size):
        raise ValueError(f"gates {tuple(gate.shape)} are not one for each number of a key")
    out = value.new_empty((num_tokens, num_heads, value_size))
    if _triton_takes(query, key, value, gate, beta, rates, biases, state):
        from vllm._triton_linear_attention import linear_attention

        linear_attention(
            query, key, value, gate, beta, rates, biases, state, segments, scale, normalize, out
        )
        return out
    if not _kernel_takes(query, key, value, gate, beta, state):
        _reference(
            query, key, value, gate, beta, rates, biases, state, segments, scale, normalize, out
        )
        return out
    indices = segments.token_starts, segments.request_starts, segments.sources, segments.targets
    assert all(x.dtype is torch.int32 and x.is_contiguous() for x in indices)
    for x in (rates, biases):
        assert x is None or (x.dtype is torch.float32 and x.is_contiguous())
    _extension.kernels.linear_attention(
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        key.data_ptr(),
        key.stride(0),
        key.stride(1),
        value.data_ptr(),
        value.stride(0),
        value.stride(1),
        address_of(gate),
        0 if gate is None else gate.stride(0),
        address_of(beta),
        0 if beta is None else beta.stride(0),
        rates.data_ptr(),
        address_of(biases),
        out.data_ptr(),
        out.stride(0),
        state.data_ptr(),
        state.stride(0),
        state.stride(1),
        *(x.data_ptr() for x in indices),
        segments.num_tokens,
        segments.num_requests,
        num_heads,
        num_key_heads,
        key_size,
        value_size,
        scale,
        normalize,
        gate is not None and gate.dim() == 3,
        ops.DTYPE_CODES[value.dtype],
        ops.DTYPE_CODES[state.dtype],
    )
    return out


def _check_shapes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, state: torch.Tensor
) -> None:
    num_tokens, num_heads, value_size = value.shape
    num_key_heads, key_size = key.shape[1:]
    if (
        query.shape != key.shape
        or key.shape[0] != num_tokens
        or num_heads % num_key_heads
        or state.shape[1:] != (num_heads, value_size, key_size)
    ):
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} and "
            f"state {tuple(state.shape)} do not fit each other"
        )


def _kernel_takes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor | None,
    beta: torch.Tensor | None,
    state: torch.Tensor,
) -> bool:
    inputs = [x for x in (query, key, value, gate, beta) if x is not None]
    return (
        ops.has_extension()
        and state.is_cpu
        and state.dtype in ops.DTYPE_CODES
        and value.dtype in ops.DTYPE_CODES
        and all(x.dtype is value.dtype and x.stride(-1) == 1 for x in inputs)
        and (gate is None or gate.dim() == 2 or gate.stride(1) == gate.shape[2])
        and state.stride(3) == 1
        and state.stride(2) == state.shape[3]
    )


def _triton_takes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor | None,
    beta: torch.Tensor | None,
    rates: torch.Tensor,
    biases: torch.Tensor | None,
    state: torch.Tensor,
) -> bool:
    """On a GPU: the dtypes are known, and rows of heads, states and parameters are dense."""
    inputs = [x for x in (query, key, value, gate, beta) if x is not None]
    return (
        value.is_cuda
        and value.dtype in ops.DTYPE_CODES
        and state.dtype in ops.DTYPE_CODES
        and all(x.stride(-1) == 1 for x in (*inputs, state))
        and all(x is None or x.is_contiguous() for x in (rates, biases))
    )


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor | None,
    beta: torch.Tensor | None,
    rates: torch.Tensor,
    biases: torch.Tensor | None,
    state: torch.Tensor,
    segments: StateSegments,
    scale: float,
    normalize: bool,
    out: torch.Tensor,
) -> None:
    """Token by token, in float32, or float64 where the value is; on any device."""
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    repeats = value.shape[1] // key.shape[1]
    queries, keys = (x.to(wide).repeat_interleave(repeats, dim=1) for x in (query, key))
    if normalize:
        queries, keys = (
            x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPS) for x in (queries, keys)
        )
    queries = queries * scale
    logs = -rates.to(wide)[:, None].expand(*value.shape[:2], 1)
    if gate is not None and biases is not None:
        sums = gate.to(wide) + biases.to(wide)
        logs = logs * F.softplus(
            sums.unflatten(1, (value.shape[1], -1)) if gate.dim() == 2 else sums
        )
    decays = logs.exp()[..., None, :]
    strengths = None if beta is None else beta.to(wide).sigmoid()[..., None]
    for source, parts in segments.runs():
        memory = torch.zeros_like(state[0], dtype=wide)
        if source >= 0:
            memory = state[source].to(wide)
        for first, end, target in parts:
            for t in range(first, end):
                memory = memory * decays[t]
                change = value[t].to(wide)
                if strengths is not None:
                    known = torch.einsum("hvk,hk->hv", memory, keys[t])
                    change = strengths[t] * (change - known)
                memory = memory + change[..., None] * keys[t][:, None]
                out[t] = torch.einsum("hvk,hk->hv", memory, queries[t]).to(out.dtype)
            state[target] = memory.to(state.dtype)
