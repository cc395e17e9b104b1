"""TRITON_MLA and the kernels of state layers on a GPU, beside what the same run reads and copies.

    python benchmarks/kernels/latents_and_states.py [--only REGEX] [--output FILE] [--warm]

Steps of one token are timed as a CUDA graph's replay, in GB/s of what they have to move: latents
read, states read and written. Prompts are timed in milliseconds. bf16, block tables shuffled, each
state in a page of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import gpu_identity

from vllm import _triton_state_ops as state_ops
from vllm._torch_state_ops import StateSegments
from vllm._triton_linear_attention import ChunkConfig, linear_attention
from vllm.v1.attention.ops.triton_mla import (
    AbsorbedConfig,
    absorbed_attention,
    default_absorbed_config,
    make_absorbed_buffers,
)
from vllm.v1.attention.ops.triton_mla_prefill import (
    attention_tiles,
    expand_latents,
    expand_tiles,
    expanded_attention,
)
from vllm.v1.attention.ops.triton_shares import plan_shares

RANK, ROPE, NOPE, V, PAGE = 512, 64, 128, 128, 64
OPTIONS: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
Row = dict[str, Any]
Case = tuple[str, Callable[[], Row]]
# Tried beside the default, at 64 x 4096.
_GROUPS: dict[str, Any] = {"rows": 64, "tile": 64, "warps": 8, "stages": 3, "by_groups": True}
CONFIGS = {
    16: [
        AbsorbedConfig(**_GROUPS, bulk=False),
        AbsorbedConfig(rows=16, tile=64, warps=4, stages=2, resident=2),
    ],
    32: [],
    128: [
        AbsorbedConfig(**_GROUPS, bulk=False),
        AbsorbedConfig(rows=64, tile=64, warps=8, stages=3),
    ],
}
_CHUNKS = [
    ChunkConfig(tokens=32, warps=4, stages=2),
    ChunkConfig(tokens=32, warps=4, stages=2, narrow=True),
    ChunkConfig(tokens=32, warps=8, stages=2, narrow=True),
    ChunkConfig(tokens=64, warps=8, stages=2, narrow=True),
]
CHUNKS = {
    "gated": _CHUNKS[:3],
    "lightning": _CHUNKS,
    "kimi": [ChunkConfig(tokens=16, warps=warps, stages=2, narrow=True) for warps in (4, 8)],
}
warm_only = False


def replay_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of ``call`` as a captured graph: no launch cost in it."""
    call()
    torch.cuda.synchronize()
    if warm_only:
        return 1.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return do_bench(graph.replay, return_mode="median", warmup=5, rep=30)


def prompt_ms(call: Callable[[], object]) -> float:
    call()
    torch.cuda.synchronize()
    return 1.0 if warm_only else do_bench(call, return_mode="median", warmup=5, rep=40)


@triton.jit
def _read_kernel(data_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Sums of what programs read; ``size`` is a multiple of BLOCK."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK, num_stages=4):
        total += tl.load(data_ptr + start + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _nothing_kernel(data_ptr):
    return


def plain_read(size: int) -> Row:
    """A kernel that does nothing but read as many bytes."""
    data = torch.zeros(size // 2, **OPTIONS)
    sums = torch.empty(132 * 16, device="cuda")
    ms = replay_ms(lambda: _read_kernel[(132 * 16,)](data, sums, size // 2, BLOCK=2048))
    return {"us": ms * 1e3, "gb_s": size / ms / 1e6}


def nothing() -> Row:
    """What is measured of a captured kernel that does nothing."""
    data = torch.zeros(1, device="cuda")
    return {"us": replay_ms(lambda: _nothing_kernel[(1,)](data)) * 1e3}


def ceilings() -> dict[str, float]:
    data = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(data)
    copy = do_bench(lambda: target.copy_(data), return_mode="median")
    read = do_bench(lambda: data.view(torch.float32).sum(), return_mode="median")
    side = 8192
    left, right = (torch.randn(side, side, **OPTIONS) for _ in range(2))
    product = do_bench(lambda: left @ right, return_mode="median")
    return {
        "copy_gb_s": round(2 * data.numel() / copy / 1e6, 1),
        "read_gb_s": round(data.numel() / read / 1e6, 1),
        "matmul_tflop_s": round(2 * side**3 / product / 1e9, 1),
    }


def latents(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cache, block table and lengths of requests."""
    pages = [-(-n // PAGE) for n in lengths]
    cache = torch.randn(sum(pages) + 1, PAGE, RANK + ROPE, **OPTIONS)
    order = torch.randperm(sum(pages), device="cuda", dtype=torch.int32) + 1
    table = torch.zeros(len(lengths), max(pages), dtype=torch.int32, device="cuda")
    for row, blocks in zip(table, order.split(pages), strict=True):
        row[: len(blocks)] = blocks
    return cache, table, torch.tensor(lengths, dtype=torch.int32, device="cuda")


def decode(heads: int, lengths: list[int], config: AbsorbedConfig | None = None) -> Row:
    """Times with the plan made before, as the layers of a model share one."""
    device = torch.device("cuda")
    config = config or default_absorbed_config(heads, torch.bfloat16, device)
    cache, table, lens = latents(lengths)
    count = len(lengths)
    starts = torch.arange(count + 1, dtype=torch.int32, device=device)
    buffers = make_absorbed_buffers(count, heads, torch.bfloat16, device, config)
    plan = plan_shares(lens, starts, buffers)
    query = torch.randn(count, heads, RANK, **OPTIONS)
    rotated = torch.randn(count, heads, ROPE, **OPTIONS)
    out = torch.empty_like(query)
    ms = replay_ms(
        partial(
            absorbed_attention, query, rotated, cache, out, plan, table, scale=0.07, config=config
        )
    )
    size = sum(lengths) * (RANK + ROPE) * 2
    flops = 2 * heads * sum(lengths) * (2 * RANK + ROPE)
    row = {"us": ms * 1e3, "gb_s": size / ms / 1e6, "tflop_s": flops / ms / 1e9}
    # Products of the same inputs by PyTorch: a fast kernel that is wrong is no result.
    errors = []
    for request in {0, count // 2, count - 1}:
        pages = table[request, : -(-lengths[request] // PAGE)].long()
        states = cache[pages].flatten(0, 1)[: lengths[request]].float()
        both = torch.cat((query[request], rotated[request]), -1).float()
        exact = (both @ states.T * 0.07).softmax(-1) @ states[:, :RANK]
        errors.append(float((out[request].float() - exact).norm() / exact.norm()))
    row["error_percent"] = max(errors) * 100
    assert row["error_percent"] < 2, row
    return row


def plan_time(requests: int) -> Row:
    """The plan of a step, once for all layers."""
    device = torch.device("cuda")
    buffers = make_absorbed_buffers(requests, 16, torch.bfloat16, device)
    lens = torch.full((requests,), 4096, dtype=torch.int32, device=device)
    starts = torch.arange(requests + 1, dtype=torch.int32, device=device)
    return {"us": replay_ms(lambda: plan_shares(lens, starts, buffers)) * 1e3}


def prefill(heads: int, lengths: list[int]) -> Row:
    cache, table, _ = latents(lengths)
    requests, total = list(range(len(lengths))), sum(lengths)
    firsts = [sum(lengths[:i]) for i in requests]
    to_expand = torch.from_numpy(expand_tiles(requests, lengths)).cuda()
    to_attend = torch.from_numpy(attention_tiles(requests, firsts, lengths, lengths)).cuda()
    weight = torch.randn(heads, NOPE + V, RANK, **OPTIONS) / RANK**0.5
    query = torch.randn(total, heads, NOPE + ROPE, **OPTIONS)
    out = torch.empty(total, heads, V, **OPTIONS)
    keys, values = (torch.empty(total, heads * width, **OPTIONS) for width in (NOPE, V))

    def expand() -> None:
        expand_latents(cache, weight[:, :NOPE], keys, table, to_expand)
        expand_latents(cache, weight[:, NOPE:], values, table, to_expand)

    def attend() -> None:
        expanded_attention(query, keys, values, cache, out, table, to_attend, rank=RANK, scale=0.07)

    expand_ms, attend_ms = prompt_ms(expand), prompt_ms(attend)
    expand_work = 2 * total * heads * (NOPE + V) * RANK
    attend_work = sum(n * n for n in lengths) * heads * (NOPE + ROPE + V)
    return {
        "us": (expand_ms + attend_ms) * 1e3,
        "expand_tflop_s": expand_work / expand_ms / 1e9,
        "attend_tflop_s": attend_work / attend_ms / 1e9,
    }


def segments(requests: int, tokens: int) -> StateSegments:
    """Requests of as many tokens each; each continues a block and leaves its state there."""
    starts = torch.arange(requests + 1, dtype=torch.int32, device="cuda")
    blocks = torch.randperm(requests, device="cuda", dtype=torch.int32) + 1
    return StateSegments(
        token_starts=starts * tokens, request_starts=starts, sources=blocks, targets=blocks,
        num_tokens=requests * tokens, num_requests=requests,
    )  # fmt: skip


def states(requests: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """States in pages with other bytes between them."""
    size = torch.Size(shape).numel()
    pages = torch.randn(requests + 1, size + 4096, device="cuda").to(dtype) * 0.1
    return pages[:, :size].unflatten(1, shape)


def timed(
    call: Callable[[], object], requests: int, tokens: int, state: torch.Tensor, others: int
) -> Row:
    """``others`` are bytes of inputs and outputs that a step moves beside states."""
    if tokens > 1:
        ms = prompt_ms(call)
        return {"us": ms * 1e3, "tokens_s": requests * tokens / ms * 1e3}
    ms = replay_ms(call)
    size = 2 * requests * state[0].numel() * state.element_size() + others
    return {"us": ms * 1e3, "gb_s": size / ms / 1e6}


def num_bytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def delta_rule(kind: str, requests: int, tokens: int, config: ChunkConfig | None = None) -> Row:
    """Qwen3-Next's sizes (gated), Kimi Linear's (kimi), MiniMax-Text-01's (lightning)."""
    heads, key_heads, size = {"gated": (32, 16, 128), "kimi": (32, 32, 128)}.get(
        kind, (64, 64, 128)
    )
    total = requests * tokens
    query, key = (torch.randn(total, key_heads, size, **OPTIONS) for _ in range(2))
    value, out = (torch.randn(total, heads, size, **OPTIONS) for _ in range(2))
    gate: torch.Tensor | None = torch.randn(total, heads, **OPTIONS)
    biases: torch.Tensor | None = torch.zeros(heads, device="cuda")
    beta: torch.Tensor | None = torch.randn(total, heads, **OPTIONS)
    if kind == "kimi":
        gate = torch.randn(total, heads, size, **OPTIONS)
        biases = torch.zeros(heads, size, device="cuda")
    elif kind == "lightning":
        gate = beta = biases = None
    rates = torch.rand(heads, device="cuda") * 0.1
    state = states(requests, heads, size, size)
    call = partial(
        linear_attention, query, key, value, gate, beta, rates, biases, state,
        segments(requests, tokens), size**-0.5, kind != "lightning", out,
    )  # fmt: skip
    if config is not None:
        before = state.clone()
        partial(call, config=ChunkConfig(tokens=16, warps=4, stages=2))()
        exact = out.float()
        state.copy_(before)
        call = partial(call, config=config)
        call()
        error = float((out.float() - exact).norm() / exact.norm())
        row = timed(call, requests, tokens, state, 0)
        return row | {"other_than_tf32_percent": error * 100}
    others = num_bytes(query, key, value, gate, beta, out)
    return timed(call, requests, tokens, state, others)


def mamba2(requests: int, tokens: int) -> Row:
    """Nemotron-H 8B: 128 heads of 64, 8 groups, states of 128."""
    heads, width, groups, size, total = 128, 64, 8, 128, requests * tokens
    state = states(requests, heads, width, size)
    ones = torch.rand(heads, device="cuda")
    b, c = (torch.randn(total, groups, size, **OPTIONS) for _ in range(2))
    x, dt = torch.randn(total, heads, width, **OPTIONS), torch.randn(total, heads, **OPTIONS)
    call = partial(
        state_ops.ssd_scan, x, dt, -ones, b, c, ones, ones, (0.0, float("inf")), state,
        segments(requests, tokens),
    )  # fmt: skip
    return timed(call, requests, tokens, state, num_bytes(x, x, dt, b, c))


def mamba1(requests: int, tokens: int) -> Row:
    """Falcon-Mamba 7B: 8192 channels, states of 16."""
    channels, size, total = 8192, 16, requests * tokens
    state = states(requests, channels, size)
    x, dt, z = (torch.randn(total, channels, **OPTIONS) for _ in range(3))
    b, c = (torch.randn(total, size, **OPTIONS) for _ in range(2))
    d = torch.rand(channels, device="cuda")
    a = -torch.rand(channels, size, device="cuda")
    call = partial(
        state_ops.selective_scan, x, dt, a, b, c, d, z, None, state, segments(requests, tokens)
    )
    return timed(call, requests, tokens, state, num_bytes(x, x, dt, z, b, c, a, d))


def conv(requests: int, tokens: int) -> Row:
    """Qwen3-Next: 8192 channels, 4 taps."""
    channels = 8192
    state = states(requests, 3, channels, dtype=torch.bfloat16)
    x = torch.randn(requests * tokens, channels, **OPTIONS)
    weight = torch.randn(4, channels, device="cuda")
    call = partial(state_ops.causal_conv1d, x, weight, None, state, segments(requests, tokens))
    return timed(call, requests, tokens, state, num_bytes(x, x, weight))


def cases() -> Iterator[Case]:
    batches = {
        "64 x 4096": [4096] * 64,
        "256 x 1024": [1024] * 256,
        "1 x 32768": [32768],
        "1 x 131072": [131072],
        "131072 and 31 x 4096": [131072] + [4096] * 31,
    }
    yield "nothing", nothing
    for name, lengths in batches.items():
        size = sum(lengths) * (RANK + ROPE) * 2
        yield f"mla plain read, {name}", partial(plain_read, size)
    for heads in (16, 32, 128):
        for name, lengths in batches.items():
            yield f"mla decode, {heads} heads, {name}", partial(decode, heads, lengths)
        for config in CONFIGS[heads]:
            sizes = f"{config.rows} rows, {config.tile} tokens, {config.warps} warps, "
            sizes += f"{config.stages} stages, {config.resident} resident"
            sizes += ", by groups" * config.by_groups
            sizes += ", bulk" * (config.by_groups and config.bulk)
            name = f"mla variant, {heads} heads, 64 x 4096, {sizes}"
            yield name, partial(decode, heads, [4096] * 64, config)
    yield "mla plan, 64", partial(plan_time, 64)
    yield "mla prefill, 16 heads, 4 x 4096", partial(prefill, 16, [4096] * 4)
    yield "mla prefill, 128 heads, 1 x 4096", partial(prefill, 128, [4096])
    for kind in ("gated", "kimi", "lightning"):
        yield f"{kind} step, 64", partial(delta_rule, kind, 64, 1)
        yield f"{kind} prompt, 1 x 4096", partial(delta_rule, kind, 1, 4096)
        for chunk in CHUNKS[kind]:
            sizes = f"{chunk.tokens} tokens, {chunk.warps} warps, {chunk.stages} stages"
            sizes += ", narrow" * chunk.narrow
            run = partial(delta_rule, kind, 1, 4096, chunk)
            yield f"{kind} variant, 1 x 4096, {sizes}", run
    for name, make in (("mamba2", mamba2), ("mamba1", mamba1), ("conv", conv)):
        for requests in (64,) if name == "mamba2" else (64, 256, 1024):
            yield f"{name} step, {requests}", partial(make, requests, 1)
        yield f"{name} prompt, 1 x 4096", partial(make, 1, 4096)


def main() -> None:
    global warm_only
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--warm", action="store_true", help="compile only")
    arguments = parser.parse_args()
    warm_only = arguments.warm
    limits = {} if warm_only else ceilings()
    print(limits, flush=True)
    rows: list[Row] = []
    failed = 0
    for name, run in cases():
        if not re.search(arguments.only, name):
            continue
        try:
            row = {key: round(value, 2) for key, value in run().items()}
        except (
            triton.runtime.errors.OutOfResources,
            triton.CompilationError,
            AssertionError,
        ) as error:
            # A configuration that this GPU can't hold, or that is wrong, is a result, too.
            row, failed = {"error": str(error).splitlines()[0]}, failed + 1
        if "gb_s" in row and limits:
            limit = "read_gb_s" if name.startswith("mla") else "copy_gb_s"
            row["of_ceiling"] = round(row["gb_s"] / limits[limit], 3)
        if "tflop_s" in row and limits:
            row["of_matmul"] = round(row["tflop_s"] / limits["matmul_tflop_s"], 3)
        rows.append({"case": name} | row)
        print(json.dumps(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    if arguments.output:
        facts = {
            **gpu_identity(), "ceilings": limits, "rows": rows,
        }  # fmt: skip
        arguments.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
