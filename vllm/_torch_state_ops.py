"""PyTorch forms of the operators in ``vllm._state_ops``: the fallback, and the reference in tests.

Every function computes in float32, or in float64 where its input is float64, and works on any
device. Must not know the extension. Letters: T tokens, R requests, S segments, B cache blocks,
I channels, H heads, P width of a head, G groups, N state size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

_CHUNK = 64
"""Tokens whose interactions are one matrix: more cost quadratic work, fewer cost products."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSegments:
    """Which tokens of a step continue which state, and where states are kept.

    A request's tokens of a step lie together. They are cut where a state is to be kept: a segment
    is a run of tokens after which the state is written to a block. A request has at least one, and
    continues the state of its ``source``; each further one continues the segment before it.
    """

    token_starts: torch.Tensor
    """(S + 1,) int32: segment s owns tokens ``[token_starts[s], token_starts[s + 1])``."""
    request_starts: torch.Tensor
    """(R + 1,) int32: request r owns segments ``[request_starts[r], request_starts[r + 1])``."""
    sources: torch.Tensor
    """(R,) int32: block of the state before the step; -1 where there is none: it is all zeros."""
    targets: torch.Tensor
    """(S,) int32: block that the state after a segment is written to."""
    num_tokens: int
    num_requests: int

    @property
    def is_one_token_each(self) -> bool:
        """Every request computes one token, as in decoding: segments are requests are tokens."""
        return self.num_tokens == self.num_requests

    def runs(self) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
        """For each request its source, and (first token, end, target) of its segments."""
        tokens, targets = self.token_starts.tolist(), self.targets.tolist()
        requests = self.request_starts.tolist()
        for r, source in enumerate(self.sources.tolist()):
            segments = range(requests[r], requests[r + 1])
            yield source, [(tokens[s], tokens[s + 1], targets[s]) for s in segments]


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _read(state: torch.Tensor, source: int, dtype: torch.dtype) -> torch.Tensor:
    return state[source].to(dtype) if source >= 0 else torch.zeros_like(state[0], dtype=dtype)


def _gather(state: torch.Tensor, sources: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """States before the step of all requests, (R, ...)."""
    known = (sources >= 0).view(-1, *[1] * (state.dim() - 1))
    return torch.where(known, state[sources.clamp(min=0).long()].to(dtype), 0.0)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    segments: StateSegments,
    activation: str | None = "silu",
) -> torch.Tensor:
    """See ``vllm._state_ops.causal_conv1d``."""
    wide = _wide(x)
    kernel = weight.shape[0]
    taps = weight.to(wide)

    def finish(sums: torch.Tensor) -> torch.Tensor:
        if bias is not None:
            sums = sums + bias
        return (F.silu(sums) if activation == "silu" else sums).to(x.dtype)

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if segments.is_one_token_each:
        rows = torch.cat([_gather(conv_state, segments.sources, wide), x.to(wide)[:, None]], 1)
        conv_state[segments.targets.long()] = rows[:, 1:].to(conv_state.dtype)
        return out.copy_(finish((rows * taps).sum(1)))
    for source, runs in segments.runs():
        past = _read(conv_state, source, wide)
        for start, end, target in runs:
            rows = torch.cat([past, x[start:end].to(wide)])
            sums = sum(rows[k : k + end - start] * taps[k] for k in range(kernel))
            out[start:end] = finish(torch.as_tensor(sums))
            past = rows[end - start :]
            conv_state[target] = past.to(conv_state.dtype)
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
    """See ``vllm._state_ops.selective_scan``."""
    wide = _wide(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    steps = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias
    steps = F.softplus(steps)
    rows, b, c, a, d = x.to(wide), b.to(wide), c.to(wide), a.to(wide), d.to(wide)

    def step(state: torch.Tensor, t: int | slice) -> tuple[torch.Tensor, torch.Tensor]:
        decay = torch.exp(steps[t, ..., None] * a)
        state = state * decay + (steps[t] * rows[t])[..., None] * b[t, ..., None, :]
        return state, (state * c[t, ..., None, :]).sum(-1)

    sums = torch.empty(x.shape, dtype=wide, device=x.device)
    if segments.is_one_token_each:
        state, sums = step(_gather(ssm_state, segments.sources, wide), slice(None))
        ssm_state[segments.targets.long()] = state.to(ssm_state.dtype)
    else:
        for source, runs in segments.runs():
            state = _read(ssm_state, source, wide)
            for start, end, target in runs:
                for t in range(start, end):
                    state, sums[t] = step(state, t)
                ssm_state[target] = state.to(ssm_state.dtype)
    sums = sums + rows * d
    return out.copy_(sums if z is None else sums * F.silu(z.to(wide)))


def _chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """L tokens at once: x (L, H, P), dt (L, H), b, c (L, H, N), state (H, P, N)."""
    decays = torch.cumsum(dt * a, dim=0)  # log of what is left of the state, (L, H)
    length = x.shape[0]
    between = decays[:, None] - decays[None]  # (to, from, H)
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    between = between.masked_fill(~later[..., None], float("-inf")).exp()
    weights = torch.einsum("ihn,jhn->ijh", c, b) * between * dt
    out = torch.einsum("ijh,jhp->ihp", weights, x)
    out += torch.einsum("ihn,hpn->ihp", c, state) * decays.exp()[..., None]
    left = (decays[-1] - decays).exp() * dt
    state = state * decays[-1].exp()[:, None, None]
    return out, state + torch.einsum("jh,jhp,jhn->hpn", left, x, b)


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
    """See ``vllm._state_ops.ssd_scan``."""
    wide = _wide(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    group = x.shape[1] // b.shape[1]
    steps = F.softplus(dt.to(wide) + dt_bias).clamp(*dt_limit)
    rows, a = x.to(wide), a.to(wide)
    b, c = (part.to(wide).repeat_interleave(group, dim=1) for part in (b, c))
    sums = torch.empty(x.shape, dtype=wide, device=x.device)
    if segments.is_one_token_each:
        state = _gather(ssm_state, segments.sources, wide)
        state = state * torch.exp(steps * a)[..., None, None]
        state = state + (steps[..., None] * rows)[..., None] * b[:, :, None]
        ssm_state[segments.targets.long()] = state.to(ssm_state.dtype)
        sums = (state * c[:, :, None]).sum(-1)
    else:
        for source, runs in segments.runs():
            state = _read(ssm_state, source, wide)
            for start, end, target in runs:
                for first in range(start, end, _CHUNK):
                    chunk = slice(first, min(first + _CHUNK, end))
                    sums[chunk], state = _chunk_scan(
                        rows[chunk], steps[chunk], a, b[chunk], c[chunk], state
                    )
                ssm_state[target] = state.to(ssm_state.dtype)
    return out.copy_(sums + rows * d.to(wide)[:, None])


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    num_groups: int,
    norm_before_gate: bool,
) -> torch.Tensor:
    """See ``vllm._state_ops.gated_rms_norm``."""
    wide = _wide(x)
    gates = F.silu(gate.to(wide))
    rows = x.to(wide) if norm_before_gate else x.to(wide) * gates
    groups = rows.unflatten(-1, (num_groups, -1))
    groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + eps)
    rows = groups.flatten(-2) * weight
    return (rows * gates if norm_before_gate else rows).to(x.dtype)
