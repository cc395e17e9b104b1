"""Every pair of backend, format, order, page, head size, group, feature, batch and dtype.

Against float64, each combination through the backend's own classes. Slots and outputs are
poisoned, views are parts of larger tensors, blocks are shuffled and a prefix is shared. The array
is drawn anew in each run, from a seed that is printed. Pairs that it leaves out are refused, by
what a backend, a format or the resolver of layouts declares. Three of them: one of few values for
the gate, one of all on a CPU, in short requests, and one on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import random
from typing import Any

import pytest
import torch

from tests.kernels.attention_case import TOLERANCE, Case, exact, make_step, relative_error
from tests.kernels.backend_step import backend_named, prepare, run_backend, spec_of
from tests.kernels.covering import Combinations, Row
from tests.kv_cache.helpers import make_config
from vllm import _custom_ops as ops
from vllm.errors import ConfigError
from vllm.v1.attention.ops.kv_formats import FORMATS
from vllm.v1.attention.ops.turboquant import TURBOQUANT_FORMATS
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache.resolver import BackendConstraints, resolve_layout

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float16, torch.float32, torch.bfloat16]

if ON_GPU:
    BACKENDS = [
        "TRITON_ATTN", "TURBOQUANT", "ROCM_ATTN", "TRITON_ATTN_DIFFKV", "FLEX_ATTENTION",
        "TORCH_REF",
    ]  # fmt: skip
    if importlib.util.find_spec("flash_attn") is not None:
        BACKENDS += ["FLASH_ATTN", "FLASH_ATTN_DIFFKV"]
    if importlib.util.find_spec("flashinfer") is not None:
        BACKENDS.append("FLASHINFER")
    # Libraries that build a kernel for each combination may take minutes.
    without = os.environ.get("COVERING_WITHOUT", "").split(",")
    BACKENDS = [name for name in BACKENDS if name not in without]
    LENGTHS = [
        # One token each; mixed; long ones, all behind one prefix.
        ((300, 1), (1, 1), (70, 1), (140, 1)),
        ((133, 20), (60, 60), (70, 1), (1, 1), (33, 2)),
        ((700, 1), (400, 90)),
    ]
else:
    BACKENDS = ["TRITON_ATTN", "TURBOQUANT", "ROCM_ATTN", "TRITON_ATTN_DIFFKV", "TORCH_REF"]
    BACKENDS += ["FLEX_ATTENTION", *(["CPU_ATTN"] if ops.has_extension() else [])]
    LENGTHS = [
        ((90, 1), (1, 1), (40, 1)),
        ((49, 9), (20, 20), (36, 1), (1, 1), (33, 2)),
        ((300, 1), (150, 18)),
    ]

FEATURES: dict[str, list[Any]] = {
    "backend": BACKENDS,
    "cache_dtype": ["auto", *(name for name in FORMATS if name != "fp8"), *TURBOQUANT_FORMATS],
    "layout": ["LBHNC", "BLHNC", "padded", "LBNHC", "LHBNC", "BHLNC", "BLNHC"],
    "head_size": [64, 80, 96, 128, 192, 256],
    "dtype": DTYPES,
    "page": [16, 32, 64, 128],
    "feature": ["plain", "window", "soft cap", "ALiBi", "sinks"],
    "group": [1, 2, 3, 4, 7, 8, 16],
    "lengths": LENGTHS,
}
BOUND = ("backend", "cache_dtype", "layout", "head_size", "dtype", "page", "feature")
SMALL = FEATURES | {
    "head_size": [64, 80],
    "group": [1, 3],
    "page": [16, 32],
    "layout": ["LBHNC", "padded", "LBNHC"],
    "cache_dtype": ["auto", "int8_per_token_head", "nvfp4", "fp8_e4m3", "turboquant_4bit_nc"],
    "dtype": [torch.float16, torch.float32],
    "lengths": [((40, 1), (1, 1), (20, 1)), ((35, 3), (18, 18), (20, 1))],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 24},
    "soft cap": {"soft_cap": 20.0},
    "ALiBi": {"alibi": True},
    "sinks": {"sinks": True},
}
PREFIX = 32
# Seconds on a CPU; on a GPU these tests go with the others.
SLOW = pytest.mark.gpu if ON_GPU else pytest.mark.slow


def head_size_v(backend: str, head_size: int) -> int:
    """Another one than that of keys, where a backend is for that."""
    if not backend.endswith("DIFFKV"):
        return 0
    return 128 if head_size == 64 else 64


def wanted(backend: str, cache_dtype: str, head_size: int, dtype: torch.dtype, page: int,
           feature: str) -> dict[str, Any]:  # fmt: skip
    """Arguments of the selector."""
    return {
        "head_size": head_size, "dtype": dtype, "kv_cache_dtype": cache_dtype, "block_size": page,
        "has_sink": feature == "sinks", "has_alibi": feature == "ALiBi",
        "head_size_v": head_size_v(backend, head_size) or None,
    }  # fmt: skip


@functools.cache
def refused_by_backend(backend: str, *layer: Any) -> str | None:
    reasons = backend_named(backend).validate_configuration(**wanted(backend, *layer))
    return f"{backend}: {reasons[0]}" if reasons else None


@functools.cache
def refused_by_format(cache_dtype: str, head_size: int, width_v: int) -> str | None:
    try:
        spec_of(
            cache_dtype, torch.float16, page=16, kv_heads=2, head_size=head_size,
            head_size_v=width_v,
        )  # fmt: skip
    except ConfigError as error:
        return str(error)
    return None


@functools.cache
def refused_by_resolver(backend: str, cache_dtype: str, layout: str) -> str | None:
    """A padded page lies as LBHNC has it."""
    cls = backend_named(backend)
    spec = spec_of(cache_dtype, torch.float16, page=16, kv_heads=2, head_size=64)
    limits = BackendConstraints(
        backend=backend,
        layouts=cls.supported_kv_cache_layouts(),
        kernel_block_sizes=tuple(cls.get_supported_kernel_block_sizes(spec)),
    )
    config = make_config(kv_cache_layout="LBHNC" if layout == "padded" else layout)
    try:
        resolve_layout({"l.0": spec, "l.1": spec}, config, {"l.0": limits, "l.1": limits})
    except ConfigError as error:
        return str(error)
    return None


def refuses(row: Row) -> str | None:
    """Why the engine has no such layer, or this machine cannot run it; else None."""
    if not ON_GPU and row["dtype"] is torch.bfloat16 and row["backend"] not in NATIVE:
        return "the interpreter's bfloat16 products are wrong"
    backend, cache_dtype, layout, head_size, dtype, page, feature = (row[name] for name in BOUND)
    return (
        refused_by_format(cache_dtype, head_size, head_size_v(backend, head_size))
        or refused_by_backend(backend, cache_dtype, head_size, dtype, page, feature)
        or refused_by_resolver(backend, cache_dtype, layout)
    )


NATIVE = ("CPU_ATTN", "TORCH_REF")


BOTH = pytest.mark.parametrize(
    "small",
    [pytest.param(True, id="few values"), pytest.param(False, marks=SLOW, id="all values")],
)


@functools.cache
def combinations_of(small: bool) -> Combinations:
    return Combinations(SMALL if small else FEATURES, BOUND, refuses)


def check(row: Row, rng: random.Random) -> None:
    values = dict(row)
    backend, feature = values.pop("backend"), values.pop("feature")
    case = Case(
        kv_heads=1 if row["group"] > 4 else rng.choice([1, 2]),
        shared=PREFIX,
        head_size_v=head_size_v(backend, row["head_size"]),
        **OPTIONS[feature],
        **values,
    )
    step = make_step(case, rng, DEVICE)
    fmt = case.format
    # fp8 is not rounded right by the interpreter.
    by_reference = not ON_GPU and backend not in NATIVE and fmt is not None
    prepare(step, backend)
    before = step.cache.clone().view(torch.uint8)
    found = run_backend(step, backend, by_reference)
    error = relative_error(found, exact(step))
    assert error < TOLERANCE[case.dtype], f"{backend}, {case}: error {error:.2e}"
    untouched(step, before)


def untouched(step: Any, before: torch.Tensor) -> None:
    """Slots of nobody are as they were, but for tails that a backend clears."""
    page, now = step.case.page, step.cache.view(torch.uint8)
    mine = (torch.cat(step.slots) // page).unique()
    others = torch.ones(now.shape[0], dtype=torch.bool, device=now.device)
    others[mine] = False
    assert torch.equal(now[others], before[others]), "a block of nobody was written to"


@BOTH
def test_the_array_has_every_pair_that_can_be(small: bool, rng: random.Random) -> None:
    combinations = combinations_of(small)
    rows = combinations.covering_rows(rng)
    assert combinations.missing(rows) == set()
    assert len(rows) < 400
    # It would show if one were missing: the last row was added for a pair of its own.
    assert combinations.missing(rows[:-1])


@BOTH
def test_pairs_that_are_left_out_are_refused(small: bool) -> None:
    for pair, why in combinations_of(small).impossible():
        print(pair, why)
        names = set(pair)
        if "dtype" in names and not ON_GPU and pair["dtype"] is torch.bfloat16:
            continue
        if names == {"cache_dtype", "head_size"}:
            if pair["cache_dtype"] not in TURBOQUANT_FORMATS:
                raise AssertionError(f"{pair}: every other format takes every head size")
            with pytest.raises(ConfigError, match="power of two"):
                spec_of(**pair, dtype=torch.float16, page=16, kv_heads=1)
        elif "layout" in names:
            assert "nvfp4" in pair.values() or "FLEX_ATTENTION" in pair.values(), pair
            assert refused_by_resolver(
                pair.get("backend", "TORCH_REF"), pair.get("cache_dtype", "auto"), pair["layout"]
            )
        else:
            layer = {"cache_dtype": "auto", "head_size": 64, "dtype": torch.float16, "page": 16}
            if pair.get("backend") == "TURBOQUANT":
                layer["cache_dtype"] = "turboquant_k8v4"
            backend = pair.pop("backend", "CPU_ATTN")
            arguments = wanted(backend, **({"feature": "plain"} | layer | pair))
            with pytest.raises(ConfigError, match=backend):
                get_attn_backend(**arguments, backend=backend)


def test_attention_whatever_is_combined_in_small(rng: random.Random) -> None:
    for row in combinations_of(small=True).covering_rows(rng):
        check(row, rng)


PARTS = int(os.environ.get("COVERING_PARTS", "4"))


@pytest.fixture(scope="session")
def array_seed() -> int:
    """The same in every process of a run, so that the parts make one array."""
    given = os.environ.get("KERNEL_TEST_SEED") or os.environ.get("PYTEST_XDIST_TESTRUNUID")
    return random.Random(given).randrange(2**31)


@functools.cache
def rows_of_array(array_seed: int) -> list[Row]:
    return combinations_of(small=False).covering_rows(random.Random(array_seed))


def check_part(part: int, array_seed: int, rng: random.Random) -> None:
    rows = rows_of_array(array_seed)
    print(f"array {array_seed} of {len(rows)} rows, part {part} of {PARTS}")
    failures = []
    for row in rows[part::PARTS]:
        try:
            check(row, rng)
        except AssertionError as error:
            failures.append(str(error).splitlines()[0])
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(PARTS))
def test_attention_whatever_is_combined(part: int, array_seed: int, rng: random.Random) -> None:
    check_part(part, array_seed, rng)


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(PARTS))
def test_attention_whatever_is_combined_on_a_gpu(
    part: int, array_seed: int, rng: random.Random
) -> None:
    check_part(part, array_seed, rng)
