"""One step of attention over a cache of any format and order, by any backend, against float64.

Unused slots and outputs are poisoned, blocks are shuffled, some are shared by requests, and every
tensor is a part of a larger one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from vllm import _custom_ops as ops
from vllm import _torch_ops
from vllm.v1.attention.ops.kv_formats import KVFormat, SideScales, kv_format

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Of the relative error against float64."""
LAYERS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """``lengths`` holds (tokens in the cache, of these new) per request.

    The first ``shared`` tokens, whole pages, of all requests that have them lie in the same blocks.
    """

    lengths: tuple[tuple[int, int], ...]
    kv_heads: int
    group: int
    head_size: int
    head_size_v: int = 0
    """Width of a value where it is another."""
    page: int = 16
    layout: str = "LBHNC"
    cache_dtype: str = "auto"
    dtype: torch.dtype = torch.float32
    window: int = 0
    soft_cap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    causal: bool = True
    shared: int = 0

    @cached_property
    def format(self) -> KVFormat | None:
        return kv_format(self.cache_dtype)

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def width_v(self) -> int:
        return self.head_size_v or self.head_size


def make_cache(case: Case, blocks: int, device: str) -> torch.Tensor:
    """A (B, H, N, C) view of poison in the physical order of the case's layout, one of 3 layers."""
    fmt = case.format
    heads = case.kv_heads if fmt is None else fmt.head_slots(case.kv_heads)
    plain = case.head_size + case.width_v
    content = plain if fmt is None else fmt.content_bytes(case.head_size)
    sizes = {"L": LAYERS, "B": blocks, "H": heads, "N": case.page, "C": content}
    # All bits set are a NaN of every float.
    options: dict[str, Any] = {"device": device, "dtype": torch.uint8 if fmt else case.dtype}
    fill = 255 if fmt else float("nan")
    if case.layout == "padded":
        # Pages as far apart as a larger one of another group of layers asks for.
        dense = heads * case.page * content
        room = dense + 64
        raw = torch.full((LAYERS * blocks * room,), fill, **options)
        shape = (blocks, heads, case.page, content)
        return raw.as_strided(shape, (room, case.page * content, content, 1), blocks * room)
    raw = torch.full([sizes[axis] for axis in case.layout], fill, **options)
    return raw.permute([case.layout.index(axis) for axis in "LBHNC"])[1]


@dataclass
class Step:
    """What one call takes; K and V of all tokens are in the cache, by ``store``."""

    case: Case
    cache: torch.Tensor
    query: torch.Tensor
    starts: torch.Tensor
    seq_lens: torch.Tensor
    table: torch.Tensor
    slots: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    scales: SideScales

    @property
    def options(self) -> dict[str, Any]:
        return {
            "causal": self.case.causal,
            "sliding_window": self.case.window,
            "logits_soft_cap": self.case.soft_cap,
            "alibi_slopes": self.slopes,
            "sinks": self.sinks,
            "fmt": self.case.format,
            "scales": self.scales,
        }


def make_step(case: Case, rng: random.Random, device: str = "cpu") -> Step:
    """A step of random numbers; nothing is stored yet."""
    pages = [-(-length // case.page) for length, _ in case.lengths]
    common = case.shared // case.page
    blocks = sum(pages) + 3
    order = list(range(1, blocks))
    rng.shuffle(order)
    prefix = [order.pop() for _ in range(common)]
    # Entries after a request's pages are never read.
    table = torch.zeros(len(pages), max(pages) + 1, dtype=torch.int32)
    slots, keys, values = [], [], []
    widths = (case.head_size, case.width_v)
    first_k, first_v = (torch.randn(common * case.page, case.kv_heads, w) for w in widths)
    # Heads of different magnitude: each has scales of its own, or none.
    magnitude = torch.logspace(-1, 1, case.kv_heads)[:, None]
    for row, ((length, _), count) in enumerate(zip(case.lengths, pages, strict=True)):
        own = [order.pop() for _ in range(count)]
        own[: min(common, length // case.page)] = prefix[: length // case.page]
        row_blocks = torch.tensor(own, dtype=torch.int64)
        table[row, :count] = row_blocks
        position = torch.arange(length)
        slots.append(row_blocks[position // case.page] * case.page + position % case.page)
        key, value = (torch.randn(length, case.kv_heads, w) for w in widths)
        same = min(common, length // case.page) * case.page
        key[:same], value[:same] = first_k[:same], first_v[:same]
        keys.append(key.to(case.dtype).to(device))
        values.append((value * magnitude).to(case.dtype).to(device))
    new = [count for _, count in case.lengths]
    sinks = torch.randn(case.heads)
    # A query inside a wider row, as a fused projection leaves it.
    wide = torch.randn(sum(new), case.heads + 2, case.head_size).to(case.dtype).to(device)
    return Step(
        case=case,
        cache=make_cache(case, blocks, device),
        query=wide[:, 1:-1],
        starts=torch.tensor([0, *new]).cumsum(0).to(torch.int32).to(device),
        seq_lens=torch.tensor([n for n, _ in case.lengths], dtype=torch.int32, device=device),
        table=table.to(device),
        slots=[slot.to(device) for slot in slots],
        keys=keys,
        values=values,
        slopes=torch.rand(case.heads, device=device) / 2 if case.alibi else None,
        sinks=sinks.to(case.dtype).float().to(device) if case.sinks else None,
        scales=SideScales(k=0.03, v=0.15) if case.format else SideScales(),
    )


def store(step: Step, backend: str, cache: torch.Tensor | None = None) -> torch.Tensor:
    """Write all tokens of all requests to ``cache``, by default the step's own; returns it."""
    cache = step.cache if cache is None else cache
    fmt = step.case.format
    for key, value, slots in zip(step.keys, step.values, step.slots, strict=True):
        if backend == "TORCH_REF":
            _torch_ops.store_kv_cache(key, value, cache, slots, fmt, step.scales)
        elif backend == "CPU_ATTN":
            ops.store_kv_cache(key, value, cache, slots, fmt, step.scales)
        elif backend == "TURBOQUANT":
            from vllm.v1.attention.ops.triton_slots import store_slots

            store_slots(key, value, cache, slots, fmt)
        else:
            from vllm.v1.attention.ops.triton_kv_store import rotate_and_store

            rotate_and_store(None, key, value, cache, slots, fmt=fmt, scales=step.scales)
    return cache


def attend(step: Step, backend: str) -> torch.Tensor:
    """What a backend writes into an output of NaN."""
    case = step.case
    out = torch.full_like(step.query, float("nan"))
    scale = case.head_size**-0.5
    tables = (step.starts, step.seq_lens, step.table)
    if backend == "CPU_ATTN":
        ops.paged_attention(step.query, step.cache, out, *tables, scale, **step.options)
        return out
    if backend == "TORCH_REF":
        _torch_ops.paged_attention(step.query, step.cache, out, *tables, scale, **step.options)
        return out
    from vllm.v1.attention.ops.triton_paged_attention import paged_attention
    from vllm.v1.attention.ops.turboquant import TurboQuantFormat, hadamard

    query = step.query
    if isinstance(case.format, TurboQuantFormat) and case.format.rotates:
        # As the backend does.
        query = (query.float() @ hadamard(case.head_size, query.device)).to(query.dtype)
    new = [count for _, count in case.lengths]
    paged_attention(
        query, step.cache, out, query_start_loc=step.starts, seq_lens=step.seq_lens,
        block_table=step.table, max_query_len=max(new), max_seq_len=int(step.seq_lens.max()),
        scale=scale, has_decodes=1 in new, window=case.window, soft_cap=case.soft_cap,
        alibi_slopes=step.slopes, sinks=step.sinks, causal=case.causal, fmt=case.format,
        scales=step.scales,
    )  # fmt: skip
    return out


def exact(step: Step) -> torch.Tensor:
    """The same bytes attended to in float64, by the plain reference, on the CPU."""
    case = step.case
    cache = step.cache.cpu()
    if case.format is None:
        cache = torch.nan_to_num(cache.double())
    out = torch.zeros((*step.query.shape[:2], case.width_v), dtype=torch.float64)
    options = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in step.options.items()}
    _torch_ops.paged_attention(
        step.query.cpu().double(), cache, out, step.starts.cpu(), step.seq_lens.cpu(),
        step.table.cpu(), case.head_size**-0.5, **options,
    )  # fmt: skip
    return out


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """NaN where an output was left as it was."""
    return float((found.cpu().double() - expected).norm() / expected.norm())
