"""Tile sizes of TRITON_ATTN tried side by side: prompts and decodes, by the cache's format.

    python benchmarks/gpu/attention_tiles.py [--kinds KIND ...] [--formats NAME ...] [--output FILE]

Page 64; 4 prompts of 4,096 tokens, 64 decodes of 8,192. Kernels are compiled beforehand by
processes beside each other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from attention import KV_HEADS, Q_HEADS, D, batch, ceilings, content_bytes, replay_ms
from machine import gpu_identity

from vllm.v1.attention.ops.triton_decode import plan_decodes
from vllm.v1.attention.ops.triton_paged_attention import default_config, paged_attention

PAGE = 64
FORMATS = ("LBHNC", "fp8_e4m3", "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head")
# Rows, tile, warps, stages; through the tensor-copy engine.
COPIED = ((128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 2), (256, 64, 8, 2), (64, 64, 4, 2))
# The same by pointers: all that quantised caches know.
POINTED = ((256, 64, 8, 3), (256, 64, 8, 2), (128, 64, 8, 2), (128, 64, 4, 2), (128, 64, 8, 3))
# Tile, warps, stages.
DECODES = ((64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 4, 2), (32, 4, 3), (64, 2, 3))


@dataclass(frozen=True, kw_only=True)
class Job:
    kind: str
    cache: str
    sizes: tuple[int, ...]
    tma: bool = False


def jobs_of(kinds: list[str], formats: list[str]) -> list[Job]:
    jobs = []
    for cache in formats:
        if "prefill" in kinds:
            if cache == "LBHNC":
                jobs += [Job(kind="prefill", cache=cache, sizes=x, tma=True) for x in COPIED]
            jobs += [Job(kind="prefill", cache=cache, sizes=x) for x in POINTED]
        if "decode" in kinds:
            jobs += [Job(kind="decode", cache=cache, sizes=x) for x in DECODES]
    return jobs


def call_of(job: Job, inputs: dict[str, Any]) -> partial[None]:
    config = default_config(PAGE, D, torch.bfloat16, copies=True, fmt=inputs["fmt"])
    if job.kind == "prefill":
        rows, tile, warps, stages = job.sizes
        config = replace(
            config, prefill_rows=rows, prefill_tile=tile, prefill_warps=warps,
            prefill_stages=stages, tma=job.tma,
        )  # fmt: skip
    else:
        tile, warps, stages = job.sizes
        config = replace(
            config, decode_tile=tile, decode_warps=warps, decode_stages=stages, byte_decode=False
        )  # fmt: skip
    return partial(paged_attention, **inputs, config=config)


def compile_job(job: Job) -> None:
    call_of(job, batch([4096], PAGE, job.cache, job.kind == "prefill"))()
    torch.cuda.synchronize()


def measure(jobs: list[Job]) -> list[dict[str, Any]]:
    """Jobs over one cache."""
    is_prefill, cache = jobs[0].kind == "prefill", jobs[0].cache
    lengths = [4096] * 4 if is_prefill else [8192] * 64
    inputs = batch(lengths, PAGE, cache, is_prefill)
    if not is_prefill:
        inputs["plan"] = plan_decodes(inputs["seq_lens"], inputs["query_start_loc"], KV_HEADS, 8192)
    work = sum(2.0 * n * n for n in lengths) * Q_HEADS * D
    size = sum(lengths) * KV_HEADS * content_bytes(inputs["fmt"])
    rows = []
    for job in jobs:
        call = call_of(job, inputs)
        row: dict[str, Any] = {"kind": job.kind, "cache": cache, "sizes": job.sizes, "tma": job.tma}
        if is_prefill:
            ms = do_bench(call, return_mode="median", warmup=5, rep=25)
            row["tflop_s"] = round(work / ms / 1e9, 1)
        else:
            ms = replay_ms(call)
            row["gb_s"] = round(size / ms / 1e6, 1)
        rows.append(row | {"us": round(ms * 1e3, 1)})
        print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="*", default=["prefill", "decode"])
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--output", type=Path, help="write the result as JSON here")
    args = parser.parse_args()
    jobs = jobs_of(args.kinds, args.formats)
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.map(compile_job, jobs, chunksize=1)
    result: dict[str, Any] = {
        **gpu_identity(),
        "ceilings": ceilings(),
        "rows": [],
    }
    for kind, cache in dict.fromkeys((job.kind, job.cache) for job in jobs):
        result["rows"] += measure([j for j in jobs if (j.kind, j.cache) == (kind, cache)])
        torch.cuda.empty_cache()
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
