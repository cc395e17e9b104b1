"""Tile sizes of TRITON_ATTN tried side by side: prompts, and decodes by the cache's format.

    python benchmarks/gpu/attention_tiles.py

Kernels are compiled beforehand by processes beside each other.
"""

from __future__ import annotations

import multiprocessing
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from attention import KV_HEADS, Q_HEADS, D, batch, replay_ms

from vllm.v1.attention.ops.triton_decode import plan_decodes
from vllm.v1.attention.ops.triton_paged_attention import (
    KernelConfig,
    default_config,
    paged_attention,
)

PAGE = 64
# Rows, tile, warps, stages, by the tensor-copy engine.
PREFILLS = [
    (128, 64, 4, 2, True), (128, 64, 4, 3, True), (128, 64, 8, 2, True), (256, 64, 8, 2, True),
    (64, 64, 4, 2, True), (128, 128, 8, 2, False), (256, 64, 8, 3, False),
]  # fmt: skip
# Tile, warps, stages.
DECODES = [(64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 4, 2), (32, 4, 3), (64, 2, 3)]
FORMATS = ("LBHNC", "fp8_e4m3", "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head")
Job = tuple[str, tuple]


def config_of(job: Job) -> KernelConfig:
    kind, sizes = job
    plain = default_config(PAGE, D, torch.bfloat16, copies=True)
    if kind == "prefill":
        names = ("prefill_rows", "prefill_tile", "prefill_warps", "prefill_stages", "tma")
    else:
        names = ("decode_tile", "decode_warps", "decode_stages")
    return replace(plain, **dict(zip(names, sizes, strict=True)))


def compile_job(job: Job) -> None:
    is_prefill = job[0] == "prefill"
    inputs = batch([256], PAGE, "LBHNC" if is_prefill else job[0], is_prefill)
    paged_attention(**inputs, config=config_of(job))
    torch.cuda.synchronize()


def measure_prefills(length: int, jobs: list[Job]) -> None:
    inputs = batch([length] * 4, PAGE, "LBHNC", prefill=True)
    work = 4 * 2.0 * length**2 * Q_HEADS * D
    for job in jobs:
        call = partial(paged_attention, **inputs, config=config_of(job))
        ms = do_bench(call, return_mode="median", warmup=5, rep=25)
        print(f"prefill 4 x {length}", job[1], f"{work / ms / 1e9:.0f} TFLOP/s", flush=True)


def measure_decodes(name: str, jobs: list[Job]) -> None:
    inputs = batch([8192] * 64, PAGE, name, prefill=False)
    fmt = inputs["fmt"]
    inputs["plan"] = plan_decodes(inputs["seq_lens"], inputs["query_start_loc"], KV_HEADS, 8192)
    size = 64 * 8192 * KV_HEADS * 2 * (fmt.side_bytes(D) if fmt else 2 * D)
    for job in jobs:
        ms = replay_ms(partial(paged_attention, **inputs, config=config_of(job)))
        rate = size / ms / 1e6
        print(f"decode 64 x 8192 {name}", job[1], f"{ms * 1e3:.0f} us {rate:.0f} GB/s", flush=True)


def main() -> None:
    prefills: list[Job] = [("prefill", sizes) for sizes in PREFILLS]
    decodes: list[Job] = [(name, sizes) for name in FORMATS for sizes in DECODES]
    with multiprocessing.get_context("spawn").Pool(12) as pool:
        pool.map(compile_job, prefills + decodes, chunksize=2)
    for length in (2048, 4096):
        measure_prefills(length, prefills)
    for name in FORMATS:
        measure_decodes(name, [job for job in decodes if job[0] == name])
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
