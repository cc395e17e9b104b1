"""Linear attention, whose state is one matrix a head, in Triton: one step, and prompts in chunks.

With ``G_i`` the sum of a chunk's logarithms of decay up to token i and S the memory before it, the
gated delta rule adds ``u_i k_i^T`` for each token, where (arXiv:2412.06464, section 3.3)::

    u_i + b_i sum_{j<i} (k_i . e^(G_i - G_j) k_j) u_j = b_i (v_i - S e^(G_i) k_i)
    out_i = S e^(G_i) q_i + sum_{j<=i} (q_i . e^(G_i - G_j) k_j) u_j

The unit lower triangular system of a chunk does not depend on S: one kernel inverts those of all
chunks beside each other, a second one goes from chunk to chunk. The inverse is put together from
those of halves, quarters and so on, which is as stable as substitution. Where each number of a key
has a decay of its own, products of keys carry ``e^(G_i - G_j)`` inside, which is never above 1.

A step of one token for each request is one launch that depends on the number of requests alone; a
target of -1 is a request that is not there. Every address is a stride times an index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm._torch_state_ops import StateSegments
from vllm._triton_state_ops import softplus

__all__ = ["ChunkConfig", "chunk_config", "linear_attention"]

_NORM_EPS = tl.constexpr(1e-6)
_STEP_VALUES = 32
_CHUNK_VALUES = 32
_VECTOR_BLOCK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkConfig:
    """Tokens of a chunk, and the launch of the kernel that goes from chunk to chunk.

    With ``narrow`` that kernel's products are of numbers in the inputs' dtype, not of tf32.
    """

    tokens: int
    warps: int
    stages: int
    narrow: bool = False


def chunk_config(dtype: torch.dtype, vector: bool) -> ChunkConfig:
    """What fits registers and shared memory of a Hopper GPU at head sizes of 128.

    Exact products of float32 take three passes and as many operands; decays of each number of a
    key are kept for all pairs of a chunk's tokens.
    """
    if dtype == torch.float32:
        return ChunkConfig(tokens=16, warps=4, stages=1)
    return ChunkConfig(tokens=16 if vector else 32, warps=4, stages=2)


@triton.jit
def _log_decays(
    gate_ptr, rates_ptr, biases_ptr, token, head, dims, mask, stride_g_t, stride_g_h,
    HAS_GATE: tl.constexpr, VECTOR: tl.constexpr, DK: tl.constexpr,
):  # fmt: skip
    """Logarithms of decay: (C,) one a token, or (C, dims) with VECTOR; 0 where masked."""
    rate = tl.load(rates_ptr + head)
    if VECTOR:
        x = tl.load(
            gate_ptr + token[:, None] * stride_g_t + head * stride_g_h + dims[None, :], mask=mask,
            other=0.0,
        ).to(tl.float32)  # fmt: skip
        x += tl.load(biases_ptr + head * DK + dims, mask=dims < DK, other=0.0)[None, :]
        g = tl.where(mask, -rate * softplus(x), 0.0)
    elif HAS_GATE:
        x = tl.load(gate_ptr + token * stride_g_t + head, mask=mask, other=0.0).to(tl.float32)
        g = tl.where(mask, -rate * softplus(x + tl.load(biases_ptr + head)), 0.0)
    else:
        g = tl.where(mask, -rate, 0.0)
    return g


@triton.jit
def _strengths(beta_ptr, token, head, mask, stride_beta):
    x = tl.load(beta_ptr + token * stride_beta + head, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, 1.0 / (1.0 + tl.exp(-x)), 0.0)


@triton.jit
def _step_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, beta_ptr, rates_ptr, biases_ptr, out_ptr, state_ptr,
    sources_ptr, targets_ptr, scale,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_g_t, stride_g_h,
    stride_beta, stride_o_t, stride_o_h, stride_s_b, stride_s_h, stride_s_v,
    DK: tl.constexpr, DK_PAD: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr,
    HAS_GATE: tl.constexpr, VECTOR: tl.constexpr, DELTA: tl.constexpr, NORMALIZE: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """One token of one request: some rows of one head's memory."""
    request = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, DK_PAD)
    values = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    k_valid = dims < DK
    v_valid = values < DV
    both = v_valid[:, None] & k_valid[None, :]
    source = tl.load(sources_ptr + request).to(tl.int64)
    target = tl.load(targets_ptr + request).to(tl.int64)
    at = head * stride_s_h + values[:, None] * stride_s_v + dims[None, :]
    memory = tl.load(state_ptr + source * stride_s_b + at, mask=both & (source >= 0), other=0.0)
    memory = memory.to(tl.float32)
    key_head = head // GROUP
    q = tl.load(q_ptr + request * stride_q_t + key_head * stride_q_h + dims, mask=k_valid, other=0)
    k = tl.load(k_ptr + request * stride_k_t + key_head * stride_k_h + dims, mask=k_valid, other=0)
    q = q.to(tl.float32)
    k = k.to(tl.float32)
    if NORMALIZE:
        q *= tl.rsqrt(tl.sum(q * q, 0) + _NORM_EPS)
        k *= tl.rsqrt(tl.sum(k * k, 0) + _NORM_EPS)
    v = tl.load(v_ptr + request * stride_v_t + head * stride_v_h + values, mask=v_valid, other=0.0)
    v = v.to(tl.float32)
    rate = tl.load(rates_ptr + head)
    if VECTOR:
        x = tl.load(
            gate_ptr + request * stride_g_t + head * stride_g_h + dims, mask=k_valid, other=0.0
        ).to(tl.float32)  # fmt: skip
        x += tl.load(biases_ptr + head * DK + dims, mask=k_valid, other=0.0)
        memory *= tl.exp(-rate * softplus(x))[None, :]
    elif HAS_GATE:
        x = tl.load(gate_ptr + request * stride_g_t + head).to(tl.float32)
        memory *= tl.exp(-rate * softplus(x + tl.load(biases_ptr + head)))
    else:
        memory *= tl.exp(-rate)
    if DELTA:
        beta = tl.load(beta_ptr + request * stride_beta + head).to(tl.float32)
        v = (v - tl.sum(memory * k[None, :], 1)) / (1.0 + tl.exp(-beta))
    memory += v[:, None] * k[None, :]
    out = tl.sum(memory * q[None, :], 1) * scale
    tl.store(state_ptr + target * stride_s_b + at, memory, mask=both & (target >= 0))
    tl.store(out_ptr + request * stride_o_t + head * stride_o_h + values, out, mask=v_valid)


@triton.jit
def _unit_rows(ptr, token, stride_t, dims, mask, NORMALIZE: tl.constexpr):
    x = tl.load(ptr + token[:, None] * stride_t + dims[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    if NORMALIZE:
        x *= tl.rsqrt(tl.sum(x * x, 1) + _NORM_EPS)[:, None]
    return x


@triton.jit
def _factor(x, like_ptr, NARROW: tl.constexpr):
    """A factor of a product, in the dtype that the product takes."""
    if NARROW:
        x = x.to(like_ptr.dtype.element_ty)
    return x


@triton.jit(do_not_specialize=["segments"])
def _chunk_systems_kernel(
    q_ptr, k_ptr, gate_ptr, beta_ptr, rates_ptr, biases_ptr, inverse_ptr, products_ptr,
    token_starts_ptr, segments,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_g_t, stride_g_h, stride_beta,
    DK: tl.constexpr, DK_PAD: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The inverse of one chunk's system for one head; with VECTOR also queries times keys.

    Segment ``i`` owns the chunks from ``token_starts[i] // CHUNK + i`` on.
    """
    head = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    low = 0
    high = segments
    while low < high:
        middle = (low + high) // 2
        if tl.load(token_starts_ptr + middle) // CHUNK + middle <= chunk:
            low = middle + 1
        else:
            high = middle
    segment = low - 1
    first = tl.load(token_starts_ptr + segment)
    end = tl.load(token_starts_ptr + segment + 1)
    begin = first + (chunk - (first // CHUNK + segment)) * CHUNK
    if begin >= end:
        return
    rows = tl.arange(0, CHUNK)
    token = (begin + rows).to(tl.int64)
    there = begin + rows < end
    key_head = head // GROUP
    beta = _strengths(beta_ptr, token, head, there, stride_beta)
    not_later = rows[:, None] >= rows[None, :]
    at = (chunk.to(tl.int64) * tl.num_programs(0) + head) * CHUNK * CHUNK
    at += rows[:, None] * CHUNK + rows[None, :]
    q_rows = q_ptr + key_head * stride_q_h
    k_rows = k_ptr + key_head * stride_k_h
    if VECTOR:
        products = tl.zeros([CHUNK, CHUNK], tl.float32)
        keys = tl.zeros([CHUNK, CHUNK], tl.float32)
        q_square = tl.zeros([CHUNK], tl.float32)
        k_square = tl.zeros([CHUNK], tl.float32)
        for start in tl.range(0, DK_PAD, BLOCK):
            dims = start + tl.arange(0, BLOCK)
            mask = there[:, None] & (dims < DK)[None, :]
            q = _unit_rows(q_rows, token, stride_q_t, dims, mask, False)
            k = _unit_rows(k_rows, token, stride_k_t, dims, mask, False)
            g = _log_decays(
                gate_ptr, rates_ptr, biases_ptr, token, head, dims, mask, stride_g_t, stride_g_h,
                True, True, DK,
            )  # fmt: skip
            left = tl.cumsum(g, 0)
            between = left[:, None, :] - left[None, :, :]
            decays = tl.exp(tl.where(not_later[:, :, None], between, float("-inf")))
            known = decays * k[None, :, :]
            keys += tl.sum(k[:, None, :] * known, 2)
            products += tl.sum(q[:, None, :] * known, 2)
            q_square += tl.sum(q * q, 1)
            k_square += tl.sum(k * k, 1)
        q_scale = tl.rsqrt(q_square + _NORM_EPS)
        k_scale = tl.rsqrt(k_square + _NORM_EPS)
        keys *= k_scale[:, None] * k_scale[None, :]
        products *= q_scale[:, None] * k_scale[None, :]
        tl.store(products_ptr + at, products)
    else:
        dims = tl.arange(0, DK_PAD)
        mask = there[:, None] & (dims < DK)[None, :]
        k = _unit_rows(k_rows, token, stride_k_t, dims, mask, True)
        g = _log_decays(
            gate_ptr, rates_ptr, biases_ptr, token, head, dims, there, stride_g_t, stride_g_h,
            True, False, DK,
        )  # fmt: skip
        left = tl.cumsum(g, 0)
        between = tl.where(not_later, left[:, None] - left[None, :], float("-inf"))
        keys = tl.dot(k, tl.trans(k), input_precision=PRECISION) * tl.exp(between)
    system = tl.where(rows[:, None] > rows[None, :], keys * beta[:, None], 0.0)
    # Inverses of the blocks of 1, 2, 4 ... along the diagonal: [[T1, 0], [-T2 A T1, T2]].
    inverse = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
    for level in tl.static_range(LEVELS):
        size = 1 << level
        below = (rows[:, None] // size != rows[None, :] // size) & (
            rows[:, None] // (2 * size) == rows[None, :] // (2 * size)
        )
        corner = tl.where(below, system, 0.0)
        if level == 0:
            inverse -= corner
        else:
            corner = tl.dot(inverse, corner, input_precision="tf32x3")
            inverse -= tl.dot(corner, inverse, input_precision="tf32x3")
    tl.store(inverse_ptr + at, inverse)


@triton.jit
def _chunks_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, beta_ptr, rates_ptr, biases_ptr, out_ptr, state_ptr,
    inverse_ptr, products_ptr, token_starts_ptr, request_starts_ptr, sources_ptr, targets_ptr,
    scale,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_g_t, stride_g_h,
    stride_beta, stride_o_t, stride_o_h, stride_s_b, stride_s_h, stride_s_v,
    DK: tl.constexpr, DK_PAD: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr,
    HAS_GATE: tl.constexpr, VECTOR: tl.constexpr, DELTA: tl.constexpr, NORMALIZE: tl.constexpr,
    VALUES: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """Some rows of one head's memory through all tokens of one request."""
    request = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, DK_PAD)
    values = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    k_valid = dims < DK
    v_valid = values < DV
    both = v_valid[:, None] & k_valid[None, :]
    at_state = head * stride_s_h + values[:, None] * stride_s_v + dims[None, :]
    source = tl.load(sources_ptr + request).to(tl.int64)
    memory = tl.load(
        state_ptr + source * stride_s_b + at_state, mask=both & (source >= 0), other=0.0
    ).to(tl.float32)  # fmt: skip
    key_head = head // GROUP
    q_rows = q_ptr + key_head * stride_q_h
    k_rows = k_ptr + key_head * stride_k_h
    rows = tl.arange(0, CHUNK)
    not_later = rows[:, None] >= rows[None, :]
    first = tl.load(request_starts_ptr + request)
    last = tl.load(request_starts_ptr + request + 1)
    for segment in tl.range(first, last):
        start = tl.load(token_starts_ptr + segment)
        end = tl.load(token_starts_ptr + segment + 1)
        chunk = (start // CHUNK + segment).to(tl.int64)
        for begin in tl.range(start, end, CHUNK, num_stages=STAGES):
            token = (begin + rows).to(tl.int64)
            there = begin + rows < end
            mask = there[:, None] & k_valid[None, :]
            q = _unit_rows(q_rows, token, stride_q_t, dims, mask, NORMALIZE) * scale
            k = _unit_rows(k_rows, token, stride_k_t, dims, mask, NORMALIZE)
            v = tl.load(
                v_ptr + token[:, None] * stride_v_t + head * stride_v_h + values[None, :],
                mask=there[:, None] & v_valid[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            at = (chunk * tl.num_programs(1) + head) * CHUNK * CHUNK
            at += rows[:, None] * CHUNK + rows[None, :]
            if VECTOR:
                g = _log_decays(
                    gate_ptr, rates_ptr, biases_ptr, token, head, dims, mask, stride_g_t,
                    stride_g_h, True, True, DK,
                )  # fmt: skip
                left = tl.cumsum(g, 0)
                all_left = tl.sum(g, 0)
                k_now = k * tl.exp(left)
                q_now = q * tl.exp(left)
                k_then = k * tl.exp(all_left[None, :] - left)
                decay = tl.exp(all_left)[None, :]
                products = tl.load(products_ptr + at) * scale
            else:
                g = _log_decays(
                    gate_ptr, rates_ptr, biases_ptr, token, head, dims, there, stride_g_t,
                    stride_g_h, HAS_GATE, False, DK,
                )  # fmt: skip
                left = tl.cumsum(g, 0)
                all_left = tl.sum(g, 0)
                k_now = k * tl.exp(left)[:, None]
                q_now = q * tl.exp(left)[:, None]
                k_then = k * tl.exp(all_left - left)[:, None]
                decay = tl.exp(all_left)
                between = tl.where(not_later, left[:, None] - left[None, :], float("-inf"))
                products = tl.dot(
                    _factor(q, v_ptr, NARROW), tl.trans(_factor(k, v_ptr, NARROW)),
                    input_precision=PRECISION,
                ) * tl.exp(between)  # fmt: skip
            known_memory = tl.trans(_factor(memory, v_ptr, NARROW))
            if DELTA:
                beta = _strengths(beta_ptr, token, head, there, stride_beta)
                k_now = _factor(k_now, v_ptr, NARROW)
                known = tl.dot(k_now, known_memory, input_precision=PRECISION)
                inverse = tl.load(inverse_ptr + at)
                v = tl.dot(inverse, (v - known) * beta[:, None], input_precision=PRECISION)
            v = _factor(v, v_ptr, NARROW)
            out = tl.dot(_factor(q_now, v_ptr, NARROW), known_memory, input_precision=PRECISION)
            out = tl.dot(_factor(products, v_ptr, NARROW), v, out, input_precision=PRECISION)
            tl.store(
                out_ptr + token[:, None] * stride_o_t + head * stride_o_h + values[None, :], out,
                mask=there[:, None] & v_valid[None, :],
            )  # fmt: skip
            k_then = _factor(k_then, v_ptr, NARROW)
            memory = tl.dot(tl.trans(v), k_then, memory * decay, input_precision=PRECISION)
            chunk += 1
        target = tl.load(targets_ptr + segment).to(tl.int64)
        tl.store(state_ptr + target * stride_s_b + at_state, memory, mask=both & (target >= 0))


def linear_attention(
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
    config: ChunkConfig | None = None,
) -> None:
    """``gated_delta_rule`` and, without ``beta``, ``lightning_attention``, into ``out``.

    Arguments as in ``vllm._linear_attention_ops``; queries are multiplied with ``scale``, and
    brought to length one as keys are with ``normalize``.
    """
    tokens, heads, value_size = value.shape
    key_heads, key_size = key.shape[1:]
    if not tokens:
        return
    assert state.stride(3) == 1
    vector = gate is not None and gate.dim() == 3
    assert beta is None or normalize, "the delta rule's keys have length one"
    gates = (0, 0) if gate is None else (gate.stride(0), gate.stride(1))
    pad = max(16, triton.next_power_of_2(key_size))
    sizes = {"DK": key_size, "DK_PAD": pad, "GROUP": heads // key_heads}
    kind = {"HAS_GATE": gate is not None, "VECTOR": vector, "DELTA": beta is not None}
    kind["NORMALIZE"] = normalize
    strides = (
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *gates,
        0 if beta is None else beta.stride(0), *out.stride()[:2], *state.stride()[:3],
    )  # fmt: skip
    pointers = query, key, value, gate, beta, rates, biases, out, state
    if segments.is_one_token_each:
        _step_kernel[(triton.cdiv(value_size, _STEP_VALUES), heads, tokens)](
            *pointers, segments.sources, segments.targets, scale, *strides, **sizes, **kind,
            DV=value_size, VALUES=_STEP_VALUES, num_warps=4,
        )  # fmt: skip
        return
    precision = "tf32x3" if value.dtype == torch.float32 else "tf32"
    config = config or chunk_config(value.dtype, vector)
    chunk = config.tokens
    inverse = products = None
    if beta is not None:
        num_segments = segments.targets.shape[0]
        num_chunks = tokens // chunk + num_segments
        systems = (num_chunks, heads, chunk, chunk)
        inverse = torch.empty(systems, dtype=torch.float32, device=value.device)
        products = torch.empty_like(inverse) if vector else None
        _chunk_systems_kernel[(heads, num_chunks)](
            query, key, gate, beta, rates, biases, inverse, products, segments.token_starts,
            num_segments, *query.stride()[:2], *key.stride()[:2], *gates, beta.stride(0), **sizes,
            VECTOR=vector, CHUNK=chunk, LEVELS=chunk.bit_length() - 1,
            BLOCK=min(_VECTOR_BLOCK, pad), PRECISION=precision, num_warps=4,
        )  # fmt: skip
    _chunks_kernel[(triton.cdiv(value_size, _CHUNK_VALUES), heads, segments.num_requests)](
        *pointers, inverse, products, segments.token_starts, segments.request_starts,
        segments.sources, segments.targets, scale, *strides, **sizes, **kind, DV=value_size,
        VALUES=_CHUNK_VALUES, CHUNK=chunk, STAGES=config.stages, PRECISION=precision,
        NARROW=config.narrow, num_warps=config.warps,
    )  # fmt: skip
