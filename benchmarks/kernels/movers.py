"""Byte movers on a GPU, as fractions of what the same run copies and fills.

    python benchmarks/kernels/movers.py [--output FILE]

Blocks of a 32-layer pool (8 KV heads, head size 128, bf16), ids shuffled. Rates count bytes read
and bytes written; clearing counts those written, beside a fill.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import gpu_identity

from vllm.v1.kv_cache.triton_movers import move_box, zero_box

LAYERS, HEADS, CONTENT = 32, 8, 512
POOL_BYTES = 8 << 30


def seconds(call: Callable[[], object]) -> float:
    """Median time, the upload of the ids included; work before it hides what the host prepares."""
    call()
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20_000_000)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def rows(page: int, pool: torch.Tensor, other: torch.Tensor) -> list[dict]:
    """One page size; a block is all layers of ``page`` tokens."""
    slot = page * CONTENT
    layer = HEADS * slot
    block = LAYERS * layer
    blocks = pool.numel() // block
    ids = random.Random(0).sample(range(blocks), blocks // 2)
    sources, targets = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    moved = len(targets) * block
    dense = [(src * block, i * block) for i, src in enumerate(sources)]
    # In layer-compact order a block is one page of each layer.
    compact = {
        "counts": (LAYERS,), "source_strides": (layer * blocks,),
        "target_strides": (layer * blocks,), "length": layer,
    }  # fmt: skip
    turned = {
        "counts": (LAYERS, HEADS, page), "length": CONTENT,
        "source_strides": (layer, slot, CONTENT),
        "target_strides": (layer, CONTENT, HEADS * CONTENT),
    }  # fmt: skip
    half = {
        "counts": (LAYERS, HEADS // 2), "length": slot,
        "source_strides": (layer, slot), "target_strides": (layer // 2, slot),
    }  # fmt: skip
    pairs = list(zip(sources, targets, strict=True))
    cases: list[tuple[str, Callable[[], None], int]] = [
        ("copy blocks, blocks outermost", lambda: move_box(
            pool, pool, [(s * block, t * block) for s, t in pairs], length=block), 2 * moved),
        ("copy blocks, layers outermost", lambda: move_box(
            pool, pool, [(s * layer, t * layer) for s, t in pairs], **compact), 2 * moved),
        ("gather to dense", lambda: move_box(pool, other, dense, length=block), 2 * moved),
        ("scatter from dense", lambda: move_box(
            other, pool, [(t, s) for s, t in dense], length=block), 2 * moved),
        ("heads outside to tokens outside", lambda: move_box(
            pool, other, dense, **turned), 2 * moved),
        ("half of the heads", lambda: move_box(
            pool, other, [(s, t // 2) for s, t in dense], **half), moved),
        ("clear blocks, layers outermost", lambda: zero_box(
            pool, [t * layer for t in targets], counts=(LAYERS,), strides=(layer * blocks,),
            length=layer), moved),
    ]  # fmt: skip
    found = []
    for name, call, size in cases:
        rate = size / seconds(call) / 1e9
        found.append({"case": name, "page": page, "run_bytes": layer, "gb_s": round(rate, 1)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the result as JSON here")
    args = parser.parse_args()
    pool = torch.randint(-128, 128, (POOL_BYTES,), dtype=torch.int8, device="cuda")
    other = torch.empty_like(pool)
    whole = POOL_BYTES // 4
    result: dict = {
        **gpu_identity(),
        "copy_gb_s": 2 * whole / seconds(lambda: other[:whole].copy_(pool[:whole])) / 1e9,
        "fill_gb_s": whole / seconds(lambda: other[:whole].fill_(1)) / 1e9,
        "rows": [],
    }
    for page in (16, 64):
        result["rows"] += rows(page, pool, other)
    for row in result["rows"]:
        ceiling = result["fill_gb_s" if row["case"].startswith("clear") else "copy_gb_s"]
        row["fraction"] = round(row["gb_s"] / ceiling, 3)
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    print({key: round(result[key], 1) for key in ("copy_gb_s", "fill_gb_s")})
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
