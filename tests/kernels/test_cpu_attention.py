"""The C++ attention and store against the reference in float64, over the whole grid of features."""

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.kernels.covering import covering_array
from vllm import _custom_ops as ops
from vllm import _torch_ops

pytestmark = pytest.mark.skipif(not ops.has_extension(), reason="vllm._C is not built")

# Largest error against float64, relative to 1 + |value|: a few units of the dtype's last place,
# and for bf16 the rounding of probabilities.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

FEATURES: dict[str, list[Any]] = {
    "isa": ops.supported_isas() or ["pytorch"],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "cache_dtype": ["same", "same", torch.bfloat16, torch.float32],
    "group": [1, 3, 4, 7, 16],
    "num_kv_heads": [1, 2, 3],
    "head_size": [8, 40, 64, 80, 128, 192, 256],
    "block_size": [16, 48, 128],
    "layout": ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BHLNC", "padded"],
    "batch": ["decode", "prefill", "mixed", "one long", "with empty"],
    "window": [0, 1, 33, 300],
    "soft_cap": [0.0, 2.5],
    "alibi": [False, True],
    "sinks": [False, True],
    "causal": [True, True, False],
    "threads": [1, 2, 3],
}


@dataclass
class Batch:
    """Requests with some tokens computed before and some new ones."""

    new: list[int]
    before: list[int]

    @property
    def lengths(self) -> list[int]:
        return [a + b for a, b in zip(self.new, self.before, strict=True)]


def make_batch(kind: str, rng: random.Random) -> Batch:
    if kind == "decode":
        count = rng.choice([1, 3, 9])
        return Batch([1] * count, [rng.choice([0, 1, 17, 130, 400]) for _ in range(count)])
    if kind == "prefill":
        return Batch([rng.choice([2, 31, 64, 150]) for _ in range(2)], [0, 0])
    if kind == "one long":
        return Batch([rng.choice([1, 3])], [900])
    if kind == "with empty":
        return Batch([0, 5, 0], [0, 20, 33])
    return Batch([1, 40, 1, 3, 90], [200, 0, 3, 55, 130])


def make_cache(
    layout: str, num_blocks: int, heads: int, block_size: int, content: int, dtype: torch.dtype
) -> torch.Tensor:
    """A (B, H, N, C) view of NaN in the physical order of ``layout``, one of three layers."""
    sizes = {"L": 3, "B": num_blocks, "H": heads, "N": block_size, "C": content}
    order = "LBHNC" if layout == "padded" else layout
    shape = [sizes[axis] for axis in order]
    if layout == "padded":
        shape[-1] += 8
        shape[-2] += 1
    whole = torch.full(shape, float("nan"), dtype=dtype)
    view = whole.permute([order.index(axis) for axis in "LBHNC"])[1]
    return view[:, :, :block_size, :content]


@dataclass
class Step:
    """Everything that one call takes, and the cache's state before it."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor


def make_step(
    batch: Batch,
    *,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_size: int,
    block_size: int,
    layout: str,
) -> Step:
    lengths = batch.lengths
    pages = [-(-length // block_size) for length in lengths]
    num_blocks = sum(pages) + 3
    cache = make_cache(layout, num_blocks, kv_heads, block_size, 2 * head_size, cache_dtype)
    order = torch.randperm(num_blocks).tolist()
    # Entries after a request's pages are wild: nothing may follow them.
    table = torch.full((len(lengths), max(pages) + 2), -(10**6), dtype=torch.int32)
    slots: list[torch.Tensor] = []
    for row, (length, count) in enumerate(zip(lengths, pages, strict=True)):
        blocks = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int64)
        table[row, :count] = blocks
        position = torch.arange(length)
        slot = blocks[position // block_size] * block_size + position % block_size
        past = torch.randn(batch.before[row], 2, kv_heads, head_size).to(dtype)
        _torch_ops.store_kv_cache(past[:, 0], past[:, 1], cache, slot[: batch.before[row]])
        slots.append(slot[batch.before[row] :])
    # One qkv tensor with a margin, as a fused projection gives: rows are strided.
    widths = [heads * head_size, kv_heads * head_size, kv_heads * head_size, 8]
    qkv = torch.randn(sum(batch.new), sum(widths)).to(dtype)
    query, key, value, _ = qkv.split(widths, dim=-1)
    starts = torch.tensor([0, *batch.new]).cumsum(0).to(torch.int32)
    return Step(
        query=query.unflatten(-1, (-1, head_size)),
        key=key.unflatten(-1, (-1, head_size)),
        value=value.unflatten(-1, (-1, head_size)),
        cache=cache,
        query_start_loc=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        slot_mapping=torch.cat(slots),
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def check(row: dict[str, Any], rng: random.Random) -> None:
    dtype = row["dtype"]
    cache_dtype = dtype if row["cache_dtype"] == "same" else row["cache_dtype"]
    heads = row["group"] * row["num_kv_heads"]
    step = make_step(
        make_batch(row["batch"], rng),
        dtype=dtype,
        cache_dtype=cache_dtype,
        heads=heads,
        kv_heads=row["num_kv_heads"],
        head_size=row["head_size"],
        block_size=row["block_size"],
        layout=row["layout"],
    )
    expected_cache = step.cache.clone()
    _torch_ops.store_kv_cache(step.key, step.value, expected_cache, step.slot_mapping)
    ops.store_kv_cache(step.key, step.value, step.cache, step.slot_mapping)
    assert same_bits(step.cache, expected_cache), "the store left other bytes than it should"

    options = {
        "causal": row["causal"],
        "sliding_window": row["window"],
        "logits_soft_cap": row["soft_cap"],
        "alibi_slopes": torch.rand(heads) if row["alibi"] else None,
        "sinks": torch.randn(heads) if row["sinks"] else None,
    }
    tables = (step.query_start_loc, step.seq_lens, step.block_table)
    scale = row["head_size"] ** -0.5
    # The output has rows to spare, which nobody may write.
    out = torch.full((step.query.shape[0] + 2, heads, row["head_size"]), float("nan"), dtype=dtype)
    ops.paged_attention(step.query, step.cache, out, *tables, scale, **options)
    expected = torch.zeros(step.query.shape, dtype=torch.float64)
    _torch_ops.paged_attention(step.query.double(), step.cache, expected, *tables, scale, **options)
    assert out[-2:].isnan().all()
    error = ((out[:-2].double() - expected).abs() / (1 + expected.abs())).max().item()
    assert error <= TOLERANCE[dtype], f"error {error}"
    assert same_bits(step.cache, expected_cache), "attention wrote to the cache"


def test_attention_and_store_match_the_reference_whatever_is_combined(
    rng: random.Random,
) -> None:
    rows = covering_array(FEATURES, rng)
    try:
        for row in rows:
            ops.set_isa(row["isa"])
            ops.set_num_threads(row["threads"])
            print(row)
            check(row, rng)
    finally:
        ops.set_isa(ops.supported_isas()[0])
        ops.set_num_threads(2)
    assert len(rows) >= max(len(v) for v in FEATURES.values())


def test_a_token_without_a_slot_is_not_stored(isa: str, seed: int) -> None:
    cache = torch.full((4, 2, 16, 32), float("nan"))
    key, value = torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    # The third token is padding: the mapping ends before it.
    ops.store_kv_cache(key, value, cache, torch.tensor([-1, 37]))
    assert torch.equal(cache[2, :, 5], torch.cat((key[1], value[1]), dim=-1))
    cache[2, :, 5] = float("nan")
    assert cache.isnan().all()


def test_a_far_score_does_not_spoil_the_others(isa: str, seed: int) -> None:
    """Scores of +-1000: the softmax must subtract the maximum, also across splits of the keys."""
    step = make_step(
        Batch([1, 2], [700, 300]),
        dtype=torch.float32,
        cache_dtype=torch.float32,
        heads=2,
        kv_heads=1,
        head_size=16,
        block_size=16,
        layout="LBHNC",
    )
    ops.store_kv_cache(step.key, step.value, step.cache, step.slot_mapping)
    tables = (step.query_start_loc, step.seq_lens, step.block_table)
    out, expected = torch.empty(3, 2, 16), torch.empty(3, 2, 16, dtype=torch.float64)
    ops.paged_attention(step.query, step.cache, out, *tables, 200.0)
    _torch_ops.paged_attention(step.query.double(), step.cache, expected, *tables, 200.0)
    assert torch.allclose(out.double(), expected, atol=2e-3)


def test_a_nan_that_a_token_sees_is_not_hidden(isa: str, seed: int) -> None:
    step = make_step(
        Batch([2], [40]),
        dtype=torch.float32,
        cache_dtype=torch.float32,
        heads=1,
        kv_heads=1,
        head_size=16,
        block_size=16,
        layout="LBHNC",
    )
    step.value[0] = float("nan")
    ops.store_kv_cache(step.key, step.value, step.cache, step.slot_mapping)
    out = torch.zeros(2, 1, 16)
    tables = (step.query_start_loc, step.seq_lens, step.block_table)
    ops.paged_attention(step.query, step.cache, out, *tables, 1.0)
    assert out.isnan().all()


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [16, 40, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rope_and_store_match_the_reference(
    isa: str, seed: int, is_neox: bool, rotary_dim: int, dtype: torch.dtype
) -> None:
    step = make_step(
        Batch([1, 9, 30], [4, 0, 50]),
        dtype=dtype,
        cache_dtype=dtype,
        heads=6,
        kv_heads=2,
        head_size=64,
        block_size=16,
        layout="BLHNC",
    )
    positions = torch.randint(0, 100, (40,))
    table = torch.randn(100, rotary_dim)
    slots = step.slot_mapping.clone()
    slots[5] = -1
    wide = step.query.double(), step.key.double(), step.value.double()
    cache = step.cache.double()
    query = step.query.clone()
    ops.rope_and_store(positions, query, step.key, step.value, table, is_neox, step.cache, slots)
    _torch_ops.rope_and_store(
        positions, wide[0], wide[1], wide[2], table.double(), is_neox, cache, slots
    )
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert torch.allclose(query.double(), wide[0], atol=tolerance, rtol=tolerance)
    assert torch.allclose(
        step.cache.double(), cache, atol=tolerance, rtol=tolerance, equal_nan=True
    )


def test_a_rotation_wider_than_its_heads_is_refused() -> None:
    around = torch.zeros(4, 1, 64)
    with pytest.raises(RuntimeError):
        ops.rotary_embedding(
            torch.arange(4), around[..., 16:32], None, 16, torch.randn(9, 32), True
        )
    assert torch.count_nonzero(around) == 0


def test_a_position_outside_the_table_is_refused() -> None:
    query = torch.randn(2, 1, 16)
    with pytest.raises(IndexError, match="position 64 is not below 64"):
        ops.rotary_embedding(torch.tensor([0, 64]), query, None, 16, torch.randn(64, 16), True)


@pytest.mark.skipif(not ops.has_extension(), reason="the PyTorch form indexes, and says so itself")
@pytest.mark.parametrize(
    "change",
    [
        {"query": torch.randn(3, 3, 16), "out": torch.zeros(3, 3, 16)},
        {"out": torch.zeros(3, 2, 16)},
        {"seq_lens": torch.tensor([20], dtype=torch.int32)},
        {"block_table": torch.ones(1, 2, dtype=torch.int32)},
        {"alibi_slopes": torch.ones(2)},
        {"sinks": torch.ones(1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_tensors_that_disagree_are_not_read_beyond_their_ends(change: dict[str, Any]) -> None:
    given = {
        "query": torch.randn(3, 4, 16),
        "kv_cache": torch.zeros(6, 2, 16, 32),
        "out": torch.zeros(3, 4, 16),
        "query_start_loc": torch.tensor([0, 1, 3], dtype=torch.int32),
        "seq_lens": torch.tensor([20, 30], dtype=torch.int32),
        "block_table": torch.tensor([[1, 2], [3, 4]], dtype=torch.int32),
        "scale": 0.25,
    }
    ops.paged_attention(**given)
    with pytest.raises(AssertionError):
        ops.paged_attention(**given | change)


@pytest.mark.skipif(not ops.has_extension(), reason="the PyTorch form indexes, and says so itself")
def test_more_slots_than_tokens_are_not_stored() -> None:
    key = torch.randn(3, 2, 16)
    cache, slots = torch.zeros(6, 2, 16, 32), torch.arange(4)
    with pytest.raises(AssertionError, match="a slot for each token"):
        ops.store_kv_cache(key, key.clone(), cache, slots)
    assert not cache.any()
