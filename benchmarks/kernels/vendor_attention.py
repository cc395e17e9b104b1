"""TRITON_ATTN, FLASH_ATTN and FLASHINFER in one run, beside what the GPU reads.

    python benchmarks/kernels/vendor_attention.py [--only REGEX] [--warm] [--output FILE]

32 query heads, 8 KV heads, head size 128, bf16, layout LBHNC, block tables shuffled. Decode is
timed as a CUDA graph's replay, in GB/s of K and V read; prefill with its launches, in TFLOP/s of
the causal half. "flash-attn-4" decodes by the library itself, where FLASH_ATTN has our kernels do
it. --warm compiles what the run needs, in processes side by side, and times nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from attention import KV_HEADS, Q_HEADS, D, batch, ceilings, plain_read_gb_s, replay_ms
from machine import gpu_identity

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

BACKENDS = ("TRITON_ATTN", "FLASH_ATTN", "FLASHINFER")
LIBRARY = "flash-attn-4"
PAGES = (16, 64, 128)
DECODES = {"64 x 4096": [4096] * 64, "1 x 32768": [32768]}
PREFILLS = {"4 x 4096": [4096] * 4, "1 x 32768": [32768]}


def cases() -> Iterator[tuple[str, str, int, str, list[int]]]:
    """Kind, name, page, backend, lengths."""
    for kind, name, lengths in (
        *(("decode", *item) for item in DECODES.items()),
        *(("prefill", *item) for item in PREFILLS.items()),
    ):
        for page in PAGES:
            for backend in (*BACKENDS, *([LIBRARY] if kind == "decode" else [])):
                yield kind, name, page, backend, lengths


def backend_class(backend: str) -> Any:
    return AttentionBackendEnum["FLASH_ATTN" if backend == LIBRARY else backend].get_class()


def reasons_against(backend: str) -> list[str]:
    """Why a backend takes no part in the run."""
    return backend_class(backend).validate_configuration(head_size=D, dtype=torch.bfloat16)


def prepare(backend: str, page: int, lengths: list[int], prefill: bool) -> tuple[Any, Any, dict]:
    """The impl, the step's metadata and the inputs."""
    cls = backend_class(backend)
    inputs = batch(lengths, page, "LBHNC", prefill)
    impl = cls.get_impl_cls()(Q_HEADS, D, D**-0.5, KV_HEADS)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=max(lengths), enforce_eager=False),
        scheduler_config=SimpleNamespace(max_num_seqs=len(lengths)),
    )
    spec = FullAttentionSpec(block_size=page, num_kv_heads=KV_HEADS, head_size=D, dtype="bfloat16")
    builder = cls.get_builder_cls()(spec, ["layer"], config, torch.device("cuda"))
    starts, lens = inputs["query_start_loc"], inputs["seq_lens"]
    common = CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts.cpu(), seq_lens=lens,
        seq_lens_cpu=lens.cpu(), num_computed_tokens_cpu=(lens - starts.diff()).cpu(),
        num_reqs=len(lengths), num_actual_tokens=len(inputs["q"]),
        max_query_len=inputs["max_query_len"], max_seq_len=max(lengths),
        block_table_tensor=inputs["block_table"],
        slot_mapping=torch.full((len(inputs["q"]),), -1, device="cuda"),
    )  # fmt: skip
    return impl, builder.build(0, common), inputs


def measure(kind: str, name: str, page: int, backend: str, lengths: list[int]) -> dict:
    impl, step, inputs = prepare(backend, page, lengths, kind == "prefill")
    query, cache, out = inputs["q"], inputs["kv_cache"], inputs["out"]

    def call() -> None:
        if backend == LIBRARY:
            impl._by_library(query, cache, step, out)
        else:
            impl.forward(None, query, None, None, cache, step, out)

    row: dict[str, Any] = {"case": f"{kind} {name}", "page": page, "backend": backend}
    if kind == "decode":
        ms = replay_ms(call)
        size = sum(lengths) * KV_HEADS * 4 * D
        return row | {"us": round(ms * 1e3, 1), "gb_s": round(size / ms / 1e6, 1)}
    ms = do_bench(call, return_mode="median", warmup=10, rep=60)
    work = sum(2.0 * n * n for n in lengths) * Q_HEADS * D
    return row | {"us": round(ms * 1e3, 1), "tflop_s": round(work / ms / 1e9, 1)}


def warm(case: tuple[str, str, int, str, list[int]]) -> None:
    """Launch a case's kernels once, on little."""
    kind, _, page, backend, lengths = case
    short = [min(n, 1024) for n in lengths]
    impl, step, inputs = prepare(backend, page, short, kind == "prefill")
    arguments = inputs["q"], inputs["kv_cache"], step, inputs["out"]
    if backend == LIBRARY:
        impl._by_library(*arguments)
    else:
        query, cache, _, out = arguments
        impl.forward(None, query, None, None, cache, step, out)
    torch.cuda.synchronize()
    print(f"warm: {kind} {page} {backend}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases (decode 64 x 4096 page 16 ...) to run")
    parser.add_argument("--warm", action="store_true", help="compile only")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    declined = {name: reasons_against(name) for name in (*BACKENDS, LIBRARY)}
    for name, reasons in declined.items():
        if reasons:
            print(f"without {name}: {'; '.join(reasons)}", flush=True)
    wanted = [
        case
        for case in cases()
        if not declined[case[3]]
        and re.search(args.only, f"{case[0]} {case[1]} page {case[2]} {case[3]}")
    ]
    if args.warm:
        with multiprocessing.get_context("spawn").Pool(8) as pool:
            pool.map(warm, wanted, chunksize=1)
        return
    report: dict[str, Any] = {
        **gpu_identity("flash-attn-4", "flashinfer-python"),
        "ceilings": ceilings(),
        "plain_read_gb_s": {
            name: round(plain_read_gb_s(sum(lengths) * KV_HEADS * 4 * D), 1)
            for name, lengths in DECODES.items()
        },
        "rows": [],
    }  # fmt: skip
    print(json.dumps({key: report[key] for key in ("ceilings", "plain_read_gb_s")}), flush=True)
    for case in wanted:
        row = measure(*case)
        report["rows"].append(row)
        figure = f"{row['gb_s']:8.1f} GB/s" if "gb_s" in row else f"{row['tflop_s']:8.1f} TFLOP/s"
        print(f"{row['case']:20} page {row['page']:4} {row['backend']:14} {figure}", flush=True)
        torch.cuda.empty_cache()
        if args.output:
            # A run that ends early leaves what it has measured.
            args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
