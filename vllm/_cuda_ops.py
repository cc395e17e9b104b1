"""Operators of ``vllm._custom_ops`` on a GPU, in Triton: norms, activations, small products.

Shapes and meaning are those of ``_custom_ops``, which calls here. Products of many rows are
cuBLAS's; with few rows a product is the reading of its weight, which the kernels here do at the
speed of memory. Everything runs on the current stream, one kernel after the other: the counters
by which programs find the last of them are shared by all launches on a device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from vllm.utils.dependent_launch import await_previous, is_hopper, options, release

__all__ = [
    "SkinnyConfig",
    "embedding_part",
    "fused_add_rms_norm",
    "gate_up_silu",
    "linear",
    "rms_norm",
    "silu_and_mul",
]


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, eps, inner, size,
    stride_x, stride_x_inner, stride_r, stride_o, stride_o_inner,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: ``residual += x`` if there is one, then the norm of the sum."""
    release(PDL)
    row = tl.program_id(0).to(tl.int64)
    outer_row = row // inner
    inner_row = row % inner
    at = tl.arange(0, BLOCK)
    valid = at < size
    weight = tl.load(weight_ptr + at, mask=valid, other=0).to(tl.float32)
    await_previous(PDL)
    x = tl.load(x_ptr + outer_row * stride_x + inner_row * stride_x_inner + at, mask=valid, other=0)
    if HAS_RESIDUAL:
        at_residual = residual_ptr + outer_row * stride_r + at
        x = x + tl.load(at_residual, mask=valid, other=0)
        tl.store(at_residual, x, mask=valid)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    tl.store(
        out_ptr + outer_row * stride_o + inner_row * stride_o_inner + at,
        wide * scale * weight, mask=valid,
    )  # fmt: skip


def _norm_warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """RMSNorm over the last dim, dense; x of up to three dimensions, any strides."""
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    size = x.shape[-1]
    rows = x.numel() // size
    if not rows:
        return out
    inner = x.shape[1] if x.dim() == 3 else 1
    strides = [
        (t.stride(0) if t.dim() > 1 else 0, t.stride(1) if t.dim() == 3 else 0) for t in (x, out)
    ]
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(rows,)](
        x, None, weight, out, eps, inner, size, *strides[0], 0, *strides[1],
        HAS_RESIDUAL=False, BLOCK=block, num_warps=_norm_warps(block), **options(x.device),
    )  # fmt: skip
    return out


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """In place: ``residual += x``, then ``x = rms_norm(residual)``; both (T, h)."""
    rows, size = x.shape
    if not rows:
        return
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(rows,)](
        x, residual, weight, x, eps, 1, size, x.stride(0), 0, residual.stride(0), x.stride(0), 0,
        HAS_RESIDUAL=True, BLOCK=block, num_warps=_norm_warps(block), **options(x.device),
    )  # fmt: skip


@triton.jit
def _silu_and_mul_kernel(
    x_ptr, out_ptr, size, stride_x, stride_o, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    release(PDL)
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = at < size
    gate = tl.load(x_ptr + row * stride_x + at, mask=valid, other=0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_x + size + at, mask=valid, other=0).to(tl.float32)
    tl.store(out_ptr + row * stride_o + at, gate / (1 + tl.exp(-gate)) * up, mask=valid)


_COLUMNS = 1024


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(x[:, :i]) * x[:, i:]``; x (T, 2 * i) -> (T, i)."""
    rows, width = x.shape
    out = torch.empty((rows, width // 2), dtype=x.dtype, device=x.device)
    if rows:
        _silu_and_mul_kernel[(rows, triton.cdiv(width // 2, _COLUMNS))](
            x, out, width // 2, x.stride(0), out.stride(0), BLOCK=_COLUMNS, num_warps=4,
            **options(x.device),
        )  # fmt: skip
    return out


@triton.jit
def _embedding_part_kernel(
    ids_ptr, table_ptr, out_ptr, first, count, size, stride_ids, stride_table, stride_o,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    await_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = at < size
    local = tl.load(ids_ptr + row * stride_ids).to(tl.int64) - first
    here = (local >= 0) & (local < count)
    x = tl.load(table_ptr + local * stride_table + at, mask=valid & here, other=0)
    tl.store(out_ptr + row * stride_o + at, x, mask=valid)


def embedding_part(ids: torch.Tensor, weight: torch.Tensor, first: int) -> torch.Tensor:
    """Rows ``ids - first`` of ``weight`` (n, k), zeros for those it lacks; (T,) -> (T, k)."""
    (rows,), (count, size) = ids.shape, weight.shape
    out = torch.empty((rows, size), dtype=weight.dtype, device=weight.device)
    if rows:
        _embedding_part_kernel[(rows, triton.cdiv(size, _COLUMNS))](
            ids, weight, out, first, count, size, ids.stride(0), weight.stride(0), out.stride(0),
            BLOCK=_COLUMNS, num_warps=4, **options(weight.device),
        )  # fmt: skip
    return out


# Products of few rows


@triton.jit
def _gemv_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, n, k, stride_w,
    SILU_MUL: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """``BLOCK_N`` outputs of one row: registers hold what memory sends, nothing is staged.

    Weights are read one step ahead, the first of them while the kernel before still runs.
    """
    release(PDL)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_valid = rows < n
    at = tl.arange(0, BLOCK_K)
    at_w = w_ptr + rows[:, None].to(tl.int64) * stride_w + at[None, :]
    both = row_valid[:, None] & (at < k)[None, :]
    w = tl.load(at_w, mask=both, other=0)
    up = w
    if SILU_MUL:
        up = tl.load(at_w + n.to(tl.int64) * stride_w, mask=both, other=0)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    await_previous(PDL)
    for begin in tl.range(0, k, BLOCK_K):
        x = tl.load(x_ptr + begin + at, mask=begin + at < k, other=0).to(tl.float32)
        acc += w.to(tl.float32) * x[None, :]
        if SILU_MUL:
            second += up.to(tl.float32) * x[None, :]
        ahead = begin + BLOCK_K
        both = row_valid[:, None] & (ahead + at < k)[None, :]
        w = tl.load(at_w + ahead, mask=both, other=0)
        if SILU_MUL:
            up = tl.load(at_w + n.to(tl.int64) * stride_w + ahead, mask=both, other=0)
    y = tl.sum(acc, 1)
    if SILU_MUL:
        y = y / (1 + tl.exp(-y)) * tl.sum(second, 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=row_valid, other=0).to(tl.float32)
    tl.store(out_ptr + rows, y, mask=row_valid)


@triton.jit(do_not_specialize=["m"])
def _skinny_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, part_ptr, arrived_ptr, m, n, k, stride_x, stride_w, stride_o,
    SILU_MUL: tl.constexpr, HAS_BIAS: tl.constexpr, M_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """``BLOCK_N`` outputs of all rows, over one of ``SPLITS`` parts of k.

    The weight is the left operand, so that the matrix units' long side is along it and the few
    rows of x are padded to 16 only. The last split to arrive sums the parts, in order.
    """
    release(PDL)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    outputs = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.arange(0, M_PAD)
    at = tl.arange(0, BLOCK_K)
    token_valid = tokens < m
    output_valid = outputs < n
    at_x = x_ptr + tokens[:, None] * stride_x + at[None, :]
    at_w = w_ptr + outputs[:, None].to(tl.int64) * stride_w + at[None, :]
    length = tl.cdiv(k, SPLITS * BLOCK_K) * BLOCK_K
    start = split * length
    end = tl.minimum(start + length, k)
    acc = tl.zeros([BLOCK_N, M_PAD], tl.float32)
    second = tl.zeros([BLOCK_N, M_PAD], tl.float32)
    await_previous(PDL)
    for begin in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        valid = begin + at < end
        w_valid = output_valid[:, None] & valid[None, :]
        w = tl.load(at_w + begin, mask=w_valid, other=0)
        x = tl.load(at_x + begin, mask=token_valid[:, None] & valid[None, :], other=0)
        acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
        if SILU_MUL:
            up = tl.load(at_w + n.to(tl.int64) * stride_w + begin, mask=w_valid, other=0)
            second = tl.dot(up, tl.trans(x), second, input_precision=PRECISION)
    both = output_valid[:, None] & token_valid[None, :]
    if SPLITS > 1:
        inside = tl.arange(0, BLOCK_N)[:, None] * M_PAD + tokens[None, :]
        PART: tl.constexpr = BLOCK_N * M_PAD * (2 if SILU_MUL else 1)
        at_part = part_ptr + tile.to(tl.int64) * (SPLITS * PART) + inside
        tl.store(at_part + split * PART, acc)
        if SILU_MUL:
            tl.store(at_part + split * PART + BLOCK_N * M_PAD, second)
        # All threads have written before the one that counts says so.
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") != SPLITS - 1:
            return
        # For the next launch.
        tl.store(arrived_ptr + tile, 0)
        acc = tl.zeros([BLOCK_N, M_PAD], tl.float32)
        second = tl.zeros([BLOCK_N, M_PAD], tl.float32)
        for other in tl.static_range(SPLITS):
            acc += tl.load(at_part + other * PART, cache_modifier=".cg")
            if SILU_MUL:
                second += tl.load(at_part + other * PART + BLOCK_N * M_PAD, cache_modifier=".cg")
    if SILU_MUL:
        acc = acc / (1 + tl.exp(-acc)) * second
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outputs, mask=output_valid, other=0).to(tl.float32)[:, None]
    tl.store(out_ptr + tokens[None, :] * stride_o + outputs[:, None], acc, mask=both)


@dataclass(frozen=True, slots=True, kw_only=True)
class SkinnyConfig:
    """How one product of few rows is cut; ``splits`` 0 is the kernel for one row."""

    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int = 1


_MAX_TILES = 1 << 14


@functools.cache
def _arrived(device: torch.device) -> torch.Tensor:
    """Counters that every launch leaves at zero."""
    return torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


@functools.cache
def _choose(
    m: int, n: int, k: int, itemsize: int, silu_mul: bool, device: torch.device
) -> SkinnyConfig | None:
    """The kernel for ``m`` rows, or None where cuBLAS is faster.

    From benchmarks/gpu/kernels.py on one H100, for the shapes of Qwen3-0.6B and Llama-3.1-8B in
    bf16: one row is read at 90 to 100 % of memory's speed where cuBLAS reaches 75 to 90, an
    output head of up to 64 rows at 95 instead of 80, and SiLU * mul saves a launch and two passes.
    Products of 17 to 32 rows into 4,096 outputs: from benchmarks/gpu/step_products.py, inside
    whole steps, where these kernels overlap with their neighbours.
    The tiles need Hopper's shared memory.
    """
    if itemsize > 2 or k % 8 or not is_hopper(device):
        return None
    if m == 1:
        return _choose_one_row(k, silu_mul)
    tiles = n // (128 if silu_mul else 64)
    deep = k >= 4096
    if silu_mul:
        if m <= 64 or (m <= 128 and deep):
            stages = 4 if m <= 64 else 3
            return SkinnyConfig(block_n=64, block_k=128, splits=1, warps=4, stages=stages)
    elif tiles > 512:
        if m <= 32:
            return SkinnyConfig(block_n=64, block_k=128, splits=1, warps=4, stages=4)
        if m <= 64:
            return SkinnyConfig(block_n=128, block_k=64, splits=1, warps=4, stages=5)
        if m <= 128:
            return SkinnyConfig(block_n=64, block_k=64, splits=1, warps=4, stages=4)
    elif m <= 64:
        return _choose_split(m, tiles, k)
    return None


def _choose_one_row(k: int, silu_mul: bool) -> SkinnyConfig:
    if silu_mul or k <= 1024:
        return SkinnyConfig(block_n=4, block_k=512, splits=0, warps=4)
    if k < 4096:
        return SkinnyConfig(block_n=4, block_k=2048, splits=0, warps=8)
    return SkinnyConfig(block_n=1, block_k=1024, splits=0, warps=4)


def _choose_split(m: int, tiles: int, k: int) -> SkinnyConfig | None:
    """Parts of k make up for few tiles: about one program for each multiprocessor."""
    splits = 1
    while tiles * splits <= 66 and k // splits >= 1024 and k > 1024:
        splits *= 2
    if not 64 <= tiles * splits <= 132:
        return None
    if splits == 1 and k <= 1024:
        return SkinnyConfig(block_n=64, block_k=128, splits=1, warps=4, stages=4)
    # Here cuBLAS is as good.
    if m > 32 and (splits == 1 or (tiles == 64 and k < 8192)):
        return None
    if m > 32:
        return SkinnyConfig(block_n=64, block_k=128, splits=splits, warps=4, stages=4)
    return SkinnyConfig(block_n=64, block_k=256, splits=splits, warps=4, stages=3)


def skinny_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu_mul: bool,
    config: SkinnyConfig,
) -> torch.Tensor:
    """``x @ weight.T + bias``, or ``silu`` of its first half times the second.

    Args:
        x: (m, k); weight: (n, k); bias: (n,); all with a dense last dim.
    """
    m, k = x.shape
    n = weight.shape[0] // 2 if silu_mul else weight.shape[0]
    assert weight.shape[1] == k and weight.stride(1) == 1 and x.stride(1) == 1
    assert not (silu_mul and bias is not None)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(n, config.block_n)
    if config.splits == 0:
        assert m == 1
        _gemv_kernel[(tiles,)](
            x, weight, bias, out, n, k, weight.stride(0), SILU_MUL=silu_mul,
            HAS_BIAS=bias is not None, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.warps, **options(x.device),
        )  # fmt: skip
        return out
    m_pad = max(16, triton.next_power_of_2(m))
    part = None
    if config.splits > 1:
        assert tiles <= _MAX_TILES
        size = tiles * config.splits * config.block_n * m_pad * (2 if silu_mul else 1)
        part = torch.empty(size, dtype=torch.float32, device=x.device)
    _skinny_kernel[(tiles, config.splits)](
        x, weight, bias, out, part, _arrived(x.device), m, n, k, x.stride(0), weight.stride(0),
        out.stride(0), SILU_MUL=silu_mul, HAS_BIAS=bias is not None, M_PAD=m_pad,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k, SPLITS=config.splits,
        STAGES=config.stages, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=config.warps, **options(x.device),
    )  # fmt: skip
    return out


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``; x (..., k), weight (n, k), bias (n,) -> (..., n)."""
    if x.dim() == 2:
        config = _choose(x.shape[0], *weight.shape, x.element_size(), False, x.device)
        if config is not None:
            return skinny_product(x, weight, bias, False, config)
    return F.linear(x, weight, bias)


def gate_up_silu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``silu(x @ gate.T) * (x @ up.T)``; weight (2 * i, k) is gate over up; (T, k) -> (T, i)."""
    config = _choose(x.shape[0], *weight.shape, x.element_size(), True, x.device)
    if config is not None:
        return skinny_product(x, weight, None, True, config)
    return silu_and_mul(F.linear(x, weight))
