"""Decodes over quantised caches: the byte kernel's tiles, registers and plans tried side by side.

    python benchmarks/gpu/byte_decode_tiles.py [--output FILE] [--formats NAME ...]

64 requests of 8,192 tokens, 32 query and 8 KV heads, head size 128, page 64, bf16 queries. Kernels
are compiled beforehand by processes beside each other. "general" is the kernel for any cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from attention import KV_HEADS, D, batch, ceilings, content_bytes, replay_ms
from machine import gpu_identity

from vllm.v1.attention.ops.triton_decode import plan_decodes
from vllm.v1.attention.ops.triton_paged_attention import default_config, paged_attention

PAGE = 64
FORMATS = ("fp8_e4m3", "int8_per_token_head", "int4_per_token_head", "nvfp4", "turboquant_4bit_nc")
# Tokens of a tile, registers of a thread, the next tile fetched ahead; None: the general kernel.
Variant = tuple[int, int, bool] | None
VARIANTS: tuple[Variant, ...] = (
    (16, 168, True), (16, 255, True), (32, 168, False), (32, 168, True), (32, 208, True),
    (32, 255, False), (32, 255, True), None,
)  # fmt: skip
WAVES = (4, 8, 12, 16)
Job = tuple[str, Variant]


def run(inputs: dict[str, Any], variant: Variant) -> partial[None]:
    config = default_config(PAGE, D, torch.bfloat16, copies=True, fmt=inputs["fmt"])
    if variant is None:
        config = replace(config, byte_decode=False)
    else:
        tile, registers, prefetch = variant
        config = replace(
            config, byte_tile=tile, byte_registers=registers, byte_prefetch=prefetch
        )  # fmt: skip
    return partial(paged_attention, **inputs, config=config)


def compile_job(job: Job) -> None:
    run(batch([8192], PAGE, job[0], False), job[1])()
    torch.cuda.synchronize()


def measure(name: str, all_waves: Sequence[int]) -> list[dict[str, Any]]:
    inputs = batch([8192] * 64, PAGE, name, prefill=False)
    size = 64 * 8192 * KV_HEADS * content_bytes(inputs["fmt"])
    rows = []
    for variant in VARIANTS if inputs["fmt"] else (None,):
        for waves in all_waves if variant else (8,):
            inputs["plan"] = plan_decodes(
                inputs["seq_lens"], inputs["query_start_loc"], KV_HEADS, 8192, waves=waves
            )
            ms = replay_ms(run(inputs, variant))
            tile, registers, prefetch = variant or (None, None, None)
            rows.append(
                {"format": name, "kernel": "bytes" if variant else "general", "tile": tile,
                 "registers": registers, "prefetch": prefetch, "waves": waves,
                 "us": round(ms * 1e3, 1),
                 "gb_s": round(size / ms / 1e6, 1)}
            )  # fmt: skip
            print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--waves", type=int, nargs="*", default=WAVES)
    parser.add_argument("--output", type=Path, help="write the result as JSON here")
    args = parser.parse_args()
    jobs: list[Job] = [(name, variant) for name in args.formats for variant in VARIANTS]
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.map(compile_job, jobs, chunksize=1)
    print("compiled", flush=True)
    result: dict[str, Any] = {
        **gpu_identity(),
        "ceilings": ceilings(),
        "rows": [],
    }
    print(result["ceilings"], flush=True)
    for name in ("LBHNC", *args.formats):
        result["rows"] += measure(name, args.waves)
        torch.cuda.empty_cache()
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
