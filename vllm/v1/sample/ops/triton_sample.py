"""The common draw on a GPU: one token per row from its softmax, or its best one, in one reading.

The same rule as ``ops.random.draw``: one number in [0, 1) per row, and the token where the running
sum of the weights passes it. The vocabulary is cut in chunks; each leaves its largest logit, the
sum of its exponentials and its best token, from which the chunk of the drawn token follows, and
only that one is read again. No noise per entry, no copy of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm.utils.dependent_launch import await_previous, options, release

__all__ = ["DrawScratch", "sample_rows"]

_CHUNK = 4096


@triton.jit
def _reduce_kernel(
    logits_ptr, scale_ptr, top_ptr, sum_ptr, best_ptr, size, stride, chunks,
    CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Largest logit, sum of exponentials and best token of one chunk of one row."""
    release(PDL)
    await_previous(PDL)
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    valid = at < size
    x = tl.load(logits_ptr + row.to(tl.int64) * stride + at, mask=valid, other=float("-inf"))
    x = x.to(tl.float32)
    top, best = tl.max(x, 0, return_indices=True)
    scale = tl.load(scale_ptr + row)
    # A chunk of minus infinities has no weight; NaN and infinity stay in the sum, and show.
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp((x - base) * tl.where(scale > 0, scale, 1.0)), 0)
    tl.store(top_ptr + row * chunks + chunk, top)
    tl.store(sum_ptr + row * chunks + chunk, total)
    tl.store(best_ptr + row * chunks + chunk, chunk * CHUNK + best)


@triton.jit
def _choose_kernel(
    logits_ptr, scale_ptr, uniform_ptr, top_ptr, sum_ptr, best_ptr, out_ptr, size, stride, chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The token of one row; -1 where its logits allow no choice."""
    release(PDL)
    await_previous(PDL)
    row = tl.program_id(0)
    at = tl.arange(0, CHUNKS)
    there = at < chunks
    tops = tl.load(top_ptr + row * chunks + at, mask=there, other=float("-inf"))
    sums = tl.load(sum_ptr + row * chunks + at, mask=there, other=0.0)
    top, best_chunk = tl.max(tops, 0, return_indices=True)
    greedy = tl.load(best_ptr + row * chunks + best_chunk)
    scale = tl.load(scale_ptr + row)
    factor = tl.where(scale > 0, scale, 1.0)
    weights = sums * tl.exp((tl.where(tops == float("-inf"), 0.0, tops) - top) * factor)
    weights = tl.where(there & ((tops > float("-inf")) | (sums != sums)), weights, 0.0)
    total = tl.sum(weights, 0)
    # Comparisons with NaN are false.
    possible = (total > 0) & (total < float("inf")) & (top < float("inf"))
    ends = tl.cumsum(weights, 0)
    whole = tl.max(ends, 0)
    target = tl.load(uniform_ptr + row) * whole
    # The first chunk whose running sum passes the target; rounding may leave none: the last one
    # with any weight.
    passed = there & (ends > target)
    chunk = tl.min(tl.where(passed, at, CHUNKS), 0)
    last = tl.max(tl.where(weights > 0, at, 0), 0)
    chunk = tl.where(chunk < CHUNKS, chunk, last)
    before = tl.sum(tl.where(at < chunk, weights, 0.0), 0)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(
        logits_ptr + row.to(tl.int64) * stride + columns, mask=columns < size,
        other=float("-inf"),
    ).to(tl.float32)  # fmt: skip
    p = tl.exp((x - top) * factor)
    running = tl.cumsum(p, 0)
    drawn = tl.min(tl.where((running > target - before) & (p > 0), columns, size), 0)
    likely = tl.max(tl.where(p > 0, columns, 0), 0)
    token = tl.where(scale > 0, tl.where(drawn < size, drawn, likely), greedy)
    tl.store(out_ptr + row, tl.where(possible, token, -1).to(tl.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawScratch:
    """What a draw keeps of each chunk of each row: ``(R, chunks)``.

    Largest logit, sum of exponentials (both float32) and best token (int32).
    """

    tops: torch.Tensor
    sums: torch.Tensor
    best: torch.Tensor

    @classmethod
    def make(cls, rows: int, vocab_size: int, device: torch.device) -> DrawScratch:
        chunks = triton.cdiv(vocab_size, _CHUNK)
        return cls(
            tops=torch.zeros((rows, chunks), dtype=torch.float32, device=device),
            sums=torch.zeros((rows, chunks), dtype=torch.float32, device=device),
            best=torch.zeros((rows, chunks), dtype=torch.int32, device=device),
        )


def sample_rows(
    logits: torch.Tensor,
    scale: torch.Tensor,
    uniform: torch.Tensor,
    scratch: DrawScratch,
    out: torch.Tensor,
) -> None:
    """Sample every row.

    Args:
        logits: ``(R, V)`` in any float dtype, dense rows; read only.
        scale: float32 ``(R,)``: 1 / temperature, or 0 for a greedy row.
        uniform: float32 ``(R,)`` in [0, 1).
        scratch: of at least R rows; written.
        out: int64 ``(R,)``: the tokens; -1 where the logits are NaN or infinite, or all are
            minus infinity.
    """
    rows, size = logits.shape
    chunks = triton.cdiv(size, _CHUNK)
    assert logits.stride(1) == 1 and scratch.tops.shape[1] == chunks
    _reduce_kernel[(rows, chunks)](
        logits, scale, scratch.tops, scratch.sums, scratch.best, size, logits.stride(0), chunks,
        CHUNK=_CHUNK, num_warps=4, **options(logits.device),
    )  # fmt: skip
    _choose_kernel[(rows,)](
        logits, scale, uniform, scratch.tops, scratch.sums, scratch.best, out, size,
        logits.stride(0), chunks, CHUNK=_CHUNK, CHUNKS=triton.next_power_of_2(chunks),
        num_warps=4, **options(logits.device),
    )  # fmt: skip
