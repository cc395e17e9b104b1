"""Operators of ``vllm._state_ops`` in Triton: convolution, scans, and the gated norm.

A step of one token for each request is one launch, and depends on the number of requests alone, so
that a CUDA graph can hold it: a target of -1 is a request that is not there, and nothing is
written for it. Sources and targets may be the same blocks. Every address is a stride times an
index. Must not know layers or caches' owners; ``_state_ops`` has checked shapes and dtypes.

Letters as there: T tokens, R requests, S segments, B cache blocks, I channels, H heads, P width of
a head, G groups, N state size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm._torch_state_ops import StateSegments

__all__ = ["causal_conv1d", "gated_rms_norm", "selective_scan", "softplus", "ssd_scan"]

_CONV_TOKENS, _CONV_CHANNELS = 32, 128
# One thread takes channels of 16 bytes.
_CONV_STEP_CHANNELS = 1024
_SCAN_TOKENS, _SCAN_CHANNELS = 16, 16
_SSD_TOKENS, _SSD_EXACT_TOKENS, _SSD_WIDTH = 32, 16, 32
# Requests of one program share its rows of ``a``.
_STEP_REQUESTS, _STEP_CHANNELS, _STEP_WARPS = 4, 64, 4


@triton.jit
def softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


def _precision(x: torch.Tensor) -> str:
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


@triton.jit
def _conv_step_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, out_ptr, sources_ptr, targets_ptr, channels,
    stride_x, stride_w, stride_out, stride_s_b, stride_s_t, stride_s_c,
    KERNEL: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """One token of one request: its output, and the rows of the state moved up by one."""
    request = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channel < channels
    source = tl.load(sources_ptr + request).to(tl.int64)
    target = tl.load(targets_ptr + request).to(tl.int64)
    row = tl.arange(0, ROWS)
    at = state_ptr + channel.to(tl.int64)[None, :] * stride_s_c
    # The state's rows, and the new one below them, all at once.
    window = tl.load(
        at + source * stride_s_b + row[:, None] * stride_s_t,
        mask=(row < KERNEL - 1)[:, None] & valid[None, :] & (source >= 0), other=0.0,
    ).to(tl.float32)  # fmt: skip
    window += tl.load(
        x_ptr + request * stride_x + channel[None, :] + tl.zeros_like(row)[:, None],
        mask=(row == KERNEL - 1)[:, None] & valid[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    weight = tl.load(
        weight_ptr + row[:, None] * stride_w + channel[None, :],
        mask=(row < KERNEL)[:, None] & valid[None, :], other=0.0,
    )  # fmt: skip
    acc = tl.sum(window * weight, 0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + channel, mask=valid, other=0.0)
    # All rows are read before one is written: source and target may be one block.
    tl.debug_barrier()
    tl.store(
        at + target * stride_s_b + (row[:, None] - 1) * stride_s_t, window,
        mask=((row > 0) & (row < KERNEL))[:, None] & valid[None, :] & (target >= 0),
    )  # fmt: skip
    if SILU:
        acc = _silu(acc)
    tl.store(out_ptr + request * stride_out + channel, acc, mask=valid)


@triton.jit(do_not_specialize=["requests"])
def _conv_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, out_ptr, token_starts_ptr, request_starts_ptr,
    sources_ptr, requests, channels,
    stride_x, stride_w, stride_out, stride_s_b, stride_s_t, stride_s_c,
    KERNEL: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Outputs of some tokens of one request; states are only read.

    Request ``i`` owns the tiles from ``first token // TOKENS + i`` on: an upper bound of what the
    requests before it need.
    """
    tile = tl.program_id(1)
    low = 0
    high = requests
    while low < high:
        middle = (low + high) // 2
        first = tl.load(token_starts_ptr + tl.load(request_starts_ptr + middle))
        if first // TOKENS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    request = low - 1
    first = tl.load(token_starts_ptr + tl.load(request_starts_ptr + request))
    end = tl.load(token_starts_ptr + tl.load(request_starts_ptr + request + 1))
    begin = first + (tile - (first // TOKENS + request)) * TOKENS
    if begin >= end:
        return
    source = tl.load(sources_ptr + request).to(tl.int64)
    token = begin + tl.arange(0, TOKENS)
    token_valid = token < end
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channel < channels
    at_state = state_ptr + source * stride_s_b + channel.to(tl.int64)[None, :] * stride_s_c
    acc = tl.zeros([TOKENS, CHANNELS], tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + channel, mask=valid, other=0.0)[None, :]
    for k in tl.static_range(KERNEL):
        position = token - (KERNEL - 1) + k
        new = tl.load(
            x_ptr + position.to(tl.int64)[:, None] * stride_x + channel[None, :],
            mask=((position >= first) & token_valid)[:, None] & valid[None, :], other=0.0,
        )  # fmt: skip
        old = tl.load(
            at_state + (KERNEL - 1 + position - first)[:, None] * stride_s_t,
            mask=((position < first) & (source >= 0))[:, None] & valid[None, :], other=0.0,
        )  # fmt: skip
        weight = tl.load(weight_ptr + k * stride_w + channel, mask=valid, other=0.0)
        acc += (new.to(tl.float32) + old.to(tl.float32)) * weight[None, :]
    if SILU:
        acc = _silu(acc)
    tl.store(
        out_ptr + token.to(tl.int64)[:, None] * stride_out + channel[None, :], acc,
        mask=token_valid[:, None] & valid[None, :],
    )  # fmt: skip


@triton.jit
def _conv_states_kernel(
    x_ptr, state_ptr, token_starts_ptr, request_starts_ptr, sources_ptr, targets_ptr, channels,
    stride_x, stride_s_b, stride_s_t, stride_s_c, KERNEL: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The states after each segment of one request, in order: each continues the one before."""
    request = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channel < channels
    at = state_ptr + channel.to(tl.int64) * stride_s_c
    before = tl.load(sources_ptr + request).to(tl.int64)
    first = tl.load(request_starts_ptr + request)
    last = tl.load(request_starts_ptr + request + 1)
    for segment in tl.range(first, last):
        target = tl.load(targets_ptr + segment).to(tl.int64)
        end = tl.load(token_starts_ptr + segment + 1)
        length = end - tl.load(token_starts_ptr + segment)
        for row in tl.static_range(KERNEL - 1):
            # Rows come from below or from the input, so writing upwards in place is safe.
            is_old = length + row < KERNEL - 1
            old = tl.load(
                at + before * stride_s_b + (length + row) * stride_s_t,
                mask=valid & is_old & (before >= 0), other=0.0,
            )  # fmt: skip
            position = (end - (KERNEL - 1) + row).to(tl.int64)
            new = tl.load(
                x_ptr + position * stride_x + channel, mask=valid & (length + row >= KERNEL - 1),
                other=0.0,
            )  # fmt: skip
            tl.store(
                at + target * stride_s_b + row * stride_s_t,
                old.to(tl.float32) + new.to(tl.float32), mask=valid & (target >= 0),
            )  # fmt: skip
        tl.debug_barrier()
        before = target


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_state: torch.Tensor,
    segments: StateSegments,
    activation: str | None = "silu",
) -> torch.Tensor:
    """See ``vllm._state_ops.causal_conv1d``."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, channels = x.shape
    if not tokens:
        return out
    kernel = weight.shape[0]
    has = {"KERNEL": kernel, "HAS_BIAS": bias is not None, "SILU": activation == "silu"}
    strides = x.stride(0), weight.stride(0), out.stride(0), *conv_state.stride()
    if segments.is_one_token_each:
        size = min(_CONV_STEP_CHANNELS, triton.next_power_of_2(channels))
        _conv_step_kernel[(triton.cdiv(channels, size), tokens)](
            x, weight, bias, conv_state, out, segments.sources, segments.targets, channels,
            *strides, **has, ROWS=triton.next_power_of_2(kernel), CHANNELS=size, num_warps=4,
        )  # fmt: skip
        return out
    parts = triton.cdiv(channels, _CONV_CHANNELS)
    requests = segments.num_requests
    _conv_kernel[(parts, tokens // _CONV_TOKENS + requests)](
        x, weight, bias, conv_state, out, segments.token_starts, segments.request_starts,
        segments.sources, requests, channels, *strides, **has, TOKENS=_CONV_TOKENS,
        CHANNELS=_CONV_CHANNELS, num_warps=4,
    )  # fmt: skip
    _conv_states_kernel[(parts, requests)](
        x, conv_state, segments.token_starts, segments.request_starts, segments.sources,
        segments.targets, channels, x.stride(0), *conv_state.stride(), KERNEL=kernel,
        CHANNELS=_CONV_CHANNELS, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["requests"])
def _scan_step_kernel(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, dt_bias_ptr, state_ptr, out_ptr,
    sources_ptr, targets_ptr, requests, channels,
    stride_x, stride_dt, stride_b, stride_c, stride_z, stride_out, stride_s_b,
    N: tl.constexpr, N_PAD: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    REQUESTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One token each of some requests, for some channels."""
    request = tl.program_id(1) * REQUESTS + tl.arange(0, REQUESTS)
    there = request < requests
    request = request.to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channel < channels
    at_n = tl.arange(0, N_PAD)
    n_valid = at_n < N
    both = valid[:, None] & n_valid[None, :]
    source = tl.load(sources_ptr + request, mask=there, other=-1).to(tl.int64)
    target = tl.load(targets_ptr + request, mask=there, other=-1).to(tl.int64)
    at = channel[:, None] * N + at_n[None, :]
    h = tl.load(
        state_ptr + (source * stride_s_b)[:, None, None] + at[None, :, :],
        mask=(source >= 0)[:, None, None] & both[None, :, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    mask = there[:, None] & valid[None, :]
    mask_n = there[:, None] & n_valid[None, :]
    x = tl.load(x_ptr + (request * stride_x)[:, None] + channel[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    dt = tl.load(dt_ptr + (request * stride_dt)[:, None] + channel[None, :], mask=mask, other=0.0)
    dt = dt.to(tl.float32)
    if HAS_BIAS:
        dt += tl.load(dt_bias_ptr + channel, mask=valid, other=0.0)[None, :]
    dt = softplus(dt)
    a = tl.load(a_ptr + at, mask=both, other=0.0)
    b = tl.load(b_ptr + (request * stride_b)[:, None] + at_n[None, :], mask=mask_n, other=0.0)
    c = tl.load(c_ptr + (request * stride_c)[:, None] + at_n[None, :], mask=mask_n, other=0.0)
    h *= tl.exp(dt[:, :, None] * a[None, :, :])
    h += (dt * x)[:, :, None] * b.to(tl.float32)[:, None, :]
    y = tl.sum(h * c.to(tl.float32)[:, None, :], 2)
    y += x * tl.load(d_ptr + channel, mask=valid, other=0.0)[None, :]
    if HAS_Z:
        at_z = z_ptr + (request * stride_z)[:, None] + channel[None, :]
        y *= _silu(tl.load(at_z, mask=mask, other=0.0).to(tl.float32))
    tl.store(
        state_ptr + (target * stride_s_b)[:, None, None] + at[None, :, :], h,
        mask=(target >= 0)[:, None, None] & both[None, :, :],
    )  # fmt: skip
    tl.store(out_ptr + (request * stride_out)[:, None] + channel[None, :], y, mask=mask)


@triton.jit
def _continue(decay_left, sum_left, decay_right, sum_right):
    return decay_left * decay_right, sum_left * decay_right + sum_right


@triton.jit
def _scan_kernel(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, dt_bias_ptr, state_ptr, out_ptr,
    token_starts_ptr, request_starts_ptr, sources_ptr, targets_ptr, channels,
    stride_x, stride_dt, stride_b, stride_c, stride_z, stride_out, stride_s_b,
    N: tl.constexpr, N_PAD: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some channels of one request: a scan within each run of tokens, runs one after the other."""
    request = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channel < channels
    at_n = tl.arange(0, N_PAD)
    n_valid = at_n < N
    both = valid[:, None] & n_valid[None, :]
    at = channel[:, None] * N + at_n[None, :]
    source = tl.load(sources_ptr + request).to(tl.int64)
    h = tl.load(state_ptr + source * stride_s_b + at, mask=both & (source >= 0), other=0.0)
    h = h.to(tl.float32)
    a = tl.load(a_ptr + at, mask=both, other=0.0)
    d = tl.load(d_ptr + channel, mask=valid, other=0.0)
    bias = tl.zeros([CHANNELS], tl.float32)
    if HAS_BIAS:
        bias += tl.load(dt_bias_ptr + channel, mask=valid, other=0.0)
    rows = tl.arange(0, TOKENS)
    first = tl.load(request_starts_ptr + request)
    last = tl.load(request_starts_ptr + request + 1)
    for segment in tl.range(first, last):
        end = tl.load(token_starts_ptr + segment + 1)
        for begin in tl.range(tl.load(token_starts_ptr + segment), end, TOKENS):
            token = (begin + rows).to(tl.int64)
            there = begin + rows < end
            mask = there[:, None] & valid[None, :]
            mask_n = there[:, None] & n_valid[None, :]
            x = tl.load(x_ptr + token[:, None] * stride_x + channel[None, :], mask=mask, other=0.0)
            x = x.to(tl.float32)
            dt = tl.load(dt_ptr + token[:, None] * stride_dt + channel[None, :], mask=mask, other=0)
            # Past the segment's end nothing decays and nothing comes in.
            dt = tl.where(mask, softplus(dt.to(tl.float32) + bias[None, :]), 0.0)
            b = tl.load(b_ptr + token[:, None] * stride_b + at_n[None, :], mask=mask_n, other=0.0)
            c = tl.load(c_ptr + token[:, None] * stride_c + at_n[None, :], mask=mask_n, other=0.0)
            decays = tl.exp(dt[:, :, None] * a[None, :, :])
            sums = (dt * x)[:, :, None] * b.to(tl.float32)[:, None, :]
            decays, sums = tl.associative_scan((decays, sums), 0, _continue)
            states = decays * h[None, :, :] + sums
            y = tl.sum(states * c.to(tl.float32)[:, None, :], 2) + x * d[None, :]
            if HAS_Z:
                z = tl.load(
                    z_ptr + token[:, None] * stride_z + channel[None, :], mask=mask, other=0.0
                )
                y *= _silu(z.to(tl.float32))
            tl.store(out_ptr + token[:, None] * stride_out + channel[None, :], y, mask=mask)
            h = tl.sum(tl.where((rows == TOKENS - 1)[:, None, None], states, 0.0), 0)
        target = tl.load(targets_ptr + segment).to(tl.int64)
        tl.store(state_ptr + target * stride_s_b + at, h, mask=both & (target >= 0))


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
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, channels = x.shape
    if not tokens:
        return out
    size = a.shape[1]
    strides = [0 if t is None else t.stride(0) for t in (x, dt, b, c, z, out, ssm_state)]
    pointers = x, dt, a, b, c, d, z, dt_bias, ssm_state, out
    has = {"HAS_Z": z is not None, "HAS_BIAS": dt_bias is not None, "N": size}
    has["N_PAD"] = triton.next_power_of_2(size)
    if segments.is_one_token_each:
        grid = triton.cdiv(channels, _STEP_CHANNELS), triton.cdiv(tokens, _STEP_REQUESTS)
        _scan_step_kernel[grid](
            *pointers, segments.sources, segments.targets, tokens, channels, *strides, **has,
            REQUESTS=_STEP_REQUESTS, CHANNELS=_STEP_CHANNELS, num_warps=_STEP_WARPS,
        )  # fmt: skip
        return out
    _scan_kernel[(triton.cdiv(channels, _SCAN_CHANNELS), segments.num_requests)](
        *pointers, segments.token_starts, segments.request_starts, segments.sources,
        segments.targets, channels, *strides, **has,
        TOKENS=max(2, _SCAN_TOKENS * 16 // max(16, has["N_PAD"])), CHANNELS=_SCAN_CHANNELS,
        num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _ssd_step_kernel(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, dt_bias_ptr, state_ptr, out_ptr, sources_ptr,
    targets_ptr, low, high,
    stride_x_t, stride_x_h, stride_dt, stride_b_t, stride_b_g, stride_c_t, stride_c_g,
    stride_out_t, stride_out_h, stride_s_b,
    P: tl.constexpr, N: tl.constexpr, N_PAD: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """One token of one request: some rows of one head."""
    request = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    n = tl.arange(0, N_PAD)
    p_valid = p < P
    n_valid = n < N
    both = p_valid[:, None] & n_valid[None, :]
    source = tl.load(sources_ptr + request).to(tl.int64)
    target = tl.load(targets_ptr + request).to(tl.int64)
    at = head * P * N + p[:, None] * N + n[None, :]
    h = tl.load(state_ptr + source * stride_s_b + at, mask=both & (source >= 0), other=0.0)
    dt = tl.load(dt_ptr + request * stride_dt + head).to(tl.float32)
    dt = softplus(dt + tl.load(dt_bias_ptr + head))
    dt = tl.minimum(tl.maximum(dt, low), high)
    decay = tl.exp(dt * tl.load(a_ptr + head))
    x = tl.load(x_ptr + request * stride_x_t + head * stride_x_h + p, mask=p_valid, other=0.0)
    x = x.to(tl.float32)
    group = head // GROUP
    b = tl.load(b_ptr + request * stride_b_t + group * stride_b_g + n, mask=n_valid, other=0.0)
    c = tl.load(c_ptr + request * stride_c_t + group * stride_c_g + n, mask=n_valid, other=0.0)
    h = h.to(tl.float32) * decay + (dt * x)[:, None] * b.to(tl.float32)[None, :]
    y = tl.sum(h * c.to(tl.float32)[None, :], 1) + x * tl.load(d_ptr + head)
    tl.store(state_ptr + target * stride_s_b + at, h, mask=both & (target >= 0))
    tl.store(out_ptr + request * stride_out_t + head * stride_out_h + p, y, mask=p_valid)


@triton.jit
def _ssd_kernel(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, dt_bias_ptr, state_ptr, out_ptr, token_starts_ptr,
    request_starts_ptr, sources_ptr, targets_ptr, low, high,
    stride_x_t, stride_x_h, stride_dt, stride_b_t, stride_b_g, stride_c_t, stride_c_g,
    stride_out_t, stride_out_h, stride_s_b,
    P: tl.constexpr, N: tl.constexpr, N_PAD: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Some rows of one head of one request, in runs of tokens (Dao and Gu 2024, section 6).

    Within a run, what a token adds reaches a later one by one product of matrices; between runs
    the state carries it.
    """
    request = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    n = tl.arange(0, N_PAD)
    p_valid = p < P
    n_valid = n < N
    both = p_valid[:, None] & n_valid[None, :]
    at = head * P * N + p[:, None] * N + n[None, :]
    source = tl.load(sources_ptr + request).to(tl.int64)
    h = tl.load(state_ptr + source * stride_s_b + at, mask=both & (source >= 0), other=0.0)
    h = h.to(tl.float32)
    a = tl.load(a_ptr + head)
    d = tl.load(d_ptr + head)
    bias = tl.load(dt_bias_ptr + head)
    group = head // GROUP
    rows = tl.arange(0, TOKENS)
    first = tl.load(request_starts_ptr + request)
    last = tl.load(request_starts_ptr + request + 1)
    for segment in tl.range(first, last):
        end = tl.load(token_starts_ptr + segment + 1)
        for begin in tl.range(tl.load(token_starts_ptr + segment), end, TOKENS, num_stages=STAGES):
            token = (begin + rows).to(tl.int64)
            there = begin + rows < end
            x = tl.load(
                x_ptr + token[:, None] * stride_x_t + head * stride_x_h + p[None, :],
                mask=there[:, None] & p_valid[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            mask_n = there[:, None] & n_valid[None, :]
            b = tl.load(
                b_ptr + token[:, None] * stride_b_t + group * stride_b_g + n[None, :], mask=mask_n,
                other=0.0,
            ).to(tl.float32)  # fmt: skip
            c = tl.load(
                c_ptr + token[:, None] * stride_c_t + group * stride_c_g + n[None, :], mask=mask_n,
                other=0.0,
            ).to(tl.float32)  # fmt: skip
            dt = tl.load(dt_ptr + token * stride_dt + head, mask=there, other=0.0).to(tl.float32)
            dt = tl.minimum(tl.maximum(softplus(dt + bias), low), high)
            # Past the segment's end nothing decays and nothing comes in.
            dt = tl.where(there, dt, 0.0)
            left = tl.cumsum(dt * a, 0)
            all_left = tl.sum(dt * a, 0)
            between = tl.where(
                rows[:, None] >= rows[None, :], left[:, None] - left[None, :], float("-inf")
            )
            weights = tl.dot(c, tl.trans(b), input_precision=PRECISION)
            weights *= tl.exp(between) * dt[None, :]
            y = tl.dot(c, tl.trans(h), input_precision=PRECISION) * tl.exp(left)[:, None]
            y = tl.dot(weights, x, y, input_precision=PRECISION) + x * d
            tl.store(
                out_ptr + token[:, None] * stride_out_t + head * stride_out_h + p[None, :], y,
                mask=there[:, None] & p_valid[None, :],
            )  # fmt: skip
            come = x * (tl.exp(all_left - left) * dt)[:, None]
            h = tl.dot(tl.trans(come), b, h * tl.exp(all_left), input_precision=PRECISION)
        target = tl.load(targets_ptr + segment).to(tl.int64)
        tl.store(state_ptr + target * stride_s_b + at, h, mask=both & (target >= 0))


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
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, heads, width = x.shape
    if not tokens:
        return out
    size = b.shape[2]
    pointers = x, dt, a, b, c, d, dt_bias, ssm_state, out
    strides = (
        *x.stride()[:2], dt.stride(0), *b.stride()[:2], *c.stride()[:2], *out.stride()[:2],
        ssm_state.stride(0),
    )  # fmt: skip
    sizes = {"P": width, "N": size, "N_PAD": max(16, triton.next_power_of_2(size))}
    sizes |= {"GROUP": heads // b.shape[1], "WIDTH": _SSD_WIDTH}
    parts = triton.cdiv(width, _SSD_WIDTH)
    if segments.is_one_token_each:
        _ssd_step_kernel[(parts, heads, tokens)](
            *pointers, segments.sources, segments.targets, *dt_limit, *strides, **sizes, num_warps=4
        )
        return out
    # Exact products of float32 take three passes and as many operands.
    tokens_at_once = _SSD_TOKENS if x.dtype != torch.float32 else _SSD_EXACT_TOKENS
    _ssd_kernel[(parts, heads, segments.num_requests)](
        *pointers, segments.token_starts, segments.request_starts, segments.sources,
        segments.targets, *dt_limit, *strides, **sizes, TOKENS=tokens_at_once, STAGES=1,
        PRECISION=_precision(x), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _gated_norm_kernel(
    x_ptr, gate_ptr, weight_ptr, out_ptr, eps, size, stride_x, stride_gate, stride_out,
    NORM_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group of one row."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    at = tl.arange(0, BLOCK)
    valid = at < size
    at += group * size
    x = tl.load(x_ptr + row * stride_x + at, mask=valid, other=0.0).to(tl.float32)
    gate = _silu(tl.load(gate_ptr + row * stride_gate + at, mask=valid, other=0.0).to(tl.float32))
    if not NORM_FIRST:
        x *= gate
    x *= tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    x *= tl.load(weight_ptr + at, mask=valid, other=0.0)
    if NORM_FIRST:
        x *= gate
    tl.store(out_ptr + row * stride_out + at, x, mask=valid)


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    num_groups: int,
    norm_before_gate: bool,
) -> torch.Tensor:
    """See ``vllm._state_ops.gated_rms_norm``."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, width = x.shape
    size = width // num_groups
    if rows:
        block = triton.next_power_of_2(size)
        _gated_norm_kernel[(rows, num_groups)](
            x, gate, weight, out, eps, size, x.stride(0), gate.stride(0), out.stride(0),
            NORM_FIRST=norm_before_gate, BLOCK=block, num_warps=min(max(block // 256, 1), 16),
        )  # fmt: skip
    return out
