"""Boxes of bytes moved and cleared by Triton, against one byte at a time."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tests.kv_cache.helpers import full, placed
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.blocks import KVBlockZeroer, KVCacheBlockCopy, copy_kv_cache_blocks_inplace
from vllm.v1.kv_cache.triton_movers import move_box, zero_box
from vllm.v1.kv_cache_layout import KVCacheLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def runs_of(start: int, counts: list[int], strides: list[int]) -> list[int]:
    """Starts of all runs of one unit, in order."""
    return [
        start + sum(i * stride for i, stride in zip(index, strides, strict=True))
        for index in itertools.product(*map(range, counts))
    ]


def random_box(rng: random.Random) -> tuple[list[int], list[int], list[int], int, int]:
    """Counts, strides on both sides, length of a run, distance of units.

    Axes are nested in opposite orders on the two sides, with gaps between runs.
    """
    unit = rng.choice([1, 2, 4, 8, 16, 48])
    length = unit * rng.choice([1, 3, 40, 700])
    counts = [rng.randrange(1, 4) for _ in range(rng.randrange(4))]
    upwards = [(length + unit) * 4**axis for axis in range(len(counts))]
    return counts, upwards, upwards[::-1], length, (length + unit) * 4 ** len(counts) + 64


def test_boxes_move_whole_and_alone() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(12):
        counts, from_strides, to_strides, length, span = random_box(rng)
        units = 4
        source, target = torch.randint(-128, 128, (2, units * span), dtype=torch.int8)
        align = length & -length
        offsets = [rng.randrange(0, 64, min(align, 16)) for _ in range(2)]
        order = rng.sample(range(units), units - 1)
        places = [(i * span, order[i] * span) for i in range(units - 1)]
        expected = target.clone()
        for start, to in places:
            pairs = zip(
                runs_of(start + offsets[0], counts, from_strides),
                runs_of(to + offsets[1], counts, to_strides),
                strict=True,
            )
            for a, b in pairs:
                expected[b : b + length] = source[a : a + length]
        moved = target.to(DEVICE)
        move_box(
            source.to(DEVICE), moved, places, counts=counts, source_offset=offsets[0],
            target_offset=offsets[1], source_strides=from_strides, target_strides=to_strides,
            length=length,
        )  # fmt: skip
        assert torch.equal(moved.cpu(), expected)
        for _, to in places:
            for b in runs_of(to + offsets[1], counts, to_strides):
                expected[b : b + length] = 0
        zero_box(
            moved, [to + offsets[1] for _, to in places], counts=counts, strides=to_strides,
            length=length,
        )  # fmt: skip
        assert torch.equal(moved.cpu(), expected)


def test_views_of_a_larger_allocation_are_addressed_from_their_own_start() -> None:
    whole = torch.randint(1, 100, (4096,), dtype=torch.int8, device=DEVICE)
    expected = whole.clone()
    expected[512 + 64 : 512 + 96] = 0
    zero_box(whole[512:], [64], length=32)
    assert torch.equal(whole, expected)


def test_nothing_to_do_is_nothing_done() -> None:
    backing = torch.ones(64, dtype=torch.int8, device=DEVICE)
    zero_box(backing, [], length=16)
    move_box(backing, backing, [], length=16)
    assert bool(backing.all())


@pytest.mark.gpu
@pytest.mark.parametrize("layout", list(KVCacheLayout))
def test_blocks_on_a_gpu_are_cleared_and_copied_as_on_the_cpu(layout: KVCacheLayout) -> None:
    config = placed([{f"l.{i}": full() for i in range(3)}], layout, 6)
    sides = [allocate_kv_cache(config, device) for device in ("cpu", "cuda")]
    noise = torch.randint(1, 100, sides[0].backing.shape, dtype=torch.int8)
    for cache in sides:
        cache.backing.copy_(noise)
        for copies in ([(0, 3), (1, 4)], [(0, 1), (1, 2)]):
            copy_kv_cache_blocks_inplace(
                cache.backing, config, [KVCacheBlockCopy(*copy) for copy in copies]
            )
        KVBlockZeroer(cache.backing, config).zero_block_ids([2, 5])
    assert torch.equal(sides[0].backing, sides[1].backing.cpu())
