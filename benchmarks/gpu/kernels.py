"""Candidates for the kernels of a decode step, side by side: products of few rows, attention.

    python benchmarks/gpu/kernels.py [linear] [attention] [--output FILE]

Everything is timed as the replay of a CUDA graph over inputs that together exceed the cache
several times. Kernels are compiled beforehand by processes beside each other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vllm import _cuda_ops
from vllm._cuda_ops import SkinnyConfig
from vllm.v1.attention.ops import triton_decode

ROTATED_BYTES = 400 << 20

# model, what, outputs, inputs, SiLU * mul
PRODUCTS = [
    ("qwen3-0.6b", "qkv", 4096, 1024, False),
    ("qwen3-0.6b", "o", 1024, 2048, False),
    ("qwen3-0.6b", "gate_up", 6144, 1024, True),
    ("qwen3-0.6b", "down", 1024, 3072, False),
    ("qwen3-0.6b", "head", 151936, 1024, False),
    ("llama-3.1-8b", "qkv", 6144, 4096, False),
    ("llama-3.1-8b", "o", 4096, 4096, False),
    ("llama-3.1-8b", "gate_up", 28672, 4096, True),
    ("llama-3.1-8b", "down", 4096, 14336, False),
    ("llama-3.1-8b", "head", 128256, 4096, False),
]
ROWS = (1, 8, 32, 64, 128, 256)
ONE_ROW = [
    SkinnyConfig(block_n=n, block_k=k, splits=0, warps=w)
    for n, k, w in (
        (1, 1024, 4), (2, 1024, 4), (4, 512, 4), (4, 1024, 4), (8, 512, 4), (16, 256, 4),
        (2, 2048, 4), (4, 2048, 8),
    )
]  # fmt: skip
FEW_ROWS = [
    SkinnyConfig(block_n=n, block_k=k, splits=s, warps=w, stages=g)
    for n, k, w, g in ((64, 128, 4, 4), (64, 256, 4, 3), (128, 64, 4, 5), (32, 256, 4, 4),
                       (16, 256, 4, 5))
    for s in (1, 2, 4, 8)
    if n >= 64 or s < 4
]  # fmt: skip
MANY_ROWS = [
    SkinnyConfig(block_n=n, block_k=k, splits=s, warps=w, stages=g)
    for n, k, w, g in ((128, 64, 8, 4), (128, 64, 4, 4), (64, 64, 4, 4), (64, 128, 4, 3))
    for s in (1, 2, 4)
]
DECODES = [
    (tile, warps, stages)
    for tile, warps, stages in (
        (64, 4, 2), (64, 4, 3), (32, 2, 3), (32, 4, 3), (32, 1, 3),
    )
]  # fmt: skip


def replay_us(calls: list[Callable[[], Any]], repeats: int = 5) -> float:
    """Median microseconds of one of ``calls``, captured one after the other."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[repeats // 2]


def fits(config: SkinnyConfig, rows: int, n: int, k: int, silu: bool) -> bool:
    if config.splits == 0:
        return rows == 1 and (not silu or config.block_n < 16)
    outputs = n // 2 if silu else n
    tiles = outputs // config.block_n
    if tiles * config.splits > 132 * 16 and config.splits > 1:
        return False
    # Stages of both weights and of x in 227 KiB.
    stage = config.block_k * 2 * (config.block_n * (2 if silu else 1) + max(16, rows))
    return stage * config.stages < 220 << 10 and k // config.splits >= config.block_k


def linear_case(rows: int, n: int, k: int, silu: bool) -> Iterator[tuple[str, float]]:
    copies = max(2, min(64, ROTATED_BYTES // (n * k * 2)))
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) / 30 for _ in range(copies)]
    xs = [torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    exact = xs[0].float() @ weights[0].float().T
    if silu:
        exact = torch.nn.functional.silu(exact[:, : n // 2]) * exact[:, n // 2 :]

    def cublas(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, w)
        return _cuda_ops.silu_and_mul(y) if silu else y

    pairs = list(zip(xs, weights, strict=True))
    yield "cublas", replay_us([lambda x=x, w=w: cublas(x, w) for x, w in pairs])
    chosen = _cuda_ops._choose(rows, n, k, 2, silu, xs[0].device)
    for config in candidates(rows):
        if not fits(config, rows, n, k, silu):
            continue
        got = _cuda_ops.skinny_product(*pairs[0], None, silu, config).float()
        error = float((got - exact).norm() / exact.norm())
        us = replay_us(
            [
                lambda x=x, w=w, c=config: _cuda_ops.skinny_product(x, w, None, silu, c)
                for x, w in pairs
            ]
        )
        name = f"{config.block_n}x{config.block_k}/{config.splits} w{config.warps} s{config.stages}"
        name += " chosen" if config == chosen else ""
        yield name + ("" if error < 1e-2 else f" WRONG {error:.1e}"), us


def candidates(rows: int) -> list[SkinnyConfig]:
    if rows > 64:
        return MANY_ROWS
    return (ONE_ROW if rows == 1 else []) + FEW_ROWS


def linear(rows_of_result: list[dict], all_rows: tuple[int, ...]) -> None:
    for model, what, n, k, silu in PRODUCTS:
        for rows in all_rows:
            found = sorted(linear_case(rows, n, k, silu), key=lambda pair: pair[1])
            read_us = n * k * 2 / 3.0e6
            cublas = dict(found)["cublas"]
            row = {
                "case": f"{model} {what}", "rows": rows, "read_us": round(read_us, 2),
                "cublas_us": round(cublas, 2),
                "chosen": [round(us, 2) for name, us in found if "chosen" in name],
                "best": [(name, round(us, 2)) for name, us in found[:4]],
            }  # fmt: skip
            rows_of_result.append(row)
            print(json.dumps(row), flush=True)
            torch.cuda.empty_cache()


def compile_linear(job: tuple[SkinnyConfig, int, bool]) -> None:
    config, rows, silu = job
    x = torch.zeros(rows, 4096, device="cuda", dtype=torch.bfloat16)
    w = torch.zeros(4096, 4096, device="cuda", dtype=torch.bfloat16)
    _cuda_ops.skinny_product(x, w, None, silu, config)
    torch.cuda.synchronize()


def linear_jobs(all_rows: tuple[int, ...]) -> list[tuple[SkinnyConfig, int, bool]]:
    jobs = {
        (config, 1 if config.splits == 0 else max(16, rows), silu)
        for rows in all_rows
        for config in candidates(rows)
        for silu in (False, True)
    }
    return [(c, rows, silu) for c, rows, silu in jobs if fits(c, rows, 4096, 4096, silu)]


# Attention


def decode_inputs(lengths: list[int], heads: int, page: int, copies: int) -> list[dict]:
    pages = [-(-n // page) for n in lengths]
    blocks = sum(pages) + 1
    cases = []
    for _ in range(copies):
        cache = torch.empty(blocks, 8, page, 256, device="cuda", dtype=torch.bfloat16).normal_()
        shuffled = torch.randperm(blocks - 1, device="cuda", dtype=torch.int32) + 1
        table = torch.zeros(len(lengths), 64 * 64 // page, dtype=torch.int32, device="cuda")
        at = 0
        for request, count in enumerate(pages):
            table[request, :count] = shuffled[at : at + count]
            at += count
        q = torch.randn(len(lengths), heads, 128, device="cuda", dtype=torch.bfloat16)
        cases.append({"q": q, "kv_cache": cache, "out": torch.empty_like(q), "block_table": table})
    return cases


def attention_cases() -> list[tuple[str, list[int]]]:
    ragged = torch.randint(200, 1900, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        ("1 x 200", [200]), ("1 x 4000", [4000]), ("32 x 200", [200] * 32),
        ("32 ragged", ragged[:32]), ("128 ragged", ragged[:128]), ("256 x 200", [200] * 256),
        ("256 ragged", ragged),
    ]  # fmt: skip


def attention(rows_of_result: list[dict], all_rows: tuple[int, ...]) -> None:
    for heads in (16, 32):
        for name, lengths in attention_cases():
            for page in (64, 16):
                size = sum(lengths) * 8 * 512
                cases = decode_inputs(lengths, heads, page, max(2, min(28, (600 << 20) // size)))
                lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
                starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device="cuda")
                found = []
                for waves, chunk in ((8, 256), (16, 256), (8, 512), (8, 128), (16, 128)):
                    triton_decode._WAVES, triton_decode._MIN_CHUNK = waves, chunk
                    plan = triton_decode.plan_decodes(lens, starts, 8, 4096)
                    for tile, warps, stages in (
                        DECODES if waves == 8 and chunk == 256 else DECODES[:1]
                    ):
                        us = replay_us(
                            [
                                lambda c=c, p=plan, t=tile, w=warps, s=stages: (
                                    triton_decode.decode_attention(
                                        **c, plan=p, scale=0.09, tile=t, num_warps=w, num_stages=s
                                    )
                                )
                                for c in cases
                            ]
                        )
                        label = f"tile {tile} w{warps} s{stages} waves {waves} chunk {chunk}"
                        found.append((label, round(us, 2)))
                first = found[0]
                found.sort(key=lambda pair: pair[1])
                row = {
                    "case": name, "heads": heads, "page": page,
                    "read_us": round(size / 3.0e6, 2), "first": first, "best": found[:4],
                    "worst": found[-1],
                }  # fmt: skip
                rows_of_result.append(row)
                print(json.dumps(row), flush=True)
                torch.cuda.empty_cache()
    triton_decode._WAVES, triton_decode._MIN_CHUNK = 8, 256


def compile_attention(job: tuple[int, int, int, int, int]) -> None:
    heads, page, tile, warps, stages = job
    (case,) = decode_inputs([70], heads, page, 1)
    lens = torch.tensor([70], dtype=torch.int32, device="cuda")
    starts = torch.arange(2, dtype=torch.int32, device="cuda")
    plan = triton_decode.plan_decodes(lens, starts, 8, 4096)
    triton_decode.decode_attention(
        **case, plan=plan, scale=0.09, tile=tile, num_warps=warps, num_stages=stages
    )
    torch.cuda.synchronize()


def attention_jobs(all_rows: tuple[int, ...]) -> list[tuple[int, int, int, int, int]]:
    return [(h, page, *config) for h in (16, 32) for page in (64, 16) for config in DECODES]


SECTIONS = {
    "linear": (linear, compile_linear, linear_jobs),
    "attention": (attention, compile_attention, attention_jobs),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help="default: all")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="of the products")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    parser.add_argument("--output", type=Path, help="write the result as JSON here")
    args = parser.parse_args()
    rows = tuple(map(int, args.rows.split(",")))
    result: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        waiting = [
            pool.map_async(SECTIONS[name][1], SECTIONS[name][2](rows), chunksize=1)
            for name in args.sections
        ]
        for jobs in waiting:
            jobs.get()
    print("compiled", flush=True)
    for name in args.sections:
        result[name] = []
        SECTIONS[name][0](result[name], rows)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
