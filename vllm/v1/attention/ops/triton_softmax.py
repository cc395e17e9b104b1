"""Online softmax inside Triton's attention kernels: what all of them do with a tile of products.

Scores are in base 2. Rows are queries, columns tokens. Knows nothing of caches, items or launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["open_softmax", "score", "shaped", "softmax_step"]


@triton.jit
def score(
    q, k, k_scales, positions_q, tokens, slopes, scale, soft_cap,
    HAS_SCALES: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of a tile in base 2, soft cap and ALiBi applied, before masking."""
    s = tl.dot(q, k, input_precision=PRECISION)
    if HAS_SCALES:
        s = s * k_scales[None, :]
    return shaped(s, positions_q, tokens, slopes, scale, soft_cap, HAS_SOFT_CAP, HAS_ALIBI)


@triton.jit
def shaped(
    s, positions_q, tokens, slopes, scale, soft_cap,
    HAS_SOFT_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
):  # fmt: skip
    """Products of queries and keys as scores in base 2."""
    if HAS_SOFT_CAP:
        # tanh(x) = 2 / (1 + exp(-2x)) - 1
        x = s * (scale / soft_cap)
        s = soft_cap * (2.0 / (1.0 + tl.exp2(-2.8853900817779268 * x)) - 1.0)
        s = s * 1.4426950408889634
    else:
        s = s * (scale * 1.4426950408889634)
    if HAS_ALIBI:
        distance = (tokens[None, :] - positions_q[:, None]).to(tl.float32)
        s += slopes[:, None] * distance * 1.4426950408889634
    return s


@triton.jit
def open_softmax(
    slopes_ptr, sinks_ptr, heads, row_valid, is_first, ROWS: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Slopes, largest score and sum of the rows before any token.

    A sink is one more score without a value; of several programs for the same rows it counts in
    the first alone.
    """
    slopes = tl.zeros([ROWS], tl.float32)
    if HAS_ALIBI:
        slopes = tl.load(slopes_ptr + heads, mask=row_valid, other=0.0)
    top = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:  # noqa: SIM102 (a constexpr prunes the branch)
        if is_first:
            top = tl.load(sinks_ptr + heads, mask=row_valid, other=0.0).to(tl.float32)
            top *= 1.4426950408889634
            total += 1.0
    return slopes, top, total


@triton.jit
def softmax_step(s, top, total):
    """Weights of a tile; what the sums before it shrink by; the new sum and largest score."""
    new_top = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    return p, shrink, total * shrink + tl.sum(p, 1), new_top
