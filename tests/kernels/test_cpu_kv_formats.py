"""Quantised caches in the C++ kernels: bytes of the store, attention over them, on every ISA."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.attention_case import (
    TOLERANCE,
    Case,
    attend,
    exact,
    make_cache,
    make_step,
    relative_error,
    store,
)
from tests.kernels.covering import covering_array
from vllm import _custom_ops as ops
from vllm import _torch_ops
from vllm.v1.attention.ops.kv_formats import FORMATS, SideScales, kv_format

pytestmark = pytest.mark.skipif(not ops.has_extension(), reason="vllm._C is not built")

NAMES = [name for name in FORMATS if name != "fp8"]
FEATURES = {
    "isa": ops.supported_isas() or ["pytorch"],
    "cache_dtype": NAMES,
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "layout": ["LBHNC", "BLHNC", "padded", "LBNHC", "LHBNC", "BHLNC"],
    "page": [16, 48, 128],
    "head_size": [64, 80, 96, 256],
    "group": [1, 3, 7],
    "kv_heads": [1, 2],
    "feature": [{}, {"window": 33}, {"soft_cap": 2.5}, {"alibi": True}, {"sinks": True}],
    "lengths": [
        ((200, 1), (1, 1), (17, 1)),
        ((240, 40), (3, 3), (56, 1), (220, 90)),
        ((900, 1),),
    ],
    "threads": [1, 2],
}
# A side's data and scales lie in one run only where a page does.
TOGETHER = ("LBHNC", "BLHNC", "padded")


def test_attention_over_quantised_caches_equals_float64(rng: random.Random) -> None:
    try:
        for row in covering_array(FEATURES, rng):
            if row["cache_dtype"] == "nvfp4" and row["layout"] not in TOGETHER:
                continue
            ops.set_isa(row.pop("isa"))
            ops.set_num_threads(row.pop("threads"))
            case = Case(**row.pop("feature"), **row)
            print(case)
            step = make_step(case, rng)
            theirs = store(step, "TORCH_REF", step.cache.clone())
            store(step, "CPU_ATTN")
            assert torch.equal(step.cache, theirs), "the store left other bytes than it should"
            assert relative_error(attend(step, "CPU_ATTN"), exact(step)) < TOLERANCE[case.dtype]
            assert torch.equal(step.cache, theirs), "attention wrote to the cache"
    finally:
        ops.set_isa(ops.supported_isas()[0])
        ops.set_num_threads(2)


@pytest.mark.parametrize("name", NAMES)
def test_every_magnitude_is_rounded_as_the_formula_says(isa: str, seed: int, name: str) -> None:
    """Ties, numbers below the smallest, zeros, and numbers that a layer's scale cuts off."""
    fmt = kv_format(name)
    case = Case(lengths=((1, 1),), kv_heads=2, group=1, head_size=64, cache_dtype=name)
    ours, theirs = make_cache(case, 70, "cpu"), make_cache(case, 70, "cpu")
    x = torch.randn(1000, 2, 64) * torch.logspace(-9, 4, 1000)[:, None, None]
    # Ties of every format: multiples of halves of a step.
    x[::7] = (torch.randint(-40, 41, x[::7].shape) / 16) * 0.25
    x[::11] = 0
    x[5, :, 3] = 0
    scales = SideScales(k=0.25, v=2.0)
    slots = torch.randperm(70 * 16)[:1000]
    ops.store_kv_cache(x, -x, ours, slots, fmt, scales)
    _torch_ops.store_kv_cache(x, -x, theirs, slots, fmt, scales)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["key", "value"])
def test_a_nan_that_a_token_sees_is_not_hidden(isa: str, seed: int, name: str, side: str) -> None:
    case = Case(lengths=((40, 2),), kv_heads=1, group=1, head_size=16, cache_dtype=name)
    step = make_step(case, random.Random(seed))
    (step.keys if side == "key" else step.values)[0][7, 0, 5] = float("nan")
    store(step, "CPU_ATTN")
    assert attend(step, "CPU_ATTN").isnan().any()


@pytest.mark.parametrize("name", NAMES)
def test_rotation_comes_before_quantising(isa: str, seed: int, name: str) -> None:
    fmt = kv_format(name)
    case = Case(lengths=((1, 1),), kv_heads=2, group=1, head_size=64, cache_dtype=name)
    ours, theirs = make_cache(case, 4, "cpu"), make_cache(case, 4, "cpu")
    query, key, value = (torch.randn(20, heads, 64) for heads in (4, 2, 2))
    expected_query = query.clone()
    positions, table = torch.randint(0, 100, (20,)), torch.randn(100, 32)
    slots = torch.randperm(64)[:20]
    slots[3] = -1
    cache_options = (slots, fmt, SideScales(k=0.03, v=0.1))
    ops.rope_and_store(positions, query, key.clone(), value, table, True, ours, *cache_options)
    _torch_ops.rope_and_store(
        positions, expected_query, key, value, table, True, theirs, *cache_options
    )
    torch.testing.assert_close(query, expected_query)
    # A scale may differ in its last bit; a number at the edge between two steps may fall on
    # either side.
    read, expected = (fmt.read(cache, cache_options[2]) for cache in (ours, theirs))
    apart = (read - expected).abs() > 1e-5 * expected.abs()
    assert apart.float().mean() < 1e-3


def test_an_nvfp4_cache_that_is_not_one_run_is_refused() -> None:
    case = Case(
        lengths=((1, 1),), kv_heads=2, group=1, head_size=64, cache_dtype="nvfp4", layout="LBNHC"
    )
    x = torch.randn(1, 2, 64)
    with pytest.raises(ValueError, match="keeps a page together"):
        ops.store_kv_cache(x, x, make_cache(case, 4, "cpu"), torch.tensor([3]), case.format)
