"""FLASH_ATTN, FLASHINFER and their MLA on a GPU with the real libraries, against float64.

Slots that nobody stored and outputs are NaN. Where a library is not installed, or its kernels are
for another GPU, a test is skipped with the reason that the backend gives.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from tests.kernels.library_step import Step
from tests.kernels.test_triton_mla import V2, Call
from vllm.v1.attention.backends.registry import AttentionBackendEnum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
BF16, FP16 = torch.bfloat16, torch.float16
MIXED = ((33, 1), (260, 1), (700, 300), (1, 1), (513, 2), (129, 129), (64, 1))
DECODES = ((700, 1), (33, 1), (1, 1), (64, 1), (129, 1), (2048, 1))
FRESH = ((300, 300), (64, 64), (5, 5), (1, 1))
STEPS = {"mixed": MIXED, "decode": DECODES, "fresh": FRESH}
BOTH = ("FLASH_ATTN", "FLASHINFER")


@pytest.fixture(autouse=True)
def seed() -> int:
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


def backend(name: str, **wanted: Any) -> Any:
    """The class, if it can serve such a layer here."""
    found = AttentionBackendEnum[name].get_class()
    reasons = found.validate_configuration(
        **({"head_size": 128, "dtype": BF16, "block_size": 64} | wanted)
    )
    if reasons:
        pytest.skip("; ".join(reasons))
    return found


def step(name: str, lengths: tuple[tuple[int, int], ...], **options: Any) -> Step:
    options = {
        "widths": (128, 128), "dtype": BF16, "page": 64, "group": 4, "device": "cuda",
        "max_model_len": 4096, "cleared": False,
    } | options  # fmt: skip
    width, width_v = options["widths"]
    made = backend(
        name, head_size=width, head_size_v=width_v, dtype=options["dtype"],
        block_size=options["page"], kv_cache_dtype=options.get("cache_dtype", "auto"),
    )  # fmt: skip
    return Step(made, lengths, **options)


def check(made: Step, **features: Any) -> None:
    error = made.error(**features)
    print(f"relative error {error:.2e}")
    assert error < TOLERANCE[made.dtype]


@pytest.mark.parametrize("order", ["LBHNC", "BHLNC"])
@pytest.mark.parametrize("lengths", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("name", BOTH)
def test_any_step_over_layer_and_block_outermost_pools(name, lengths, order) -> None:
    check(step(name, lengths, order=order))


@pytest.mark.parametrize("page", [16, 32, 128, 256])
@pytest.mark.parametrize("name", BOTH)
def test_page_sizes(name, page) -> None:
    for lengths, order in itertools.product((MIXED, DECODES), ("LBHNC", "LBNHC", "BLHNC")):
        check(step(name, lengths, page=page, order=order))


@pytest.mark.parametrize(("size", "dtype"), [(64, FP16), (256, BF16)], ids=["64", "256"])
@pytest.mark.parametrize("name", BOTH)
def test_head_sizes(name, size, dtype) -> None:
    for lengths in (MIXED, DECODES):
        check(step(name, lengths, widths=(size, size), dtype=dtype))


@pytest.mark.parametrize("group", [1, 3, 7, 16])
@pytest.mark.parametrize("name", BOTH)
def test_query_heads_of_a_kv_head(name, group) -> None:
    for lengths in (MIXED, DECODES):
        check(step(name, lengths, group=group))


@pytest.mark.parametrize("name", BOTH)
def test_one_kv_head(name) -> None:
    for lengths in (MIXED, DECODES):
        check(step(name, lengths, kv_heads=1, group=8))


@pytest.mark.parametrize("name", BOTH)
def test_windows(name) -> None:
    for lengths in (MIXED, DECODES):
        check(step(name, lengths, options={"sliding_window": 100}), sliding_window=100)


@pytest.mark.parametrize("name", BOTH)
def test_soft_caps(name) -> None:
    for lengths in (MIXED, DECODES):
        check(step(name, lengths, options={"logits_soft_cap": 5.0}), logits_soft_cap=5.0)


def test_sinks() -> None:
    sinks = torch.randn(8, device="cuda", dtype=BF16)
    for lengths in (MIXED, DECODES):
        check(step("FLASH_ATTN", lengths, options={"sinks": sinks}), sinks=sinks.double())


@pytest.mark.parametrize("name", BOTH)
def test_encoders_see_everything(name) -> None:
    check(step(name, ((300, 300), (64, 64), (5, 5)), causal=False))


@pytest.mark.parametrize("widths", [(192, 128), (64, 128)], ids=str)
def test_values_of_another_width(widths) -> None:
    for lengths, page in itertools.product((MIXED, DECODES), (64, 128)):
        check(step("FLASH_ATTN_DIFFKV", lengths, widths=widths, page=page))


@pytest.mark.parametrize("lengths", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_caches_of_single_bytes(cache_dtype, lengths) -> None:
    for order in ("LBHNC", "BHLNC"):
        check(step("FLASHINFER", lengths, cache_dtype=cache_dtype, order=order))


@pytest.mark.parametrize("name", BOTH)
def test_a_prefix_that_all_share(name) -> None:
    lengths = tuple((1024 + own, 1) for own in (1, 60, 64, 300, 5, 129))
    made = step(name, lengths, shared_pages=16)
    check(made)
    if name == "FLASHINFER":
        ((part,),) = made.metadata.planned.values()
        assert part.is_cascade
        check(step(name, ((1100, 40), *lengths, (1500, 333)), shared_pages=16))
    else:
        assert made.metadata.cascade is not None


@pytest.mark.parametrize("name", BOTH)
def test_captured_decodes_follow_later_lengths(name) -> None:
    made = step(name, ((700, 1), (33, 1), (2000, 1), (64, 1)))
    builder = made.builder()
    check(made)
    # What a step finds out about its layers, the builder knows from then on.
    made.metadata = builder.build(0, made.common())
    out = made.output()
    arguments = made.layer, made.query, *made.new, made.cache, made.metadata, out
    made.impl.forward(*arguments)
    assert made.backend.fits_cuda_graphs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made.impl.forward(*arguments)
    for lengths in ((1, 5, 1999, 64), (600, 1, 65, 3), (700, 33, 2000, 64)):
        host = torch.tensor(lengths, dtype=torch.int32)
        made.host_lens, made.lengths = host, tuple((n, 1) for n in lengths)
        made.lens.copy_(host)
        out.fill_(float("nan"))
        builder.build(0, made.common())
        graph.replay()
        exact = made.exact()
        assert float((out.double() - exact).norm() / exact.norm()) < TOLERANCE[BF16]


@pytest.mark.parametrize("name", BOTH)
def test_pages_behind_two_to_the_32_elements(name) -> None:
    """Block-outermost pools of a whole GPU: offsets that 32 bits don't hold."""
    page_elements = 3 * 2 * 64 * 256
    far = (1 << 32) // page_elements + 1000
    for lengths in (MIXED, DECODES):
        check(step(name, lengths, order="BHLNC", far=far))


class LatentCall(Call):
    """As ``Call``, by another backend; nothing behind a request's last token is cleared."""

    def __init__(self, name: str, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        wanted = {"head_size": self.cache.shape[2], "dtype": self.dtype, "use_mla": True}
        found = backend(name, block_size=self.cache.shape[1], **wanted)
        self.impl = found.get_impl_cls()(self.heads, self.cache.shape[2], self.scale, 1)


@pytest.mark.parametrize("page", [32, 64])
@pytest.mark.parametrize("lengths", [DECODES, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("name", ["FLASHINFER_MLA", "FLASH_ATTN_MLA"])
def test_latents_of_deepseek(name, lengths, page) -> None:
    error = LatentCall(name, lengths, V2, heads=16, page=page, pad=64, dtype=BF16).error()
    print(f"relative error {error:.2e}")
    assert error < TOLERANCE[BF16]
