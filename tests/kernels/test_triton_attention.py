"""TRITON_ATTN against float64: on a GPU where there is one, else in the interpreter."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
import triton

from vllm import _torch_ops
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.attention.ops.kv_formats import FORMATS, KVFormat, SideScales, kv_format
from vllm.v1.attention.ops.triton_decode import make_plan_buffers, max_items, plan_decodes
from vllm.v1.attention.ops.triton_kv_store import rotate_and_store
from vllm.v1.attention.ops.triton_paged_attention import default_config, paged_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SCALES = SideScales(k=0.03, v=0.07)
# Physical orders of one layer's view, as permutations of (B, H, N, C).
ORDERS = {"HND": (0, 1, 2, 3), "NHD": (0, 2, 1, 3)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """``lengths`` holds (tokens in the cache, of these new) per request."""

    lengths: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    head_size: int
    page: int = 16
    window: int = 0
    soft_cap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    causal: bool = True
    dtype: torch.dtype = torch.float32
    order: str = "HND"
    pad: int = 0
    cache_dtype: str = "auto"

    @property
    def format(self) -> KVFormat | None:
        return kv_format(self.cache_dtype)

    @property
    def content(self) -> int:
        """Elements of one (head, token)."""
        return 2 * (self.format.side_bytes(self.head_size) if self.format else self.head_size)


def poisoned_cache(case: Case, blocks: int) -> torch.Tensor:
    """NaN everywhere, in the case's physical order, blocks ``pad`` elements further apart."""
    order = ORDERS[case.order]
    logical = (blocks, case.kv_heads, case.page, case.content)
    shape = [logical[axis] for axis in order]
    dense = shape[1] * shape[2] * shape[3]
    # All bits set are a NaN of every float.
    dtype = torch.uint8 if case.format else case.dtype
    fill = 255 if case.format else float("nan")
    raw = torch.full((blocks * (dense + case.pad),), fill, dtype=dtype, device=DEVICE)
    strides = (dense + case.pad, shape[2] * shape[3], shape[3], 1)
    inverse = [order.index(axis) for axis in range(4)]
    return raw.as_strided(shape, strides).permute(inverse)


def relative_error(case: Case, seed: int) -> float:
    torch.manual_seed(seed)
    fmt = case.format
    seq_lens = torch.tensor([n for n, _ in case.lengths], dtype=torch.int32)
    query_lens = torch.tensor([n for _, n in case.lengths])
    starts = torch.zeros(len(case.lengths) + 1, dtype=torch.int32)
    starts[1:] = query_lens.cumsum(0)
    pages = [-(-n // case.page) for n, _ in case.lengths]
    free = (torch.randperm(sum(pages) + 2) + 1).tolist()
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    cache = poisoned_cache(case, sum(pages) + 3)
    for request, (length, _) in enumerate(case.lengths):
        for page in range(pages[request]):
            block = free.pop()
            table[request, page] = block
            used = min(case.page, length - page * case.page)
            key, value = torch.randn(2, case.kv_heads, used, case.head_size, dtype=case.dtype)
            # Heads of different magnitude: each has scales of its own, or none.
            if fmt and fmt.per_token_head:
                value *= torch.logspace(-2, 2, case.kv_heads)[:, None, None]
            content = fmt.quantise_kv(key, value, SCALES) if fmt else torch.cat((key, value), -1)
            cache[block, :, :used] = content.to(DEVICE)
    tokens = int(starts[-1])
    # A query inside a wider row, as a fused projection leaves it.
    wide = torch.randn(tokens, case.heads + 2, case.head_size).to(case.dtype).to(DEVICE)
    query = wide[:, 1:-1]
    out = torch.full((tokens, case.heads, case.head_size), float("nan"), dtype=case.dtype)
    out = out.to(DEVICE)
    slopes = torch.rand(case.heads) / 2 if case.alibi else None
    sinks = torch.randn(case.heads) if case.sinks else None
    scale = case.head_size**-0.5
    paged_attention(
        query, cache, out,
        query_start_loc=starts.to(DEVICE), seq_lens=seq_lens.to(DEVICE),
        block_table=table.to(DEVICE), max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()), scale=scale,
        has_decodes=bool((query_lens == 1).any()), window=case.window, soft_cap=case.soft_cap,
        alibi_slopes=None if slopes is None else slopes.to(DEVICE),
        sinks=None if sinks is None else sinks.to(DEVICE), causal=case.causal,
        fmt=fmt, scales=SCALES,
    )  # fmt: skip
    exact = torch.zeros(tokens, case.heads, case.head_size, dtype=torch.float64)
    _torch_ops.paged_attention(
        query.cpu().double(), cache.cpu() if fmt else torch.nan_to_num(cache.cpu().double()), exact,
        starts, seq_lens, table, scale, causal=case.causal, sliding_window=case.window,
        logits_soft_cap=case.soft_cap, alibi_slopes=slopes, sinks=sinks, fmt=fmt, scales=SCALES,
    )  # fmt: skip
    return float((out.cpu().double() - exact).norm() / exact.norm())


MIXED = ((133, 20), (60, 60), (70, 1), (1, 1), (33, 2))
CASES = {
    "decode": Case(lengths=((33, 1), (1, 1), (300, 1)), heads=8, kv_heads=2, head_size=64),
    "split": Case(lengths=((700, 1), (5, 1)), heads=3, kv_heads=1, head_size=32),
    "prefill": Case(lengths=((33, 20), (90, 90)), heads=6, kv_heads=2, head_size=64),
    "mixed": Case(lengths=MIXED, heads=9, kv_heads=3, head_size=64, order="NHD"),
    "window": Case(lengths=MIXED, heads=4, kv_heads=4, head_size=80, page=32, window=24),
    "long window": Case(
        lengths=((600, 1), (500, 40)), heads=4, kv_heads=2, head_size=16, window=290
    ),
    "soft cap": Case(lengths=MIXED, heads=4, kv_heads=1, head_size=48, soft_cap=20.0, pad=64),
    "alibi": Case(lengths=MIXED, heads=7, kv_heads=1, head_size=32, alibi=True),
    "sinks": Case(lengths=((600, 1), (90, 30)), heads=4, kv_heads=2, head_size=32, sinks=True),
    "bidirectional": Case(
        lengths=((40, 40), (17, 17)), heads=4, kv_heads=4, head_size=32, causal=False
    ),
    "fp16": Case(lengths=MIXED, heads=8, kv_heads=2, head_size=128, page=64, dtype=torch.float16),
    "wide": Case(lengths=((130, 1), (50, 9)), heads=2, kv_heads=1, head_size=256, pad=16),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_float64(name: str) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    assert relative_error(CASES[name], seed) < TOLERANCE[CASES[name].dtype]


QUANTISED = [name for name in FORMATS if name not in ("fp8", "nvfp4")]


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("order", ORDERS)
def test_stored_bytes_are_those_of_the_format(name: str, order: str) -> None:
    """On inputs that need no rounding, which is what the interpreter can't do for fp8."""
    case = Case(
        lengths=((9, 9),), heads=4, kv_heads=3, head_size=80, order=order, pad=32, cache_dtype=name
    )
    fmt, scales = case.format, SideScales(k=0.25, v=2.0)
    content = torch.randint(0, 256, (8, 3, case.content), dtype=torch.uint8)
    if fmt.dtype.is_floating_point:
        content &= 0x77
    for start in (0, fmt.side_bytes(80)) if fmt.per_token_head else ():
        # One number of each side is the largest, and scales are powers of two.
        largest = torch.tensor([fmt.largest]).to(fmt.dtype).view(torch.uint8)
        content[..., start] = 0x8F if fmt.is_int4 else largest
        content[..., start + fmt.data_bytes(80) :][..., :4] = torch.tensor([0, 0, 0, 64])
    if fmt.is_int4:
        low, high = (content & 15).clamp(min=1), (content >> 4).clamp(min=1)
        whole = [*range(fmt.data_bytes(80), fmt.side_bytes(80))]
        whole += [fmt.side_bytes(80) + i for i in whole]
        kept = content[..., whole]
        content = low | high << 4
        content[..., whole] = kept
    elif fmt.dtype == torch.int8:
        content[content == 128] = 129
    key, value = fmt.dequantise_kv(content, scales).to(DEVICE).split(80, dim=-1)
    slots = torch.tensor([17, 3, -1, 40, 41, 79, 0, -1], device=DEVICE)
    ours = poisoned_cache(case, 5)
    theirs = poisoned_cache(case, 5)
    rotate_and_store(None, key, value, ours, slots, fmt=fmt, scales=scales)
    written = slots[slots >= 0]
    theirs[written // 16, :, written % 16] = content.to(DEVICE)[slots >= 0]
    assert torch.equal(ours, theirs)
    _torch_ops.store_kv_cache(key, value, theirs.fill_(255), slots, fmt, scales)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.gpu] * ("fp8" in n)) for n in QUANTISED],
)
@pytest.mark.parametrize("rotary", [64, 0])
def test_norms_and_rotation_come_before_quantising(name: str, rotary: int) -> None:
    case = Case(lengths=((9, 9),), heads=4, kv_heads=3, head_size=80, cache_dtype=name)
    fmt = case.format
    ours, theirs = poisoned_cache(case, 5), poisoned_cache(case, 5)
    qkv = torch.randn(8, 10, 80, device=DEVICE)
    qkv *= torch.logspace(-1, 1, 8, device=DEVICE)[:, None, None]
    query, key, value = qkv[:, :4].clone(), qkv[:, 4:7], qkv[:, 7:]
    slots = torch.tensor([17, 3, -1, 40, 41, 79, 0, -1], device=DEVICE)
    positions = torch.tensor([5, 0, 3, 9, 2, 7, 7, 1], device=DEVICE)
    weights = torch.randn(80, device=DEVICE), torch.randn(80, device=DEVICE)
    table = torch.randn(10, rotary, device=DEVICE) if rotary else None
    expected = _torch_ops.rms_norm(key, weights[1], 1e-5)
    if table is not None:
        _torch_ops.rotary_embedding(positions, expected, None, 80, table, True)
    rotate_and_store(
        query, key, value, ours, slots, positions, table, norm_weights=weights, eps=1e-5, fmt=fmt,
        scales=SCALES,
    )  # fmt: skip
    _torch_ops.store_kv_cache(expected, value, theirs, slots, fmt, SCALES)
    at = (slots[slots >= 0] // 16, slice(None), slots[slots >= 0] % 16)
    ours, theirs = (fmt.dequantise_kv(cache[at], SCALES) for cache in (ours, theirs))
    # The last bit of a norm may move a number to the next step of the format, seldom.
    assert ((ours - theirs).abs() > 1e-3 * theirs.abs()).float().mean() < 0.02
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_scales_of_a_layer_move_values_that_fp8_would_cut_off() -> None:
    fmt = kv_format("fp8_e4m3")
    x = torch.randn(5, 32) * 1000
    assert fmt.quantise(x).view(fmt.dtype).float().abs().max() == fmt.largest
    back = fmt.dequantise(fmt.quantise(x, 16.0), 16.0)
    assert (back - x).norm() < 0.04 * x.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_equals_float64_in_half_precision(name: str, dtype: torch.dtype) -> None:
    case = Case(**(vars(CASES[name]) | {"dtype": dtype}))
    assert relative_error(case, random.randrange(1 << 30)) < TOLERANCE[dtype]


@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "pairs"])
@pytest.mark.parametrize("rotary", [64, 32, 0])
@pytest.mark.parametrize("order", ORDERS)
def test_rotating_and_storing_equals_the_plain_operators(
    is_neox: bool, rotary: int, order: str
) -> None:
    case = Case(lengths=((9, 9),), heads=4, kv_heads=2, head_size=64, order=order, pad=32)
    ours, theirs = poisoned_cache(case, 5), poisoned_cache(case, 5)
    qkv = torch.randn(9, 8, 64, device=DEVICE)
    query, key, value = qkv[:, :4].clone(), qkv[:, 4:6], qkv[:, 6:]
    slots = torch.tensor([17, 3, -1, 40, 41, 79, 0, -1], device=DEVICE)
    positions = torch.tensor([5, 0, 3, 9, 2, 7, 7, 1], device=DEVICE)
    table = torch.randn(10, rotary, device=DEVICE)
    expected = query.clone()
    if rotary:
        rotate_and_store(query, key, value, ours, slots, positions, table, is_neox)
        _torch_ops.rope_and_store(
            positions, expected[:8], key[:8].clone(), value[:8], table, is_neox, theirs, slots
        )
    else:
        rotate_and_store(None, key, value, ours, slots)
        _torch_ops.store_kv_cache(key, value, theirs, slots)
    torch.testing.assert_close(query, expected)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("window", [0, 300])
def test_a_plan_covers_each_token_of_each_decode_once(window: int) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    lengths = [rng.choice([0, 1, 63, 64, 900, rng.randrange(1, 5000)]) for _ in range(9)]
    query_lens = [rng.choice([1, 1, 1, 5]) for _ in lengths]
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0).to(torch.int32)
    buffers = make_plan_buffers(16, 2, 5000, torch.device(DEVICE))
    plan = plan_decodes(
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        starts.to(DEVICE), 2, 5000, window, buffers,
    )  # fmt: skip
    items = plan.items[: int(plan.count)].tolist()
    assert len(items) <= plan.num_items <= buffers.num_items
    for request, (length, query_len) in enumerate(zip(lengths, query_lens, strict=True)):
        mine = [item for item in items if item[0] == request]
        if query_len != 1 or not length:
            assert not mine
            continue
        first = max(length - window, 0) if window else 0
        assert mine[0][1] == first // 64 * 64
        assert [item[1] for item in mine[1:]] == [item[2] for item in mine[:-1]]
        assert mine[-1][2] == length
        assert [item[3] for item in mine] == list(range(len(mine)))
        assert {tuple(item[4:7]) for item in mine} == {(len(mine), int(starts[request]), length)}


def test_a_launch_depends_on_the_number_of_requests_and_holds_every_plan() -> None:
    assert max_items(1, 8, 131072, 132) == 133
    assert max_items(256, 8, 4096, 132) == 388
    assert max_items(4, 8, 200, 132) == 8


@pytest.mark.parametrize("rotary", [64, 32, 0])
def test_head_norms_on_the_way_equal_norms_before(rotary: int) -> None:
    case = Case(lengths=((9, 9),), heads=5, kv_heads=3, head_size=64)
    ours, theirs = poisoned_cache(case, 5), poisoned_cache(case, 5)
    qkv = torch.randn(9, 11, 64, device=DEVICE) * 3
    query, key, value = qkv[:, :5].clone(), qkv[:, 5:8], qkv[:, 8:]
    slots = torch.tensor([17, 3, -1, 40, 41, 79, 0, -1, 5], device=DEVICE)
    positions = torch.tensor([5, 0, 3, 9, 2, 7, 7, 1, 4], device=DEVICE)
    table = torch.randn(10, rotary, device=DEVICE) if rotary else None
    weights = torch.randn(64, device=DEVICE), torch.randn(64, device=DEVICE)
    normed_query = _torch_ops.rms_norm(query, weights[0], 1e-5)
    normed_key = _torch_ops.rms_norm(key, weights[1], 1e-5)
    rotate_and_store(
        query, key, value, ours, slots, positions, table, norm_weights=weights, eps=1e-5
    )
    if table is None:
        _torch_ops.store_kv_cache(normed_key, value, theirs, slots)
    else:
        _torch_ops.rope_and_store(
            positions, normed_query, normed_key, value, table, True, theirs, slots
        )
    torch.testing.assert_close(query, normed_query)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("page", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("head_size", TritonAttentionBackend.get_supported_head_sizes())
def test_every_declared_shape_has_a_configuration_that_the_copy_engine_can_read(
    page: int, head_size: int
) -> None:
    config = default_config(page, head_size, torch.bfloat16, copies=True)
    if config.tma:
        assert page % config.prefill_tile == 0
        assert head_size & (head_size - 1) == 0


def test_without_a_device_or_the_interpreter_it_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wanted = {"head_size": 64, "dtype": torch.float32}
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert TritonAttentionBackend.validate_configuration(**wanted) == []
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert "GPU" in TritonAttentionBackend.validate_configuration(**wanted)[0]
