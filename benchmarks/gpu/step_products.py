"""Products of few rows, cut in other ways, timed where they run: inside decode steps.

    python benchmarks/gpu/step_products.py [--share 2] [--rows 32] [--output FILE]

What a product costs depends on its neighbours, since kernels of a decode overlap. So one product
after the other is cut in each way that fits, in a whole engine of the Llama-3.1-8B shape, and what
made the step shortest is kept; twice, since later choices change what earlier ones cost. With
``--share 2`` the engine has the shapes that each of two tensor parallel workers has, and no sums.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from kernels import compile_linear, fits
from shapes import SHAPES

from vllm import LLM, SamplingParams, _cuda_ops
from vllm._cuda_ops import SkinnyConfig
from vllm.v1.worker.gpu.cuda_graphs import capturing

SHARED = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")


def candidates(rows: int, silu: bool) -> list[SkinnyConfig]:
    if rows == 1:
        return [
            SkinnyConfig(block_n=n, block_k=k, splits=0, warps=w)
            for n, k, w in ((1, 1024, 4), (2, 1024, 4), (4, 512, 4), (4, 2048, 8), (8, 512, 4))
        ]
    tiles = ((64, 128, 4), (64, 128, 3), (64, 64, 6), (32, 128, 6), (32, 256, 3))
    if not silu:
        tiles = ((64, 128, 4), (64, 256, 3), (128, 64, 5), (32, 128, 6), (32, 256, 4))
    return [
        SkinnyConfig(block_n=n, block_k=k, splits=s, warps=4, stages=g)
        for n, k, g in tiles
        for s in ((1, 2) if silu else (1, 2, 4))
    ]


def _fills(config: SkinnyConfig, n: int, silu: bool) -> bool:
    """There are programs for a third of the multiprocessors, and not many times as many."""
    tiles = n // (2 if silu else 1) // config.block_n
    return 40 <= tiles * config.splits <= 2100


class Engine:
    """Decodes ``rows`` requests over and over with the products as ``chosen`` says."""

    def __init__(self, shape: dict[str, Any], rows: int) -> None:
        self.rows = rows
        self.vocabulary = shape["vocab_size"]
        self.chosen: dict[tuple[int, int, bool], SkinnyConfig | None] = {}
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(shape))
            self._llm = LLM(
                model=folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=1024,
                enable_prefix_caching=False, max_num_seqs=rows, kv_cache_memory_bytes=8 << 30,
            )  # fmt: skip
        self._runner = self._llm.llm_engine.client._core.executor.worker.model_runner
        original = _cuda_ops._choose

        def choose(m: int, n: int, k: int, itemsize: int, silu: bool, device: torch.device):
            if m != rows:
                return original(m, n, k, itemsize, silu, device)
            key = (n, k, silu)
            if key not in self.chosen:
                self.chosen[key] = original(m, n, k, itemsize, silu, device)
            return self.chosen[key]

        _cuda_ops._choose = choose
        self.step_us()

    @torch.inference_mode()
    def step_us(self, steps: int = 48) -> float:
        """The shorter of two runs' time of a step, at a context of about 200."""
        with capturing() as pool:
            self._runner._graphs.capture([self.rows], self._runner._decode_of, pool)
        engine, rng, runs = self._llm.llm_engine, random.Random(0), []
        params = SamplingParams(
            temperature=0.6, ignore_eos=True, max_tokens=2 * steps + 24, detokenize=False
        )
        for i in range(self.rows):
            ids = [rng.randrange(10, self.vocabulary) for _ in range(128)]
            engine.add_request(f"{time.monotonic_ns()}-{i}", {"prompt_token_ids": ids}, params)
        for _ in range(12):
            engine.step()
        for _ in range(2):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(steps):
                engine.step()
            torch.cuda.synchronize()
            runs.append((time.perf_counter() - begin) / steps * 1e6)
        while engine.has_unfinished_requests():
            engine.step()
        return round(min(runs), 1)


def tune(engine: Engine, found: list[dict[str, Any]]) -> None:
    def timed(what: str, key: Any, config: SkinnyConfig | None) -> float:
        us = engine.step_us()
        found.append({"turn": what, "product": key, "config": str(config), "us": us})
        print(json.dumps(found[-1]), flush=True)
        return us

    rows = engine.rows
    timed("as chosen", None, None)
    products = list(engine.chosen)
    for turn in range(2):
        for key in sorted(products, key=lambda key: -key[0] * key[1]):
            n, k, silu = key
            tried: dict[SkinnyConfig | None, float] = {}
            first = engine.chosen[key]
            options = [first, None] if rows > 1 else [first]
            options += [
                config
                for config in candidates(rows, silu)
                if fits(config, rows, n, k, silu) and (rows == 1 or _fills(config, n, silu))
            ]
            for config in options:
                if config not in tried:
                    engine.chosen[key] = config
                    tried[config] = timed(f"turn {turn}", key, config)
            engine.chosen[key] = min(tried, key=lambda config: tried[config])
    timed("best", None, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="llama-3.1-8b", choices=list(SHAPES))
    parser.add_argument("--share", type=int, default=1, help="as one of so many workers")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    shape = SHAPES[args.config]
    shape = shape | {name: shape[name] // args.share for name in SHARED}
    jobs = [
        (config, args.rows, silu)
        for silu in (False, True)
        for config in candidates(args.rows, silu)
        if fits(config, args.rows, 4096, 4096, silu)
    ]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        pool.map(compile_linear, jobs, chunksize=1)
    found: list[dict[str, Any]] = []
    engine = Engine(shape, args.rows)
    tune(engine, found)
    if args.output:
        chosen = [
            {"n": n, "k": k, "silu_mul": silu, "config": config and asdict(config)}
            for (n, k, silu), config in engine.chosen.items()
        ]
        result = {
            "device": torch.cuda.get_device_name(), "command": " ".join(sys.argv),
            "chosen": chosen, "steps": found,
        }  # fmt: skip
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
