"""Attention to latents and to values of another width, by the kernels, against float64."""

import random
from typing import Any

import pytest
import torch

from tests.kernels.covering import covering_array
from tests.kernels.test_cpu_attention import TOLERANCE, make_batch, make_cache, same_bits
from vllm import _custom_ops as ops
from vllm import _torch_ops

pytestmark = pytest.mark.skipif(not ops.has_extension(), reason="vllm._C is not built")

FEATURES: dict[str, list[Any]] = {
    "isa": ops.supported_isas() or ["pytorch"],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    # Key, value, where the value begins: latents (V2's, small ones), then values behind the key.
    "sizes": [(576, 512, 0), (40, 32, 0), (24, 18, 0), (192, 128, 192), (16, 40, 16), (8, 100, 8)],
    "heads": [1, 3, 16, 60],
    "block_size": [16, 48],
    "layout": ["LBHNC", "LHBNC", "BLHNC", "BHLNC", "padded"],
    "batch": ["decode", "prefill", "mixed", "one long", "with empty"],
    "window": [0, 33],
    "sinks": [False, True],
    "threads": [1, 2],
}


def check(row: dict[str, Any], rng: random.Random) -> None:
    dtype, heads, block_size = row["dtype"], row["heads"], row["block_size"]
    size, value_size, offset = row["sizes"]
    content = max(size, offset + value_size)
    batch = make_batch(row["batch"], rng)
    pages = [-(-length // block_size) for length in batch.lengths]
    cache = make_cache(row["layout"], sum(pages) + 1, 1, block_size, content, dtype)
    order = torch.randperm(sum(pages) + 1).tolist()
    table = torch.full((len(pages), max(pages) + 1), -(10**6), dtype=torch.int32)
    for index, (length, count) in enumerate(zip(batch.lengths, pages, strict=True)):
        blocks = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int64)
        table[index, :count] = blocks
        position = torch.arange(length)
        slots = blocks[position // block_size] * block_size + position % block_size
        latents = torch.randn(length, content).to(dtype)
        expected = cache.clone()
        _torch_ops.store_latent(latents, expected[:, 0], slots)
        ops.store_latent(latents, cache[:, 0], slots)
        assert same_bits(cache, expected), "the store left other bytes than it should"
    starts = torch.tensor([0, *batch.new]).cumsum(0).to(torch.int32)
    query = torch.randn(heads, sum(batch.new), size).to(dtype).transpose(0, 1)
    args = (starts, torch.tensor(batch.lengths, dtype=torch.int32), table, size**-0.5)
    options = {
        "sliding_window": row["window"],
        "sinks": torch.randn(heads) if row["sinks"] else None,
        "value_offset": offset,
    }
    out = torch.full((query.shape[0] + 2, heads, value_size), float("nan"), dtype=dtype)
    ops.paged_attention(query, cache, out, *args, **options)
    expected = torch.zeros((query.shape[0], heads, value_size), dtype=torch.float64)
    _torch_ops.paged_attention(query.double(), cache, expected, *args, **options)
    assert out[-2:].isnan().all()
    error = ((out[:-2].double() - expected).abs() / (1 + expected.abs())).max().item()
    assert error <= TOLERANCE[dtype], f"error {error}"


def test_latents_match_the_reference_whatever_is_combined(rng: random.Random) -> None:
    try:
        for row in covering_array(FEATURES, rng):
            ops.set_isa(row["isa"])
            ops.set_num_threads(row["threads"])
            print(row)
            check(row, rng)
    finally:
        ops.set_isa(ops.supported_isas()[0])
        ops.set_num_threads(2)


def test_wider_heads_than_the_kernel_knows_are_served_by_the_reference() -> None:
    cache = torch.randn(3, 1, 16, 600)
    query, out = torch.randn(1, 2, 600), torch.zeros(1, 2, 584)
    tables = (torch.tensor([0, 1]).int(), torch.tensor([20]).int(), torch.tensor([[2, 1]]).int())
    ops.paged_attention(query, cache, out, *tables, 0.05, value_offset=0)
    expected = torch.zeros(1, 2, 584, dtype=torch.float64)
    _torch_ops.paged_attention(query.double(), cache, expected, *tables, 0.05, value_offset=0)
    assert torch.allclose(out.double(), expected, atol=1e-5)


def test_a_product_is_written_to_strided_rows() -> None:
    weight = torch.randn(24, 16)
    x = torch.randn(5, 20)[:, :16]
    out = torch.full((5, 40), float("nan"))
    for form in (weight, ops.pack_weight(weight)):
        ops.linear_into(x, form, out[:, 8:32])
        assert torch.allclose(out[:, 8:32], x @ weight.T, atol=1e-5)
        assert out[:, :8].isnan().all() and out[:, 32:].isnan().all()
    with pytest.raises(ValueError, match=r"output \(5, 25\) for a product \(5, 24\)"):
        ops.linear_into(x, ops.pack_weight(weight), out[:, :25])
