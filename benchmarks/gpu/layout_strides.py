"""What the distance between a layer's pages costs: decodes and bare reads over the same addresses.

    python benchmarks/gpu/layout_strides.py [--output FILE]

64 requests of 4,096 tokens, 32 query and 8 KV heads, head size 128, bf16. In block-outermost pools
a page's neighbours belong to other layers; the number of layers sets how far apart pages are.
``read`` adds up the same pages, in the same order and stretches, with as many programs.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from attention import KV_HEADS, D, batch, ceilings, content_bytes, pool_of, replay_ms
from machine import gpu_identity

from vllm.v1.attention.ops.triton_decode import open_item, plan_decodes
from vllm.v1.attention.ops.triton_paged_attention import default_config, paged_attention

LENGTHS = [4096] * 64
SIZE = sum(LENGTHS) * KV_HEADS * content_bytes(None)
# Order, page, layers of the pool, layer that is read, KiB between blocks.
PLACES = (
    ("LBHNC", 16, 2, 0, 0), ("LBHNC", 64, 2, 0, 0), ("LBHNC", 64, 2, 0, 0),
    ("BLHNC", 16, 32, 16, 0), ("BLHNC", 64, 32, 16, 0),
    ("BHLNC", 16, 32, 16, 0), ("BHLNC", 16, 32, 16, 8), ("BHLNC", 16, 32, 16, 64),
    ("BHLNC", 16, 31, 15, 0), ("BHLNC", 16, 33, 16, 0), ("BHLNC", 16, 32, 0, 0),
    ("BHLNC", 16, 32, 5, 0), ("BHLNC", 16, 28, 14, 0), ("BHLNC", 16, 8, 4, 0),
    ("BHLNC", 16, 2, 1, 0), ("BHLNC", 64, 32, 16, 0), ("BHLNC", 64, 32, 16, 32),
    ("BHLNC", 64, 31, 15, 0), ("BHLNC", 64, 33, 16, 0),
)  # fmt: skip
# Tile, warps, stages, programs a multiprocessor aimed at.
VARIANTS = (
    (64, 4, 2, 4), (64, 4, 2, 16), (64, 4, 3, 8), (32, 4, 3, 8), (32, 2, 3, 8), (64, 8, 2, 8),
    (64, 8, 3, 8),
)  # fmt: skip


@triton.jit
def _read_kernel(
    kv_ptr, out_ptr, block_table_ptr, items_ptr, count_ptr, stride_b, stride_h, stride_n, stride_bt,
    PAGE: tl.constexpr, CONTENT: tl.constexpr,
):  # fmt: skip
    """The pages of an item of one KV head, added up."""
    head = tl.program_id(0)
    index = tl.program_id(1)
    if index >= tl.load(count_ptr):
        return
    request, start, end, _, _, _, _ = open_item(items_ptr, index)
    token = tl.arange(0, PAGE)[:, None] * stride_n
    at = kv_ptr + head.to(tl.int64) * stride_h + token + tl.arange(0, CONTENT)[None, :]
    total = tl.zeros([PAGE, CONTENT], tl.float32)
    for begin in tl.range(start, end, PAGE, num_stages=4):
        block = tl.load(block_table_ptr + request * stride_bt + begin // PAGE).to(tl.int64)
        total += tl.load(at + block * stride_b).to(tl.float32)
    tl.store(out_ptr + index * tl.num_programs(0) + head, tl.sum(total))


def inputs_of(order: str, page: int, layers: int, layer: int, gap: int) -> dict[str, Any]:
    """As ``batch``; with BHLNC any layer of the pool, or ``gap`` KiB behind each block."""
    inputs = batch(LENGTHS, page, order, False, layers=layers)
    cache = inputs["kv_cache"]
    if order == "LBHNC" or (layer == layers // 2 and not gap):
        return inputs
    stride_b, stride_h, *inner = cache.stride()
    blocks = cache.shape[0]
    del inputs["kv_cache"], cache
    stride_b += gap * 512
    pool = pool_of(blocks * stride_b)
    offset = layer * stride_h // (layers if order == "BHLNC" else 1)
    shape = (blocks, KV_HEADS, page, 2 * D)
    inputs["kv_cache"] = pool.as_strided(shape, (stride_b, stride_h, *inner), offset)
    for start in range(0, blocks, 4096):
        inputs["kv_cache"][start : start + 4096].normal_()
    return inputs


def planned(inputs: dict[str, Any], waves: int) -> dict[str, Any]:
    plan = plan_decodes(
        inputs["seq_lens"], inputs["query_start_loc"], KV_HEADS, max(LENGTHS), waves=waves
    )
    return inputs | {"plan": plan}


def tried(inputs: dict[str, Any], variant: tuple[int, ...]) -> functools.partial[None]:
    tile, warps, stages, waves = variant
    config = replace(
        default_config(inputs["kv_cache"].shape[2], D, torch.bfloat16, copies=True),
        decode_tile=tile, decode_warps=warps, decode_stages=stages,
    )  # fmt: skip
    return functools.partial(paged_attention, **planned(inputs, waves), config=config)


def compile_job(job: tuple[int, tuple[int, ...]]) -> None:
    page, variant = job
    tried(batch(LENGTHS[:1], page, "LBHNC", False), variant)()
    torch.cuda.synchronize()


def read(inputs: dict[str, Any], out: torch.Tensor) -> None:
    cache, plan = inputs["kv_cache"], inputs["plan"]
    table = inputs["block_table"]
    _read_kernel[(KV_HEADS, plan.num_items)](
        cache, out, table, plan.items, plan.count, *cache.stride()[:3], table.stride(0),
        PAGE=cache.shape[2], CONTENT=cache.shape[3], num_warps=4,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the result as JSON here")
    args = parser.parse_args()
    jobs = [(page, variant) for page in (16, 64) for variant in VARIANTS]
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.map(compile_job, jobs, chunksize=1)
    result: dict[str, Any] = {
        **gpu_identity(),
        "ceilings": ceilings(),
        "rows": [],
    }
    print(result["ceilings"], flush=True)
    pool_of(19 * 10**9)

    def note(row: dict[str, Any], ms: float) -> None:
        result["rows"].append(row | {"us": round(ms * 1e3, 1), "gb_s": round(SIZE / ms / 1e6)})
        print("  ".join(f"{key}={value}" for key, value in result["rows"][-1].items()), flush=True)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")

    for place in PLACES:
        order, page, layers, layer, gap = place
        plain = inputs_of(*place)
        inputs = planned(plain, 8)
        where = {"order": order, "page": page, "layers": layers, "layer": layer, "gap": gap}
        sums = torch.empty(inputs["plan"].num_items * KV_HEADS, device="cuda")
        note(where | {"kernel": "read"}, replay_ms(functools.partial(read, inputs, sums)))
        note(where | {"kernel": "decode"}, replay_ms(functools.partial(paged_attention, **inputs)))
        if (order, layers, layer, gap) == ("BHLNC", 32, 16, 0):
            for variant in VARIANTS:
                chosen = dict(zip(("tile", "warps", "stages", "waves"), variant, strict=True))
                note(where | {"kernel": "decode"} | chosen, replay_ms(tried(plain, variant)))


if __name__ == "__main__":
    main()
