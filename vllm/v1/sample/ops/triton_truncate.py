"""Top-k, top-p and min-p draws on a GPU, exactly and without a sort; one program a row.

A token's *distance* is how far its scaled logit lies below the row's best. Min-p is a largest
distance; top-k keeps the k smallest; top-p, of those, the fewest smallest whose weights add up to
its share. So a row is decided by one distance and by how many of the tokens at just that distance
stay (the first ones). Distances are not negative, so their bits are in their order, and the
distance is found by bisection over bits: among the few candidates that a histogram of the row
leaves, or, where the distribution is so flat that there are many, in the row itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.utils.dependent_launch import await_previous, options, release
from vllm.v1.sample.ops.triton_sample import DrawScratch

__all__ = ["truncate_rows"]

_CANDIDATES = 2048
_CHUNK = 8192
# Bins of the histogram, 1/16 wide; the last one holds all that is further away.
_BINS = 512


@triton.jit
def _distances(
    compact, logits_ptr, values_ptr, begin, end, top, scale, CHUNK: tl.constexpr
):  # fmt: skip
    """Distances of a stretch of the row, or of all its candidates; infinite past ``end``."""
    at = begin + tl.arange(0, CHUNK)
    valid = at < end
    if compact:
        distance = tl.load(values_ptr + at, mask=valid, other=float("inf"))
    else:
        x = tl.load(logits_ptr + at, mask=valid, other=float("-inf")).to(tl.float32)
        distance = (top - x) * scale
    return distance


@triton.jit
def _count_and_weigh(
    compact, logits_ptr, values_ptr, end, top, scale, key, CHUNK: tl.constexpr
):  # fmt: skip
    """Tokens whose distance has bits below ``key``, and just ``key``; the weight of the former."""
    below = 0
    equal = 0
    weight = 0.0
    for begin in tl.range(0, end, CHUNK):
        distance = _distances(compact, logits_ptr, values_ptr, begin, end, top, scale, CHUNK)
        keys = distance.to(tl.int32, bitcast=True)
        below += tl.sum((keys < key).to(tl.int32), 0)
        equal += tl.sum((keys == key).to(tl.int32), 0)
        weight += tl.sum(tl.where(keys < key, tl.exp(-distance), 0.0), 0)
    return below, equal, weight


@triton.jit
def _truncate_kernel(
    logits_ptr, scale_ptr, uniform_ptr, top_k_ptr, top_p_ptr, min_p_ptr, top_ptr,
    values_ptr, tokens_ptr, out_ptr, size, stride, chunks,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, CANDIDATES: tl.constexpr, BINS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    await_previous(PDL)
    row = tl.program_id(0)
    scale = tl.load(scale_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    limited = (top_k > 0) | (top_p < 1) | (min_p > 0)
    # What the plain draw has refused stays refused; greedy rows stay as they are.
    if (tl.load(out_ptr + row) < 0) | (scale <= 0) | (limited == 0):
        return
    at = tl.arange(0, CHUNKS)
    tops = tl.load(top_ptr + row * chunks + at, mask=at < chunks, other=float("-inf"))
    top = tl.max(tops, 0)
    logits = logits_ptr + row.to(tl.int64) * stride
    values = values_ptr + row * CANDIDATES
    tokens = tokens_ptr + row * CANDIDATES
    furthest = tl.where(min_p > 0, -tl.log(tl.maximum(min_p, 1.0e-30)), 3.0e38)

    # The bins that top-k and min-p leave; with neither, those that surely hold top-p's share: by
    # the least that their tokens can weigh.
    bins = tl.arange(0, BINS)
    histogram = tl.zeros([BINS], tl.int32)
    allowed = 0.0
    for begin in tl.range(0, size, CHUNK):
        distance = _distances(0, logits, values, begin, size, top, scale, CHUNK)
        histogram += tl.histogram(tl.minimum(distance * 16, BINS - 1).to(tl.int32), BINS)
        allowed += tl.sum(tl.where(distance <= furthest, tl.exp(-distance), 0.0), 0)
    counts = tl.cumsum(histogram, 0)
    least = tl.where(bins < BINS - 1, tl.exp(-(bins + 1).to(tl.float32) / 16), 0.0)
    weights = tl.cumsum(histogram.to(tl.float32) * least, 0)
    last = BINS - 1
    if top_k > 0:
        last = tl.min(tl.where(counts >= top_k, bins, BINS - 1), 0)
    elif top_p < 1:
        last = tl.min(tl.where(weights >= top_p * allowed, bins, BINS - 1), 0)
    by_count = last
    last = tl.minimum(last, tl.minimum(furthest * 16, BINS - 1).to(tl.int32))
    limit = (last + 1).to(tl.float32) / 16
    count = tl.sum(tl.where(bins == last, counts, 0), 0)
    if (count > CANDIDATES) & (last == by_count) & (top_k > 0) & (last < BINS - 1):
        # Many in one bin: look into it.
        inside_from = last.to(tl.float32) / 16
        before = count - tl.sum(tl.where(bins == last, histogram, 0), 0)
        histogram = tl.zeros([BINS], tl.int32)
        for begin in tl.range(0, size, CHUNK):
            distance = _distances(0, logits, values, begin, size, top, scale, CHUNK)
            part = tl.minimum((distance - inside_from) * (16 * (BINS - 1)), BINS - 2).to(tl.int32)
            inside = (distance >= inside_from) & (distance < limit)
            histogram += tl.histogram(tl.where(inside, part, BINS - 1), BINS)
        counts = before + tl.cumsum(histogram, 0)
        part = tl.min(tl.where(counts >= top_k, bins, BINS - 2), 0)
        count = tl.sum(tl.where(bins == part, counts, 0), 0)
        limit = inside_from + (part + 1).to(tl.float32) / (16 * (BINS - 1))
    # Rounding must not leave out what the bins have counted.
    limit = limit * 1.00001 + 1.0e-6

    found = 0
    compact = (count <= CANDIDATES) & (last < BINS - 1)
    if compact:
        for begin in tl.range(0, size, CHUNK):
            distance = _distances(0, logits, values, begin, size, top, scale, CHUNK)
            near = distance < limit
            place = found + tl.cumsum(near.to(tl.int32), 0) - 1
            fits = near & (place < CANDIDATES)
            tl.store(values + place, distance, mask=fits)
            tl.store(tokens + place, begin + tl.arange(0, CHUNK), mask=fits)
            found += tl.sum(near.to(tl.int32), 0)
        compact = found <= CANDIDATES
        # The candidates are read by other threads than wrote them.
        tl.debug_barrier()
    end = tl.where(compact, found, size)

    # The largest distance that top-k keeps, and how many at just that distance.
    high = tl.minimum(furthest, 3.0e38).to(tl.int32, bitcast=True)
    key = high
    if top_k > 0:
        low = 0
        while low < high:
            middle = low + (high - low) // 2
            below, equal, _ = _count_and_weigh(
                compact, logits, values, end, top, scale, middle, CHUNK
            )
            if below + equal >= top_k:
                high = middle
            else:
                low = middle + 1
        key = high
    below, equal, weight = _count_and_weigh(compact, logits, values, end, top, scale, key, CHUNK)
    ties = equal
    if top_k > 0:
        ties = tl.minimum(equal, top_k - below)
    tie_weight = tl.exp(-key.to(tl.float32, bitcast=True))
    total = weight + ties.to(tl.float32) * tie_weight
    if top_p < 1:
        # Without top-k the candidates are not all that is allowed.
        target = top_p * tl.where(top_k > 0, total, allowed)
        low = 0
        high = key
        while low < high:
            middle = low + (high - low) // 2
            # ``middle`` is below ``key``: all tokens at just that distance are kept by top-k.
            _, equal, weight = _count_and_weigh(
                compact, logits, values, end, top, scale, middle, CHUNK
            )
            own = equal.to(tl.float32) * tl.exp(-middle.to(tl.float32, bitcast=True))
            if weight + own >= target:
                high = middle
            else:
                low = middle + 1
        below, equal, weight = _count_and_weigh(
            compact, logits, values, end, top, scale, high, CHUNK
        )
        tie_weight = tl.exp(-high.to(tl.float32, bitcast=True))
        most = tl.where(high == key, ties, equal)
        needed = tl.ceil((target - weight) / tl.maximum(tie_weight, 1.0e-38))
        ties = tl.minimum(tl.maximum(needed, 1.0), most.to(tl.float32)).to(tl.int32)
        key = high
        total = weight + ties.to(tl.float32) * tie_weight

    # The draw: best first where top-k or top-p has ordered the tokens, else by their ids.
    target = tl.load(uniform_ptr + row) * total
    drawn = size
    if (top_k > 0) | (top_p < 1):
        low = 0
        high = key
        while low < high:
            middle = low + (high - low) // 2
            _, equal, weight = _count_and_weigh(
                compact, logits, values, end, top, scale, middle, CHUNK
            )
            own = equal.to(tl.float32) * tl.exp(-middle.to(tl.float32, bitcast=True))
            if weight + own > target:
                high = middle
            else:
                low = middle + 1
        below, equal, weight = _count_and_weigh(
            compact, logits, values, end, top, scale, high, CHUNK
        )
        tie_weight = tl.exp(-high.to(tl.float32, bitcast=True))
        most = tl.where(high == key, ties, equal)
        nth = tl.floor((target - weight) / tl.maximum(tie_weight, 1.0e-38))
        nth = tl.minimum(tl.maximum(nth, 0.0), (most - 1).to(tl.float32)).to(tl.int32)
        seen = 0
        for begin in tl.range(0, end, CHUNK):
            distance = _distances(compact, logits, values, begin, end, top, scale, CHUNK)
            tie = distance.to(tl.int32, bitcast=True) == high
            rank = seen + tl.cumsum(tie.to(tl.int32), 0) - 1
            place = begin + tl.arange(0, CHUNK)
            drawn = tl.minimum(drawn, tl.min(tl.where(tie & (rank == nth), place, size), 0))
            seen += tl.sum(tie.to(tl.int32), 0)
    else:
        kept = 0
        passed = 0.0
        for begin in tl.range(0, end, CHUNK):
            distance = _distances(compact, logits, values, begin, end, top, scale, CHUNK)
            keep = distance.to(tl.int32, bitcast=True) <= key
            shares = tl.where(keep, tl.exp(-distance), 0.0)
            running = passed + tl.cumsum(shares, 0)
            place = begin + tl.arange(0, CHUNK)
            drawn = tl.minimum(drawn, tl.min(tl.where(keep & (running > target), place, size), 0))
            kept = tl.maximum(kept, tl.max(tl.where(keep, place, 0), 0))
            passed += tl.sum(shares, 0)
        # Rounding may leave the target at the very end.
        drawn = tl.where(drawn < size, drawn, kept)
    token = drawn
    if compact:
        token = tl.load(tokens + drawn)
    tl.store(out_ptr + row, token.to(tl.int64))


def truncate_rows(
    logits: torch.Tensor,
    scale: torch.Tensor,
    uniform: torch.Tensor,
    limits: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scratch: DrawScratch,
    out: torch.Tensor,
) -> None:
    """Draw again where a row limits its choice; to be called after ``sample_rows``.

    Args:
        logits, scale, uniform, scratch, out: as there, and as it left them.
        limits: top-k int32 ``(R,)``, 0 for none; top-p float32 ``(R,)``, 1 for none; min-p
            float32 ``(R,)``, 0 for none. As in ``ops.topk_topp``: min-p first, then top-k, then
            top-p among what is left.
    """
    rows, size = logits.shape
    top_k, top_p, min_p = limits
    chunks = scratch.tops.shape[1]
    values = torch.empty((rows, _CANDIDATES), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((rows, _CANDIDATES), dtype=torch.int32, device=logits.device)
    _truncate_kernel[(rows,)](
        logits, scale, uniform, top_k, top_p, min_p, scratch.tops, values, tokens,
        out, size, logits.stride(0), chunks,
        CHUNKS=triton.next_power_of_2(chunks), CHUNK=_CHUNK, CANDIDATES=_CANDIDATES, BINS=_BINS,
        num_warps=16, **options(logits.device),
    )  # fmt: skip
