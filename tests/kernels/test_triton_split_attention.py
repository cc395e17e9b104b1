"""Kernels over K and V apart, against float64: on a GPU, else in the interpreter."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from tests.kernels.covering import covering_array
from vllm import _torch_ops
from vllm.v1.attention.backends.rocm_attn import RocmAttentionBackend, SplitAttentionImpl
from vllm.v1.attention.backends.triton_attn_diffkv import TritonAttentionDiffKVBackend
from vllm.v1.attention.ops.paged_attn import PagedAttention
from vllm.v1.attention.ops.triton_split_attention import split_attention, store_split

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# Physical orders of (B, H, N, C); a pool of 3 layers for the last two.
ORDERS = ("LBHNC", "LBNHC", "BLHNC", "BHLNC")
MIXED = ((133, 20), (60, 60), (70, 1), (1, 1), (33, 2))


@dataclass(frozen=True, kw_only=True)
class Case:
    """``lengths`` holds (tokens in the cache, of these new) per request."""

    lengths: tuple[tuple[int, int], ...] = MIXED
    kv_heads: int = 2
    group: int = 1
    widths: tuple[int, int] = (32, 32)
    page: int = 16
    order: str = "LBHNC"
    dtype: torch.dtype = torch.float32
    window: int = 0
    soft_cap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    causal: bool = True


def poisoned_cache(case: Case, blocks: int) -> torch.Tensor:
    content = sum(case.widths)
    sizes = {"B": blocks, "H": case.kv_heads, "N": case.page, "C": content, "L": 3}
    shape = [sizes[axis] for axis in case.order]
    pool = torch.full(shape, float("nan"), dtype=case.dtype, device=DEVICE)
    view = pool.select(case.order.index("L"), 1)
    axes = case.order.replace("L", "")
    return view.permute([axes.index(axis) for axis in "BHNC"])


def relative_error(case: Case) -> float:
    heads, (width, width_v) = case.kv_heads * case.group, case.widths
    lens = torch.tensor([n for n, _ in case.lengths], dtype=torch.int32)
    counts = torch.tensor([n for _, n in case.lengths])
    starts = torch.zeros(len(lens) + 1, dtype=torch.int32)
    starts[1:] = counts.cumsum(0)
    pages = [-(-n // case.page) for n, _ in case.lengths]
    free = (torch.randperm(sum(pages) + 2) + 1).tolist()
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    cache = poisoned_cache(case, sum(pages) + 3)
    views = PagedAttention.split_kv_cache(cache, case.kv_heads, width, width_v)
    for request, (length, _) in enumerate(case.lengths):
        blocks = torch.tensor([free.pop() for _ in range(pages[request])])
        table[request, : len(blocks)] = blocks.int()
        at = torch.arange(length)
        slots = (blocks[at // case.page] * case.page + at % case.page).to(DEVICE)
        fused = torch.randn(length, case.kv_heads, width + width_v + 8).to(DEVICE, case.dtype)
        store_split(fused[..., :width], fused[..., width : width + width_v], *views, slots)
    tokens = int(starts[-1])
    query = torch.randn(tokens, heads + 2, width).to(DEVICE, case.dtype)[:, 1:-1]
    out = torch.full((tokens, heads, width_v), float("nan"), dtype=case.dtype, device=DEVICE)
    slopes = torch.rand(heads) / 2 if case.alibi else None
    sinks = torch.randn(heads) if case.sinks else None
    features: dict[str, Any] = {"causal": case.causal, "scale": width**-0.5}
    split_attention(
        query, *views, out,
        query_start_loc=starts.to(DEVICE), seq_lens=lens.to(DEVICE), block_table=table.to(DEVICE),
        max_query_len=int(counts.max()), max_seq_len=int(lens.max()),
        has_decodes=bool((counts == 1).any()), window=case.window, soft_cap=case.soft_cap,
        alibi_slopes=None if slopes is None else slopes.to(DEVICE),
        sinks=None if sinks is None else sinks.to(DEVICE), **features,
    )  # fmt: skip
    exact = torch.zeros(tokens, heads, width_v, dtype=torch.float64)
    _torch_ops.paged_attention(
        query.cpu().double(), torch.nan_to_num(cache.cpu().double()), exact, starts, lens, table,
        sliding_window=case.window, logits_soft_cap=case.soft_cap, alibi_slopes=slopes,
        sinks=sinks, **features,
    )  # fmt: skip
    return float((out.cpu().double() - exact).norm() / exact.norm())


@pytest.fixture(autouse=True)
def _seed(seed: int) -> None:
    """Fresh inputs, and the seed in the output of a test that fails."""


FEATURES = {
    "lengths": [((40, 20), (9, 1), (1, 1), (33, 2)), ((33, 1), (80, 1)), ((33, 20), (9, 9))],
    "group": [1, 3],
    "widths": [(32, 32), (48, 24), (16, 80)],
    "page": [16, 48],
    "order": list(ORDERS),
    "dtype": [torch.float32, torch.float16],
    "feature": [{}, {"window": 24}, {"soft_cap": 20.0}, {"alibi": True}, {"sinks": True}],
}


def test_whatever_is_combined_equals_float64(rng: random.Random) -> None:
    for row in covering_array(FEATURES, rng):
        case = Case(**row.pop("feature"), **row)
        assert relative_error(case) < TOLERANCE[case.dtype], case


@pytest.mark.slow
def test_a_long_window_and_queries_that_see_everything() -> None:
    window = Case(lengths=((600, 1), (500, 40)), widths=(16, 16), window=290)
    assert relative_error(window) < TOLERANCE[torch.float32]
    assert relative_error(Case(lengths=((40, 40), (17, 17)), causal=False)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("widths", [(128, 128), (192, 128), (64, 64), (256, 256)])
@pytest.mark.parametrize("order", ORDERS)
def test_sizes_of_models_on_a_gpu(dtype, widths, order) -> None:
    for lengths in (MIXED, ((3000, 1), (700, 1)), ((900, 400), (64, 64))):
        case = Case(
            lengths=lengths, kv_heads=4, group=4, widths=widths, page=64, order=order, dtype=dtype
        )
        assert relative_error(case) < TOLERANCE[dtype], case


def test_k_and_v_are_views_and_other_shapes_are_refused() -> None:
    cache = torch.zeros(5, 3, 16, 40).transpose(1, 2).contiguous().transpose(1, 2)
    key, value = PagedAttention.split_kv_cache(cache, 3, 24, 16)
    assert key.data_ptr() == cache.data_ptr() and value.stride() == cache.stride()
    value.fill_(1.0)
    assert cache[..., :24].sum() == 0 and cache[..., 24:].mean() == 1
    with pytest.raises(ValueError, match=r"3 heads of keys of 24 and values of 24: \(B, 3, N, 48"):
        PagedAttention.split_kv_cache(cache, 3, 24)


def test_the_impl_reads_what_it_stored() -> None:
    impl = SplitAttentionImpl(4, 24, 0.2, 2)
    cache = torch.full((3, 2, 16, 40), float("nan"), device=DEVICE)
    key, value = torch.randn(5, 2, 24, device=DEVICE), torch.randn(5, 2, 16, device=DEVICE)
    impl.do_kv_cache_update(None, key, value, cache, torch.arange(20, 25, device=DEVICE))
    ints = {"dtype": torch.int32, "device": DEVICE}
    metadata: Any = SimpleNamespace(
        query_start_loc=torch.tensor([0, 5], **ints), seq_lens=torch.tensor([5], **ints),
        block_table=torch.tensor([[1]], **ints), max_query_len=5, max_seq_len=5, plan=None,
        causal=True,
    )  # fmt: skip
    # The request's first slot is the fifth of the block: hide the others by storing there too.
    impl.do_kv_cache_update(None, key, value, cache, torch.arange(16, 21, device=DEVICE))
    query = torch.randn(5, 4, 24, device=DEVICE)
    out = impl.forward(None, query, None, None, cache, metadata, query.new_empty(5, 4, 16))
    # The first token sees itself alone.
    torch.testing.assert_close(out[0], value[0].repeat_interleave(2, 0))


def test_what_they_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"head_size": 192, "dtype": torch.bfloat16, "head_size_v": 128}
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert TritonAttentionDiffKVBackend.validate_configuration(**wanted) == []
    (reason,) = RocmAttentionBackend.validate_configuration(**wanted)
    assert reason == "values of 128 beside keys of 192 not supported"
    (reason,) = TritonAttentionDiffKVBackend.validate_configuration(**wanted | {"head_size_v": 4})
    assert "values of 4" in reason
    (reason,) = RocmAttentionBackend.validate_configuration(
        head_size=64, dtype=torch.float16, kv_cache_dtype="fp8"
    )[:1]
    assert "kv cache dtype fp8 not supported" in reason
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (
        "GPU" in RocmAttentionBackend.validate_configuration(head_size=64, dtype=torch.float16)[0]
    )
