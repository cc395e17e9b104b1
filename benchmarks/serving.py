"""Output tokens per second through HTTP at several concurrencies, beside the machine's limits.

    python benchmarks/serving.py [--model smollm2] [--concurrency 1 8 32]

Prompts of 256 random tokens, 64 output tokens each. ``fraction_of_gemm`` is the arithmetic of
all tokens (prompt and output, attention left out) against the bf16 GEMM rate of the same run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))

import machine
from server import Server, serve

# SmolLM2-135M: multiply-adds of a prompt token; an output token adds the vocabulary's.
PARAMS_PER_TOKEN = 30 * (576 * 64 * 2 * (9 + 3) + 3 * 576 * 1536)
PARAMS_HEAD = 49152 * 576


def client_run(server: Server, args: argparse.Namespace, concurrency: int, prompts: int) -> dict:
    """One run of ``vllm bench serve`` with prompts that were never sent before."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("vllm")), "bench", "serve"]
        command += ["--backend", "openai", "--base-url", server.url, "--model", args.model]
        command += ["--endpoint", "/v1/completions", "--dataset-name", "random"]
        command += ["--random-input-len", str(args.input), "--random-output-len", str(args.output)]
        command += ["--random-range-ratio", "0", "--num-prompts", str(prompts)]
        command += ["--max-concurrency", str(concurrency), "--ignore-eos", "--temperature", "0"]
        command += ["--seed", str(time.time_ns() % (1 << 31)), "--disable-tqdm", "--save-result"]
        command += ["--result-dir", folder, "--result-filename", "run.json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / "run.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input", type=int, default=256)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    before = machine.describe()
    rows = []
    flags = ("--dtype", "bfloat16", "--kv-cache-memory-bytes", "2147483648")
    with serve(args.model, *flags) as server:
        client_run(server, args, 8, 16)
        for concurrency in args.concurrency:
            count = 8 if concurrency == 1 else 64
            runs = [client_run(server, args, concurrency, count) for _ in range(args.repeats)]
            rate = median(run["output_throughput"] for run in runs)
            work = 2 * ((args.input + args.output) * PARAMS_PER_TOKEN + args.output * PARAMS_HEAD)
            rows.append(
                {
                    "concurrency": concurrency,
                    "completed": sum(run["completed"] for run in runs),
                    "output_tok_s": round(rate, 1),
                    "ttft_ms": round(median(run["median_ttft_ms"] for run in runs), 1),
                    "tpot_ms": round(median(run["median_tpot_ms"] for run in runs), 1),
                    "gflop_s": round(rate / args.output * work / 1e9, 1),
                }
            )
    gemm = max(float(str(before["bf16_gemm_gflop_s"])), machine.bf16_gemm_gflop_s())
    for row in rows:
        row["fraction_of_gemm"] = round(row["gflop_s"] / gemm, 3)
    result = before | {"model": args.model, "bf16_gemm_gflop_s": round(gemm, 1), "runs": rows}
    machine.save("cpu_serving", "python benchmarks/serving.py", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
