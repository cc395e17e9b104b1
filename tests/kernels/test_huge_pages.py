"""Weights lie in aligned pieces of large mappings."""

import pytest
import torch

from vllm import _custom_ops as ops
from vllm.utils.huge_pages import HUGE_PAGE, HugePageArena


def test_pieces_are_aligned_writable_and_do_not_overlap() -> None:
    arena = HugePageArena()
    pieces = [arena.empty(size) for size in (1, 63, 64, 65, 1000, 3 << 20, 1)]
    for index, piece in enumerate(pieces):
        assert piece.data_ptr() % 64 == 0
        piece.fill_(index)
    for index, piece in enumerate(pieces):
        assert bool((piece == index).all())


@pytest.mark.parametrize("size", [(64 << 20) - 64, (64 << 20) + 1, 200 << 20])
def test_a_large_piece_starts_on_a_huge_page(size: int) -> None:
    arena = HugePageArena()
    arena.empty(10)
    piece = arena.empty(size)
    assert piece.numel() == size
    if size >= 64 << 20:
        assert piece.data_ptr() % HUGE_PAGE == 0
    piece[-1] = 7


def test_a_packed_weight_outlives_what_it_was_made_from() -> None:
    weight = torch.randn(70, 33)
    packed = ops.pack_weight(weight)
    x = torch.randn(3, 33)
    expected = x @ weight.T
    del weight
    torch.testing.assert_close(ops.linear(x, packed), expected)
