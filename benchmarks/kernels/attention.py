"""TRITON_ATTN on a GPU, as fractions of what the same run reads, copies and multiplies.

    python benchmarks/kernels/attention.py [--only REGEX] [--output FILE] [--warm] [--processes N]

32 query heads, 8 KV heads, head size 128, bf16 unless a case says otherwise; block tables shuffled.
Decode is timed as a CUDA graph's replay, in GB/s of K and V read; prefill in TFLOP/s of the causal
half. Quantised caches hold normal numbers and are counted by their own bytes, scales included.
Kernels are compiled first, by processes beside each other; ``--warm`` does nothing else.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import operator
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import gpu_identity

from vllm.v1.attention.ops.kv_formats import FORMATS, KVFormat, kv_format
from vllm.v1.attention.ops.triton_byte_decode import decode_waves, fits_byte_decode
from vllm.v1.attention.ops.triton_decode import plan_decodes
from vllm.v1.attention.ops.triton_paged_attention import paged_attention
from vllm.v1.attention.ops.triton_split_attention import split_attention
from vllm.v1.attention.ops.turboquant import TURBOQUANT_FORMATS

Q_HEADS, KV_HEADS, D, LAYERS = 32, 8, 128, 32
# Physical shape of a pool of LAYERS layers and where one layer is found in it.
ORDERS = ("LBHNC", "LBNHC", "BLHNC", "BHLNC")
QUANTISED = tuple(name for name in (*FORMATS, *TURBOQUANT_FORMATS) if name != "fp8")
COMPARISONS = {">=": operator.ge, "<=": operator.le}
# Longest request of a launch that only compiles.
COMPILED_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row.

    Attributes:
        kind: decode, prefill, or decode by the kernels over K and V as two tensors: ``views`` of
            one packed cache, or ``apart``.
        order: physical order of the pool, or the name of a quantised format.
        asked: fields of the row, how they compare, and with what.
        against: key of an earlier row whose time is the unit of ``time_ratio``.
    """

    kind: str
    name: str
    lengths: tuple[int, ...]
    page: int
    order: str = "LBHNC"
    group: int = Q_HEADS // KV_HEADS
    head_size: int = D
    asked: tuple[tuple[str, str, float], ...] = ()
    against: str = ""

    @property
    def key(self) -> str:
        return f"{self.kind} {self.name}, {self.page}, {self.order}"


def replay_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of ``call`` as a captured graph: no launch cost in it."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return do_bench(graph.replay, return_mode="median", warmup=10, rep=60)


_pools: list[torch.Tensor] = []


def pool_of(elements: int) -> torch.Tensor:
    """Memory for a pool of many layers, kept from case to case.

    The driver clears what it is given back, in the background: a kernel timed within a second of
    34 GB being freed reads 15 % slower, whatever it reads.
    """
    if not _pools or _pools[0].numel() < elements:
        _pools[:] = [torch.empty(elements, device="cuda", dtype=torch.bfloat16)]
    return _pools[0][:elements]


def cache_view(order: str, blocks: int, page: int, layers: int, head_size: int = D) -> torch.Tensor:
    """One layer's ``(B, H, N, 2D)`` view, out of a pool of ``layers`` in block-outer orders."""
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    content = 2 * head_size
    if order == "LBHNC":
        return torch.empty(blocks, KV_HEADS, page, content, **options)
    if order == "LBNHC":
        return torch.empty(blocks, page, KV_HEADS, content, **options).transpose(1, 2)
    pool = pool_of(blocks * layers * KV_HEADS * page * content)
    if order == "BLHNC":
        return pool.view(blocks, layers, KV_HEADS, page, content)[:, layers // 2]
    return pool.view(blocks, KV_HEADS, layers, page, content)[:, :, layers // 2]


def quantised_cache(blocks: int, page: int, fmt: KVFormat) -> torch.Tensor:
    """``(B, slots, N, content)`` uint8, LBHNC, of normal numbers."""
    shape = (blocks, fmt.head_slots(KV_HEADS), page, fmt.content_bytes(D))
    cache = torch.empty(shape, device="cuda", dtype=torch.uint8)
    offsets = torch.arange(page, device="cuda")
    for start in range(0, blocks, 1024):
        part = torch.arange(start, min(start + 1024, blocks), device="cuda")
        sides = torch.randn(2, len(part) * page, KV_HEADS, D, device="cuda")
        fmt.store(cache, part.repeat_interleave(page), offsets.repeat(len(part)), *sides)
    return cache


def content_bytes(fmt: KVFormat | None, head_size: int = D) -> int:
    """K and V of one KV head and token."""
    return 4 * head_size if fmt is None else fmt.head_slots(1) * fmt.content_bytes(head_size)


def batch(
    lengths: list[int], page: int, order: str, prefill: bool, group: int = Q_HEADS // KV_HEADS,
    head_size: int = D, layers: int = LAYERS,
) -> dict:  # fmt: skip
    """Inputs of one launch with random content; ``order`` may name a quantised format instead."""
    pages = [-(-n // page) for n in lengths]
    blocks = sum(pages) + 1
    pool_bytes = blocks * KV_HEADS * page * 2 * head_size * 2
    layers = min(layers, max(2, int(40e9 // pool_bytes)))
    fmt = kv_format(order)
    if fmt is not None:
        cache = quantised_cache(blocks, page, fmt)
    else:
        cache = cache_view(order, blocks, page, layers, head_size)
        for start in range(0, blocks, 4096):
            cache[start : start + 4096].normal_()
    shuffled = torch.randperm(blocks - 1, device="cuda", dtype=torch.int32) + 1
    table = torch.zeros(len(lengths), max(pages), dtype=torch.int32, device="cuda")
    at = 0
    for request, count in enumerate(pages):
        table[request, :count] = shuffled[at : at + count]
        at += count
    query_lens = lengths if prefill else [1] * len(lengths)
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    starts[1:] = torch.tensor(query_lens).cumsum(0)
    shape = (int(starts[-1]), KV_HEADS * group, head_size)
    q = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    return {
        "q": q, "kv_cache": cache, "out": torch.empty_like(q),
        "query_start_loc": starts.cuda(),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        "block_table": table, "max_query_len": max(query_lens), "max_seq_len": max(lengths),
        "scale": head_size**-0.5, "has_decodes": not prefill, "fmt": fmt,
    }  # fmt: skip


def ceilings() -> dict[str, float]:
    data = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(data)
    copy = do_bench(lambda: target.copy_(data), return_mode="median")
    read = do_bench(lambda: data.view(torch.float32).sum(), return_mode="median")
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = do_bench(lambda: square @ square, return_mode="median")
    return {
        "copy_gb_s": round(2 * data.numel() / copy / 1e6, 1),
        "read_gb_s": round(data.numel() / read / 1e6, 1),
        "matmul_tflop_s": round(2 * 8192**3 / product / 1e9, 1),
    }


@functools.cache
def plain_read_gb_s(size: int) -> float:
    """A sum over as many bytes as a decode reads: what a small read reaches here."""
    data = torch.empty(size, dtype=torch.uint8, device="cuda").view(torch.float32)
    return size / replay_ms(lambda: data.sum()) / 1e6


def launch(case: Case) -> tuple[Callable[[], None], dict]:
    """The call to time and its inputs."""
    inputs = batch(
        list(case.lengths), case.page, case.order, case.kind == "prefill", case.group,
        case.head_size,
    )  # fmt: skip
    if case.kind == "prefill":
        return functools.partial(paged_attention, **inputs), inputs
    # One plan serves all layers of a step.
    fits = fits_byte_decode(inputs["fmt"], case.head_size, case.page, case.group)
    inputs["plan"] = plan_decodes(
        inputs["seq_lens"], inputs["query_start_loc"], KV_HEADS, inputs["max_seq_len"],
        waves=decode_waves(fits, case.head_size),
    )  # fmt: skip
    if case.kind == "decode":
        return functools.partial(paged_attention, **inputs), inputs
    packed, options = inputs["kv_cache"], dict(inputs)
    del options["kv_cache"], options["fmt"]
    options["key_cache"], options["value_cache"] = packed.split(case.head_size, dim=-1)
    if case.kind == "apart":
        for side in ("key_cache", "value_cache"):
            options[side] = options[side].contiguous()
    return functools.partial(split_attention, **options), inputs


def measure(case: Case, read_gb_s: float) -> dict[str, Any]:
    call, inputs = launch(case)
    row: dict[str, Any] = {
        "case": f"{case.kind} {case.name}", "page": case.page, "order": case.order
    }  # fmt: skip
    if case.kind == "prefill":
        ms = do_bench(call, return_mode="median", warmup=10, rep=60)
        work = sum(2.0 * n * n for n in case.lengths) * KV_HEADS * case.group * case.head_size
        return row | {"us": round(ms * 1e3, 1), "tflop_s": round(work / ms / 1e9, 1)}
    ms = replay_ms(call)
    size = sum(case.lengths) * KV_HEADS * content_bytes(inputs["fmt"], case.head_size)
    rate, plain = size / ms / 1e6, plain_read_gb_s(size)
    return row | {
        "us": round(ms * 1e3, 1), "gb_s": round(rate, 1), "of_read": round(rate / read_gb_s, 3),
        "plain_read_gb_s": round(plain, 1), "of_plain_read": round(rate / plain, 3),
    }  # fmt: skip


def decode_cases() -> list[Case]:
    """Decodes over plain caches."""
    cases = []
    rate = ("of_read", ">=", 0.92)
    for name, lengths in (("64 x 4096", (4096,) * 64), ("256 x 1024", (1024,) * 256)):
        for page in (16, 32, 64, 128):
            for order in ORDERS:
                case = Case(kind="decode", name=name, lengths=lengths, page=page, order=order)
                asked: tuple[tuple[str, str, float], ...] = (rate,)
                against = ""
                if order in ("BLHNC", "BHLNC"):
                    asked += (("time_ratio", "<=", 1.01),)
                    against = replace(case, order="LBHNC").key
                cases.append(replace(case, asked=asked, against=against))
    for length in (32768, 131072):
        for page in (16, 64):
            asked = (("of_plain_read", ">=", 0.8),)
            cases.append(
                Case(kind="decode", name=f"1 x {length}", lengths=(length,), page=page, asked=asked)
            )
    even = Case(kind="decode", name="63 x 4096", lengths=(4096,) * 63, page=16)
    long = Case(
        kind="decode", name="131072 among 31 x 4096", lengths=(4096,) * 31 + (131072,), page=16,
        asked=(("time_ratio", "<=", 1.15),), against=even.key,
    )  # fmt: skip
    cases += [even, long]
    most = ("of_read", ">=", 0.85)
    shape = Case(kind="decode", name="", lengths=(4096,) * 64, page=16, asked=(most,))
    for size in (64, 96, 256):
        cases.append(replace(shape, name=f"64 x 4096, head size {size}", head_size=size))
    for group in (1, 3, 7, 16):
        cases.append(replace(shape, name=f"64 x 4096, {group} queries a head", group=group))
    apart = replace(shape, kind="apart", name="64 x 4096", asked=())
    cases.append(apart)
    same = (("time_ratio", "<=", 1.01),)
    return [*cases, replace(apart, kind="views", asked=same, against=apart.key)]


def quantised_cases() -> list[Case]:
    """Decodes over quantised caches, beside a plain one's."""
    plain = Case(kind="decode", name="64 x 8192", lengths=(8192,) * 64, page=64)
    cases = [plain]
    limits = {"int4_per_token_head": 0.6, "nvfp4": 0.6, "turboquant_4bit_nc": 0.7}
    for name in QUANTISED:
        asked: tuple[tuple[str, str, float], ...] = ()
        if name in limits:
            asked = (("time_ratio", "<=", limits[name]),)
        elif name not in TURBOQUANT_FORMATS:
            asked = (("of_read", ">=", 0.85),)
        cases.append(replace(plain, order=name, asked=asked, against=plain.key))
    return cases


def prefill_cases() -> list[Case]:
    cases = []
    for page, least in ((16, 330), (32, 330), (64, 400), (128, 400)):
        asked = (("tflop_s", ">=", float(least)),)
        four = Case(
            kind="prefill", name="4 x 4096", lengths=(4096,) * 4, page=page, asked=asked
        )  # fmt: skip
        cases.append(four)
        if page in (16, 64):
            cases += [replace(four, order=order) for order in ORDERS[1:]]
            cases.append(replace(four, name="1 x 32768", lengths=(32768,)))
    plain = Case(kind="prefill", name="4 x 4096", lengths=(4096,) * 4, page=64)
    return [*cases, *(replace(plain, order=name, against=plain.key) for name in QUANTISED)]


def compile_case(case: Case) -> float:
    """Seconds that a launch of its kernel takes here, on as little as gives the same kernel."""
    start = time.perf_counter()
    longest = min(max(case.lengths), COMPILED_TOKENS)
    launch(replace(case, lengths=(longest,)))[0]()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def compile_all(cases: list[Case], processes: int) -> None:
    """Compile each kernel once, the slowest first."""
    kernels: dict[tuple, Case] = {}
    for case in cases:
        order = case.order if kv_format(case.order) else "LBHNC"
        small = replace(case, order=order, name="", asked=(), against="")
        # What a kernel is specialised for: requests are many or one, tables of 16 pages or fewer.
        wide = -(-max(case.lengths) // case.page) % 16 == 0
        alike = (small.kind, small.page, small.order, small.group, small.head_size, wide)
        kernels.setdefault(alike, small)
    slow_first = sorted(kernels.values(), key=lambda case: case.kind != "prefill")
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        seconds = pool.map(compile_case, slow_first, chunksize=1)
    print(
        f"{len(seconds)} kernels compiled in {time.perf_counter() - start:.0f} s, "
        f"the slowest in {max(seconds):.0f} s",
        flush=True,
    )


def judged(case: Case, row: dict[str, Any], times: dict[str, float]) -> dict[str, Any]:
    """The row with what is asked of it."""
    if case.against in times:
        row["time_ratio"] = round(row["us"] / times[case.against], 3)
    checks = [(field, sign, bound) for field, sign, bound in case.asked if field in row]
    if checks:
        row["asked"] = ", ".join(f"{field} {sign} {bound}" for field, sign, bound in checks)
        row["met"] = all(COMPARISONS[sign](row[field], bound) for field, sign, bound in checks)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name, page and order match")
    parser.add_argument("--output", type=Path, help="write the result as JSON here")
    parser.add_argument("--warm", action="store_true", help="compile the kernels and stop")
    parser.add_argument("--processes", type=int, default=12, help="that compile; 0: none before")
    args = parser.parse_args()
    start = time.perf_counter()
    cases = [*decode_cases(), *quantised_cases(), *prefill_cases()]
    cases = [case for case in cases if re.search(args.only, case.key)]
    if args.processes:
        compile_all(cases, args.processes)
    if args.warm:
        return
    result: dict = {
        **gpu_identity(),
        "ceilings": ceilings(),
        "rows": [],
    }
    print(json.dumps(result["ceilings"]), flush=True)
    if any(case.order in ("BLHNC", "BHLNC") for case in cases):
        pool_of(18 * 10**9)
    times: dict[str, float] = {}
    for case in cases:
        row = judged(case, measure(case, result["ceilings"]["read_gb_s"]), times)
        times[case.key] = row["us"]
        result["rows"].append(row)
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        if args.output:
            result["seconds"] = round(time.perf_counter() - start, 1)
            args.output.write_text(json.dumps(result, indent=1) + "\n")
    short = [row for row in result["rows"] if not row.get("met", True)]
    print(f"{len(short)} of {len(result['rows'])} rows fall short:")
    for row in short:
        print("  ".join(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
