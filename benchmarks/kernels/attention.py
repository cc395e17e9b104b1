"""TRITON_ATTN on a GPU, as fractions of what the same run reads, copies and multiplies.

    python benchmarks/kernels/attention.py [--only REGEX] [--output FILE]

32 query heads, 8 KV heads, head size 128, bf16; block tables shuffled. Decode is timed as a CUDA
graph's replay, in GB/s of K and V read; prefill in TFLOP/s of the causal half. Quantised caches
hold normal numbers and are counted by their own bytes, scales included.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vllm.v1.attention.ops.kv_formats import FORMATS, KVFormat, kv_format
from vllm.v1.attention.ops.triton_byte_decode import decode_waves, fits_byte_decode
from vllm.v1.attention.ops.triton_decode import plan_decodes
from vllm.v1.attention.ops.triton_paged_attention import paged_attention
from vllm.v1.attention.ops.turboquant import TURBOQUANT_FORMATS

Q_HEADS, KV_HEADS, D, LAYERS = 32, 8, 128, 32
# Physical shape of a pool of LAYERS layers and where one layer is found in it.
ORDERS = ("LBHNC", "LBNHC", "BLHNC", "BHLNC")


def replay_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of ``call`` as a captured graph: no launch cost in it."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return do_bench(graph.replay, return_mode="median", warmup=10, rep=60)


def cache_view(order: str, blocks: int, page: int, layers: int) -> torch.Tensor:
    """One layer's ``(B, H, N, 2D)`` view, out of a pool of ``layers`` in block-outer orders."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    if order == "LBHNC":
        return torch.empty(blocks, KV_HEADS, page, 2 * D, **options)
    if order == "LBNHC":
        return torch.empty(blocks, page, KV_HEADS, 2 * D, **options).transpose(1, 2)
    if order == "BLHNC":
        return torch.empty(blocks, layers, KV_HEADS, page, 2 * D, **options)[:, layers // 2]
    return torch.empty(blocks, KV_HEADS, layers, page, 2 * D, **options)[:, :, layers // 2]


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


def content_bytes(fmt: KVFormat | None) -> int:
    """K and V of one KV head and token."""
    return 4 * D if fmt is None else fmt.head_slots(1) * fmt.content_bytes(D)


def batch(lengths: list[int], page: int, order: str, prefill: bool) -> dict:
    """Inputs of one launch with random content; ``order`` may name a quantised format instead."""
    pages = [-(-n // page) for n in lengths]
    blocks = sum(pages) + 1
    pool_bytes = blocks * KV_HEADS * page * 2 * D * 2
    layers = min(LAYERS, max(2, int(40e9 // pool_bytes)))
    fmt = kv_format(order)
    if fmt is not None:
        cache = quantised_cache(blocks, page, fmt)
    else:
        cache = cache_view(order, blocks, page, layers)
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
    q = torch.randn(int(starts[-1]), Q_HEADS, D, device="cuda", dtype=torch.bfloat16)
    return {
        "q": q, "kv_cache": cache, "out": torch.empty_like(q),
        "query_start_loc": starts.cuda(),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        "block_table": table, "max_query_len": max(query_lens), "max_seq_len": max(lengths),
        "scale": D**-0.5, "has_decodes": not prefill, "fmt": fmt,
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


def plain_read_gb_s(size: int) -> float:
    """A sum over as many bytes as a decode reads: what a small read reaches here."""
    data = torch.empty(size, dtype=torch.uint8, device="cuda").view(torch.float32)
    return size / replay_ms(lambda: data.sum()) / 1e6


def decode_row(name: str, lengths: list[int], page: int, order: str) -> dict:
    inputs = batch(lengths, page, order, prefill=False)
    # One plan serves all layers of a step.
    inputs["plan"] = plan_decodes(
        inputs["seq_lens"], inputs["query_start_loc"], KV_HEADS, inputs["max_seq_len"],
        waves=decode_waves(fits_byte_decode(inputs["fmt"], D, page, Q_HEADS // KV_HEADS), D),
    )  # fmt: skip
    ms = replay_ms(lambda: paged_attention(**inputs))
    fmt = inputs["fmt"]
    size = sum(lengths) * KV_HEADS * content_bytes(fmt)
    row = {"case": f"decode {name}", "page": page, "order": order, "us": round(ms * 1e3, 1)}
    row |= {"gb_s": round(size / ms / 1e6, 1), "plain_read_gb_s": round(plain_read_gb_s(size), 1)}
    return row


def prefill_row(name: str, lengths: list[int], page: int, order: str) -> dict:
    inputs = batch(lengths, page, order, prefill=True)
    ms = do_bench(lambda: paged_attention(**inputs), return_mode="median", warmup=10, rep=60)
    work = sum(2.0 * n * n for n in lengths) * Q_HEADS * D
    row = {"case": f"prefill {name}", "page": page, "order": order, "us": round(ms * 1e3, 1)}
    return row | {"tflop_s": round(work / ms / 1e9, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name, page and order match")
    parser.add_argument("--output", type=Path, help="write the result as JSON here")
    args = parser.parse_args()
    result: dict = {
        "command": "python benchmarks/kernels/attention.py",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(),
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
        "ceilings": ceilings(),
        "rows": [],
    }
    print(json.dumps(result["ceilings"]), flush=True)
    cases = [("64 x 4096", [4096] * 64, page, order) for page in (16, 64) for order in ORDERS]
    cases += [("64 x 4096", [4096] * 64, page, "LBHNC") for page in (32, 128)]
    cases += [("256 x 1024", [1024] * 256, page, "LBHNC") for page in (16, 64, 128)]
    cases += [("1 x 32768", [32768], 16, "LBHNC"), ("1 x 131072", [131072], 16, "LBHNC")]
    cases += [("131072 among 31 x 4096", [4096] * 31 + [131072], 16, "LBHNC")]
    cases += [("63 x 4096", [4096] * 63, 16, "LBHNC")]
    prefills = [("4 x 4096", [4096] * 4, page, "LBHNC") for page in (16, 32, 64, 128)]
    prefills += [("4 x 4096", [4096] * 4, 64, order) for order in ORDERS[1:]]
    prefills += [("1 x 32768", [32768], page, "LBHNC") for page in (16, 64)]
    prefills += [("4 x 2048", [2048] * 4, 64, "LBHNC")]
    formats = [name for name in (*FORMATS, *TURBOQUANT_FORMATS) if name != "fp8"]
    cases += [("64 x 8192", [8192] * 64, 64, name) for name in ("LBHNC", *formats)]
    prefills += [("4 x 4096", [4096] * 4, 64, name) for name in formats]
    for measure, rows in ((decode_row, cases), (prefill_row, prefills)):
        for case in rows:
            if not re.search(args.only, f"{measure.__name__} {case[0]} {case[2]} {case[3]}"):
                continue
            row = measure(*case)
            result["rows"].append(row)
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            torch.cuda.empty_cache()
            if args.output:
                args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
