"""Quantised caches in Triton, by every kernel: a GPU's where there is one, else the interpreter."""

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
from vllm import _torch_ops
from vllm.v1.attention.ops.kv_formats import FORMATS, SideScales, kv_format
from vllm.v1.attention.ops.triton_byte_decode import fits_byte_decode
from vllm.v1.attention.ops.triton_kv_store import rotate_and_store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = [name for name in FORMATS if name != "fp8"]
DECODES = ((70, 1), (1, 1), (300, 1))
# Head size and page: the byte kernel's shapes at both its tiles, and one that it does not know.
SHAPES = [(64, 32), (128, 16), (80, 16)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decodes_over_quantised_caches_equal_float64(
    name: str, shape: tuple[int, int], rng: random.Random
) -> None:
    head_size, page = shape
    dtype = rng.choice([torch.float16, torch.float32])
    options = rng.choice([{}, {"window": 24}, {"soft_cap": 20.0}, {"alibi": True}, {"sinks": True}])
    case = Case(
        lengths=DECODES, kv_heads=2, group=rng.choice([1, 3]), head_size=head_size, page=page,
        layout=rng.choice(["LBHNC", "BLHNC", "padded"]), cache_dtype=name, dtype=dtype, **options,
    )  # fmt: skip
    print(case)
    step = make_step(case, rng, DEVICE)
    store(step, "TORCH_REF")
    assert relative_error(attend(step, "TRITON_ATTN"), exact(step)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_over_quantised_caches_equal_float64(name: str, rng: random.Random) -> None:
    case = Case(
        lengths=((70, 5), (33, 2), (9, 1)), kv_heads=2, group=3, head_size=64, cache_dtype=name,
        layout=rng.choice(["LBHNC", "padded"]), window=rng.choice([0, 24]), shared=32,
    )  # fmt: skip
    step = make_step(case, rng, DEVICE)
    store(step, "TORCH_REF")
    assert relative_error(attend(step, "TRITON_ATTN"), exact(step)) < TOLERANCE[case.dtype]


def test_queries_far_from_one_and_values_of_any_magnitude_stay_exact(rng: random.Random) -> None:
    """The byte kernel computes in float16, whatever the magnitudes are."""
    case = Case(
        lengths=((70, 1), (40, 1)), kv_heads=2, group=2, head_size=64, page=32,
        cache_dtype="int8_per_token_head", dtype=torch.float16,
    )  # fmt: skip
    step = make_step(case, rng, DEVICE)
    for key, value in zip(step.keys, step.values, strict=True):
        key /= 1000
        value *= torch.logspace(-2, 3, value.shape[0], device=DEVICE)[:, None, None]
    step.query.mul_(1000)
    store(step, "TORCH_REF")
    assert relative_error(attend(step, "TRITON_ATTN"), exact(step)) < TOLERANCE[case.dtype]


def test_what_the_byte_kernel_takes() -> None:
    int8 = kv_format("int8_per_token_head")
    assert fits_byte_decode(int8, 128, 16, 8)
    assert not fits_byte_decode(int8, 80, 16, 8)
    assert not fits_byte_decode(int8, 128, 24, 8)
    assert not fits_byte_decode(None, 128, 16, 8)


def test_stored_nvfp4_bytes_are_those_of_the_format(rng: random.Random) -> None:
    """On inputs that need no rounding of scales, which is what the interpreter can't do."""
    case = Case(lengths=((1, 1),), kv_heads=3, group=1, head_size=80, cache_dtype="nvfp4")
    key, value = (torch.randint(-24, 25, (8, 3, 80)) / 4 for _ in range(2))
    # The largest of each group of 16 is 6 times a power of two.
    key[..., ::16], value[..., ::16] = 6.0, -6.0
    key[2], value[3] = key[2] * 8, 0.0
    slots = torch.tensor([17, 3, -1, 40, 41, 79, 0, -1], device=DEVICE)
    fmt, scales = case.format, SideScales(k=0.5, v=1.0)
    key, value = key.to(DEVICE), value.to(DEVICE)
    ours, theirs = make_cache(case, 5, DEVICE), make_cache(case, 5, DEVICE)
    rotate_and_store(None, key, value, ours, slots, fmt=fmt, scales=scales)
    _torch_ops.store_kv_cache(key, value, theirs, slots, fmt, scales)
    assert torch.equal(ours, theirs)
    assert (ours != 255).any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [1, 4, 7, 16])
def test_quantised_caches_in_bfloat16(name: str, group: int, rng: random.Random) -> None:
    for lengths in (((133, 20), (60, 60), (70, 1), (1, 1)), ((1700, 1), (300, 1), (17, 1))):
        for head_size, page in ((128, 64), (64, 16), (256, 32), (96, 128)):
            case = Case(
                lengths=lengths, kv_heads=2, group=group, head_size=head_size, page=page,
                cache_dtype=name, dtype=torch.bfloat16,
            )  # fmt: skip
            step = make_step(case, rng, DEVICE)
            store(step, "TRITON_ATTN")
            error = relative_error(attend(step, "TRITON_ATTN"), exact(step))
            assert error < TOLERANCE[torch.bfloat16], case
