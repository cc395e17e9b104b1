"""How long a prompt takes until its first token, on an engine that has nothing else to do.

    python benchmarks/gpu/first_token.py [--config llama-3.1-8b] [--output FILE]

Milliseconds of ``generate`` for one token, by tokens of the prompt: with steps captured as graphs,
and with the same engine's steps launched kernel by kernel. Dummy weights, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from shapes import SHAPES

from vllm import LLM, SamplingParams

LENGTHS = (8, 50, 128, 200, 350, 500, 700, 1000, 1400, 2000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="llama-3.1-8b", choices=list(SHAPES))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPES[args.config]))
        llm = LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=4096,
            enable_prefix_caching=False, kv_cache_memory_bytes=8 << 30,
        )  # fmt: skip
    preparer = llm.llm_engine.client._core.executor.worker.model_runner._preparer
    rng, sizes = random.Random(0), preparer.prompt_graph_sizes
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)

    def milliseconds(length: int) -> float:
        times = []
        for _ in range(12):
            prompt = {"prompt_token_ids": [rng.randrange(10, 100000) for _ in range(length)]}
            begin = time.perf_counter()
            llm.generate(prompt, params, use_tqdm=False)
            times.append((time.perf_counter() - begin) * 1e3)
        return round(statistics.median(times[2:]), 2)

    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "config": args.config, "graph_sizes": sizes,
        "by_prompt_tokens": {},
    }  # fmt: skip
    for length in LENGTHS:
        row = result["by_prompt_tokens"][length] = {}
        for name, given in (("captured", sizes), ("launched", [])):
            preparer.prompt_graph_sizes = given
            row[name] = milliseconds(length)
        print(length, row, flush=True)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
