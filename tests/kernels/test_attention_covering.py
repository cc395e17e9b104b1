"""Every pair of backend, format, order, page, head size, group, feature and batch, against float64.

Two arrays: one that costs the gate some seconds, of short requests; and one of all values, slow on
a CPU and quick on a GPU, where it computes in bfloat16. Slots and outputs are poisoned, views are
parts of larger tensors, blocks are shuffled and a prefix is shared.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.kernels.attention_case import (
    TOLERANCE,
    Case,
    attend,
    exact,
    make_step,
    relative_error,
    store,
)
from tests.kernels.covering import covering_array
from vllm import _custom_ops as ops
from vllm.v1.attention.ops.kv_formats import FORMATS
from vllm.v1.attention.ops.turboquant import TURBOQUANT_FORMATS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["TRITON_ATTN", "TORCH_REF"]
if DEVICE == "cpu" and ops.has_extension():
    BACKENDS.append("CPU_ATTN")
# A page in one run, which is what nvfp4 needs, and in several.
TOGETHER, APART = ["LBHNC", "BLHNC", "padded"], ["LBNHC", "LHBNC", "BHLNC", "BLNHC"]

FEATURES: dict[str, list[Any]] = {
    "backend": BACKENDS,
    "cache_dtype": ["auto", *(name for name in FORMATS if name != "fp8"), *TURBOQUANT_FORMATS],
    "layout": [*TOGETHER, *APART],
    "page": [16, 32, 64, 128],
    "head_size": [64, 80, 96, 128, 192, 256],
    "group": [1, 2, 3, 4, 7, 8, 16],
    "feature": [{}, {"window": 24}, {"soft_cap": 20.0}, {"alibi": True}, {"sinks": True}],
    "lengths": [
        # One token each; mixed; long ones.
        ((300, 1), (1, 1), (70, 1), (140, 1)),
        ((133, 20), (60, 60), (70, 1), (1, 1), (33, 2)),
        ((700, 1), (400, 90)),
    ],
    "dtype": [torch.float16, torch.bfloat16 if DEVICE == "cuda" else torch.float32],
}
SMALL = FEATURES | {
    "head_size": [64, 80],
    "group": [1, 3],
    "page": [16, 32],
    "layout": ["LBHNC", "padded", "LBNHC"],
    "cache_dtype": ["auto", "int8_per_token_head", "nvfp4", "fp8_e4m3", "turboquant_4bit_nc"],
    "lengths": [((70, 1), (1, 1), (40, 1)), ((49, 9), (20, 1), (33, 2))],
}


def possible(row: dict[str, Any]) -> bool:
    """Declared by the format: what it cannot do is refused, and tested elsewhere."""
    if row["cache_dtype"] == "nvfp4":
        return row["layout"] in TOGETHER
    is_slot = row["cache_dtype"] in TURBOQUANT_FORMATS
    return not is_slot or (row["head_size"] in (64, 128, 256) and row["backend"] != "CPU_ATTN")


def check_all(features: dict[str, list[Any]], rng: random.Random) -> None:
    for row in covering_array(features, rng):
        # A value that a format does not have gives way to one that it has.
        if row["cache_dtype"] == "nvfp4" and row["layout"] not in TOGETHER:
            row["layout"] = rng.choice([x for x in features["layout"] if x in TOGETHER])
        if row["cache_dtype"] in TURBOQUANT_FORMATS:
            row["head_size"] = rng.choice([x for x in features["head_size"] if x % 64 == 0])
            if row["head_size"] == 192:
                row["head_size"] = 64
            if row["backend"] == "CPU_ATTN":
                row["backend"] = "TORCH_REF"
        assert possible(row)
        backend = row.pop("backend")
        case = Case(kv_heads=rng.choice([1, 2]), shared=32, **row.pop("feature"), **row)
        print(backend, case)
        step = make_step(case, rng, DEVICE)
        # fp8 is not rounded right by the interpreter.
        writer = backend if backend == "CPU_ATTN" or DEVICE == "cuda" else "TORCH_REF"
        if writer == "TRITON_ATTN" and case.cache_dtype in TURBOQUANT_FORMATS:
            writer = "TURBOQUANT"
        store(step, writer)
        before = step.cache.clone().view(torch.uint8)
        assert relative_error(attend(step, backend), exact(step)) < TOLERANCE[case.dtype], case
        assert torch.equal(step.cache.view(torch.uint8), before), "attention wrote to the cache"


def test_attention_whatever_is_combined_in_small(rng: random.Random) -> None:
    check_all(SMALL, rng)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_attention_whatever_is_combined(rng: random.Random) -> None:
    check_all(FEATURES, rng)


@pytest.mark.gpu
@pytest.mark.timeout(1800)
def test_attention_whatever_is_combined_on_a_gpu(rng: random.Random) -> None:
    check_all(FEATURES, rng)
