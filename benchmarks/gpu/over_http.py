"""What HTTP adds to a step on a GPU: clients' time per token beside the offline engine's.

    python benchmarks/gpu/over_http.py [--api-servers 1 8] [--output FILE]

An 8B Llama with dummy weights and a vocabulary of 128,256 tokens that have text. At each
concurrency as many requests start together; what counts are the tokens between the last request's
first one and the first request's last one, when all of them decode. Offline the same prompts and
outputs run through ``LLM``'s engine, without text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from shapes import SHAPES

ROOT = Path(__file__).resolve().parents[2]
CONFIG = SHAPES["llama-3.1-8b"] | {"bos_token_id": 0, "eos_token_id": 1}
VOCAB = CONFIG["vocab_size"]
FLAGS = ("--load-format", "dummy", "--max-model-len", "4096", "--no-enable-prefix-caching")
INPUT, OUTPUT = 128, 320


def make_model(folder: Path) -> None:
    """The configuration, and a byte-level tokenizer whose other tokens are made-up words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    (folder / "config.json").write_text(json.dumps(CONFIG))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = (f"Ġw{number}" for number in range(VOCAB))
    vocab = {"<s>": 0, "</s>": 1}
    for token in (*letters, *words):
        if len(vocab) < VOCAB:
            vocab[token] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" ?[^ ]+| +"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    )


def offline(model: str, concurrencies: list[int]) -> dict[str, float]:
    """Milliseconds of a step while all requests decode, by number of requests."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model, load_format="dummy", max_model_len=4096, skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )  # fmt: skip
    engine = llm.llm_engine
    found = {}
    for turn, concurrency in enumerate([concurrencies[-1], *concurrencies]):
        params = SamplingParams(
            temperature=0.6, ignore_eos=True, max_tokens=OUTPUT, detokenize=False
        )
        for i in range(concurrency):
            ids = [2 + (i * 7919 + j * 104729) % (VOCAB - 2) for j in range(INPUT)]
            engine.add_request(f"{turn}-{i}", {"prompt_token_ids": ids}, params)
        begun: set[str] = set()
        first = last = 0.0
        steps = 0
        while engine.has_unfinished_requests():
            outputs = engine.step()
            if last:
                continue
            if any(output.finished for output in outputs):
                last = time.perf_counter()
            elif first:
                steps += 1
            begun.update(output.request_id for output in outputs)
            if not first and len(begun) == concurrency:
                first = time.perf_counter()
        found[str(concurrency)] = round(1e3 * (last - first) / (steps + 1), 3)
    llm.shutdown()
    return found


def online(url: str, model: str, concurrency: int, processes: int) -> dict[str, Any]:
    """A run of ``vllm bench serve``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
        command += ["--base-url", url, "--model", model, "--random-input-len", str(INPUT)]
        command += ["--random-output-len", str(OUTPUT), "--num-prompts", str(concurrency)]
        command += ["--max-concurrency", str(concurrency), "--client-processes", str(processes)]
        command += ["--ignore-eos", "--temperature", "0.6", "--disable-tqdm", "--save-result"]
        command += ["--save-detailed", "--result-dir", folder, "--result-filename", "run.json"]
        command += ["--seed", str(time.time_ns() % (1 << 31))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        run = json.loads((Path(folder) / "run.json").read_text())
    assert run["completed"] == concurrency, run["errors"]
    # Each piece of a stream by when it came, as far as all requests were decoding.
    arrivals = []
    for start, ttft, gaps in zip(run["start_times"], run["ttfts"], run["itls"], strict=True):
        times = [start + ttft]
        for gap in gaps:
            times.append(times[-1] + gap)
        arrivals.append(times)
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    steps = []
    for times in arrivals:
        inside = [at for at in times if begin <= at <= end]
        # Several tokens in one piece count as that many.
        tokens = (len(inside) - 1) * (OUTPUT - 1) / (len(times) - 1)
        steps.append((inside[-1] - inside[0]) / tokens)
    return {
        "step_ms": round(1e3 * statistics.fmean(steps), 3),
        "median_tpot_ms": round(run["median_tpot_ms"], 3),
        "median_ttft_ms": round(run["median_ttft_ms"], 1),
        "output_tok_s": round(run["output_throughput"], 1),
        "pieces_per_token": round(
            statistics.fmean((len(times) - 1) / (OUTPUT - 1) for times in arrivals), 3
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--api-servers", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--client-processes", type=int, default=8)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--offline", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.offline:
        print("OFFLINE", json.dumps(offline(args.offline, args.concurrency)), flush=True)
        return

    from machine import gpu_identity
    from server import serve

    result: dict[str, Any] = {
        **gpu_identity(),
        "input_tokens": INPUT,
        "output_tokens": OUTPUT,
        "client_processes": args.client_processes,
    }

    def keep() -> None:
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        numbers = [str(number) for number in args.concurrency]
        text = subprocess.run(
            [sys.executable, __file__, "--offline", folder, "--concurrency", *numbers],
            check=True, stdout=subprocess.PIPE, text=True,
        ).stdout  # fmt: skip
        (line,) = [line for line in text.splitlines() if line.startswith("OFFLINE ")]
        steps = result["offline_step_ms"] = json.loads(line.removeprefix("OFFLINE "))
        print("offline", steps, flush=True)
        keep()
        for count in args.api_servers:
            with serve(folder, *FLAGS, "--api-server-count", str(count)) as server:
                online(server.url, folder, min(16, args.concurrency[-1]), args.client_processes)
                for concurrency in args.concurrency:
                    row = online(server.url, folder, concurrency, args.client_processes)
                    before = steps[str(concurrency)]
                    row["added_percent"] = round(100 * (row["step_ms"] / before - 1), 1)
                    result.setdefault(f"api_servers_{count}", {})[str(concurrency)] = row
                    print(count, "API servers, concurrency", concurrency, row, flush=True)
                    keep()


if __name__ == "__main__":
    main()
