"""A step's inputs, made on the device from what the host has uploaded."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["apply_table_changes", "prepare_inputs"]


@triton.jit(do_not_specialize=["places_at", "values_at", "count"])
def apply_table_changes(
    words_ptr, table_ptr, places_at, values_at, count, BLOCK: tl.constexpr
) -> None:
    """``table[places[i]] = values[i]``; places are flat."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = at < count
    place = tl.load(words_ptr + places_at + at, mask=valid, other=0)
    value = tl.load(words_ptr + values_at + at, mask=valid, other=0)
    tl.store(table_ptr + place, value, mask=valid)


@triton.jit(
    do_not_specialize=[
        "starts_at", "computed_at", "ids_at", "scales_at", "uniforms_at", "requests", "tokens",
        "padded_tokens",
    ]
)  # fmt: skip
def prepare_inputs(
    words_ptr, floats_ptr, sampled_ptr, table_ptr, stride_table, page,
    input_ids_ptr, positions_ptr, query_start_ptr, seq_lens_ptr, slots_ptr, scales_ptr,
    uniforms_ptr,
    starts_at, computed_at, ids_at, scales_at, uniforms_at, requests, tokens, padded_tokens,
    FIRST_GROUP: tl.constexpr, COPIES_SAMPLING: tl.constexpr, HAS_PROMPTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Some tokens of one request.

    Programs past ``requests`` make requests that fill a captured batch up: one token, of no
    length, stored nowhere. With HAS_PROMPTS they have no token, and the last programs, which are
    no request's, make tokens up to ``padded_tokens``. A negative id is ``-1 - i``: the i-th sample
    of the step before. The first cache group writes what all groups share.
    """
    request = tl.program_id(0)
    part = tl.program_id(1)
    inside = request < requests
    start = tl.load(words_ptr + starts_at + request, mask=inside, other=0)
    end = tl.load(words_ptr + starts_at + request + 1, mask=inside, other=0)
    is_last = request == tl.num_programs(0) - 1
    if HAS_PROMPTS:
        start = tl.where(inside, start, tokens)
        end = tl.where(inside, end, tl.where(is_last, padded_tokens, tokens))
    else:
        start = tl.where(inside, start, tokens + request - requests)
        end = tl.where(inside, end, start + 1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    computed = tl.load(words_ptr + computed_at + request, mask=inside, other=0)
    valid = at < end - start
    known = valid & inside
    position = tl.where(inside, computed + at, 0)
    if FIRST_GROUP:
        token = tl.load(words_ptr + ids_at + start + at, mask=known, other=0)
        pending = known & (token < 0)
        sampled = tl.load(sampled_ptr - 1 - token, mask=pending, other=0)
        # A sample that failed is -1; its request ends before anyone sees what comes of it.
        token = tl.maximum(tl.where(pending, sampled, token.to(tl.int64)), 0)
        tl.store(input_ids_ptr + start + at, token, mask=valid)
        tl.store(positions_ptr + start + at, position.to(tl.int64), mask=valid)
        if part == 0:
            length = tl.where(inside, computed + end - start, 0)
            tl.store(query_start_ptr + request, start)
            if HAS_PROMPTS:
                tl.store(seq_lens_ptr + request, length, mask=request < tl.num_programs(0) - 1)
            else:
                tl.store(seq_lens_ptr + request, length)
                tl.store(query_start_ptr + request + 1, end, mask=is_last)
            if COPIES_SAMPLING:
                scale = tl.load(floats_ptr + scales_at + request, mask=inside, other=0.0)
                uniform = tl.load(floats_ptr + uniforms_at + request, mask=inside, other=0.0)
                tl.store(scales_ptr + request, scale)
                tl.store(uniforms_ptr + request, uniform)
    row = table_ptr + request.to(tl.int64) * stride_table
    block = tl.load(row + position // page, mask=known, other=0)
    slot = block.to(tl.int64) * page + position % page
    tl.store(slots_ptr + start + at, tl.where(inside, slot, -1), mask=valid)
