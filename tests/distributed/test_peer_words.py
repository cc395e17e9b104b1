"""Sums and joins through memory that all ranks write into: two and three processes, one kernel."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from vllm import _torch_ops
from vllm.distributed.device_communicators.peer_words import PeerWords

AREA_WORDS = 12 << 10
NOT_YET = 0x80008000 - (1 << 32)
# Exchanges of one rank follow each other through the same halves, narrow after wide.
SHAPES = [(2, 64), (1, 1000), (3, 24)]
DTYPES = [torch.float32, torch.bfloat16]
# The interpreter cuts bfloat16 off where a GPU rounds it.
TOLERANCE = {torch.bfloat16: {"rtol": 2**-6, "atol": 2**-6}}
# The word that is no data is sent as the float32 next to it.
EXACT = {"rtol": 0, "atol": 3e-45}


def make_area() -> torch.Tensor:
    area = torch.zeros(AREA_WORDS, dtype=torch.int32)
    PeerWords.clear(area)
    return area


def make_parts(world: int, seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> list:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(shape, generator=generator).to(dtype) for _ in range(world)]
    # The word that means "nothing has come yet", as data.
    for part in parts:
        part.view(torch.int32)[0, ::5] = NOT_YET
    return parts


def rank_main(rank: int, areas: list[torch.Tensor]) -> None:
    torch.set_num_threads(1)
    world = len(areas)
    peers = PeerWords.of(rank, areas)
    for turn, dtype in enumerate(DTYPES):
        for i, shape in enumerate(SHAPES):
            seed = 100 * turn + i
            parts = make_parts(world, seed, shape, dtype)
            total = torch.stack(parts).float().sum(0).to(dtype)
            given = parts[rank].clone()
            assert peers.takes(given)
            assert peers.all_reduce(given) is given
            torch.testing.assert_close(given, total, **TOLERANCE.get(dtype, EXACT))

            residual, weight = make_parts(2, seed + 50, shape, dtype)
            weight = weight[0].contiguous()
            wanted, wanted_residual = total.clone(), residual.clone()
            _torch_ops.fused_add_rms_norm(wanted, wanted_residual, weight, 1e-5)
            given = parts[rank].clone()
            assert peers.takes_norm(given, residual, weight)
            peers.add_rms_norm(given, residual, weight, 1e-5)
            torch.testing.assert_close(residual, wanted_residual, **TOLERANCE.get(dtype, EXACT))
            torch.testing.assert_close(given, wanted, **TOLERANCE.get(dtype, {}))

            wide = torch.zeros((shape[0], 2 * shape[1]), dtype=dtype)[:, : shape[1]]
            wide.copy_(parts[rank])
            assert peers.takes_join(wide)
            torch.testing.assert_close(peers.all_gather(wide), torch.cat(parts, dim=1), **EXACT)
    assert peers.control.tolist() == [3 * len(SHAPES) * len(DTYPES), 0]


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_see_the_sum_its_norm_and_all_parts(world) -> None:
    areas = [make_area().share_memory_() for _ in range(world)]
    mp.spawn(rank_main, args=(areas,), nprocs=world)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 3, dtype=torch.bfloat16),
        torch.zeros(64, 512, dtype=torch.float32),
        torch.zeros(2000, 2, dtype=torch.bfloat16),
        torch.zeros(4, 8, dtype=torch.float64),
        torch.zeros(8, 4, dtype=torch.float32).T,
        torch.zeros(0, 8, dtype=torch.float32),
        torch.zeros(8, dtype=torch.float32),
    ],
    ids=["half a word", "too large", "too many rows", "dtype", "strides", "empty", "one dim"],
)
def test_what_does_not_fit_is_left_to_others(tensor) -> None:
    areas = [make_area() for _ in range(2)]
    peers = PeerWords.of(0, areas)
    assert not peers.takes(tensor)
    assert not peers.takes_join(tensor)
    assert not peers.takes_norm(tensor, tensor, torch.zeros(tensor.shape[-1], dtype=tensor.dtype))


def test_a_norm_with_a_weight_of_another_dtype_is_left_to_others() -> None:
    peers = PeerWords.of(0, [make_area() for _ in range(2)])
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    assert not peers.takes_norm(x, x, torch.zeros(64))
