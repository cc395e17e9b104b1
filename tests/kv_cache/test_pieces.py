"""Moves by tables of pieces: every mover copies the same bytes, and no others."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm import _extension
from vllm.v1.kv_cache.pieces import make_mover

CANARY = 0x55


class OnTriton:
    """The GPU's mover; where there is no GPU its kernel runs in the interpreter."""

    def __init__(self, pieces, device, **grid):
        from vllm.v1.kv_cache.triton_movers import PieceTable

        self._table = PieceTable(pieces, torch.device(device), **grid)

    def move(self, source, target, source_starts, target_starts, *, streams=False):
        self._table.move(source, target, source_starts, target_starts)


def without_extension(pieces, device, **grid):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_extension, "kernels", None)
        mover = make_mover(pieces, device, **grid)

        def move(*args, **kwargs):
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(_extension, "kernels", None)
                type(mover).move(mover, *args, **kwargs)

        return type("Plain", (), {"move": staticmethod(move)})()


MOVERS = {"cpu": make_mover, "plain": without_extension, "triton": OnTriton}


def check(make, lengths, grain, units, seed, streams=False):
    rng = np.random.default_rng(seed)
    device = "cuda" if torch.cuda.is_available() and make is OnTriton else "cpu"
    sizes = [length * grain for length in lengths]
    size = sum(sizes)
    there = np.cumsum([0, *sizes[:-1]])
    order = rng.permutation(len(sizes))
    here = np.zeros(len(sizes), dtype=np.int64)
    here[order] = np.cumsum([0, *np.array(sizes)[order][:-1]])
    pieces = np.array([there, here, sizes]).T
    rows = 2 * units + 1
    source = torch.from_numpy(rng.integers(-128, 128, rows * size, dtype=np.int8)).to(device)
    target = torch.full((rows * size,), CANARY, dtype=torch.int8, device=device)
    from_rows, to_rows = (rng.permutation(rows)[:units] for _ in range(2))
    # In either order of the work: it is a matter of speed only.
    apart = size if seed % 2 else 1
    make(pieces, device, grain=size, apart=apart).move(
        source.data_ptr(),
        target.data_ptr(),
        from_rows * size,
        to_rows * size,
        streams=streams,
    )
    expected = torch.full_like(target, CANARY)
    for row, to in zip(from_rows.tolist(), to_rows.tolist(), strict=True):
        for start, place, length in pieces.tolist():
            begin = row * size + start
            end = to * size + place
            expected[end : end + length] = source[begin : begin + length]
    assert torch.equal(target, expected)


@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("kind", MOVERS)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    grain=st.sampled_from([1, 2, 3, 4, 8, 16, 48]),
    units=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_every_byte_of_the_pieces_arrives_and_nothing_else(kind, lengths, grain, units, seed):
    check(MOVERS[kind], lengths, grain, units, seed)


@pytest.mark.parametrize("kind", MOVERS)
@pytest.mark.parametrize("streams", [False, True])
def test_pieces_larger_than_a_program_or_a_cache_line_arrive(kind, streams):
    check(MOVERS[kind], [1, 40, 3], 1032, 2, 7, streams)
    check(MOVERS[kind], [1, 40, 3], 1024, 2, 8, streams)


def test_nothing_moves_where_there_are_no_units():
    check(MOVERS["cpu"], [1], 16, 0, 1)


@pytest.mark.parametrize("kind", MOVERS)
def test_a_mover_is_used_again_with_fewer_and_with_more_units(kind):
    """What an earlier call has left in its memory for starts is never taken for its own."""
    pieces = np.array([[0, 16, 16], [16, 0, 16]])
    source = torch.arange(8 * 32, dtype=torch.int16).view(torch.int8)[: 8 * 32]
    mover = MOVERS[kind](pieces, "cpu", grain=32, apart=32)
    for units in (4, 3, 8, 1):
        target = torch.full_like(source, CANARY)
        rows = np.arange(units)
        mover.move(source.data_ptr(), target.data_ptr(), rows * 32, rows[::-1] * 32)
        expected = torch.full_like(source, CANARY).view(8, 2, 16)
        expected[:units] = source.view(8, 2, 16)[:units].flip(0, 1)
        assert torch.equal(target, expected.view(-1))
