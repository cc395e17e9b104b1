"""Decode speed of one request through ``LLM``, as a fraction of the streaming-read rate.

    python benchmarks/decode.py [--model smollm2] [--dtype bfloat16]

The rate is counted on the weight bytes that one token reads; the cache's are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))

import machine

from vllm import LLM, SamplingParams


def weight_bytes(llm: LLM) -> int:
    """Bytes of the parameters that a decode step reads: all, a tied embedding once."""
    config = llm.llm_engine.vllm_config.model_config
    c = config.hf_text_config
    head = config.get_head_size()
    attention = c.hidden_size * head * 2 * (c.num_attention_heads + config.get_total_num_kv_heads())
    per_layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    count = c.num_hidden_layers * per_layer + c.vocab_size * c.hidden_size + c.hidden_size
    return count * {"float32": 4}.get(config.dtype_name, 2)


def seconds(llm: LLM, prompt: list[int], tokens: int) -> float:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--output", type=int, default=200, help="tokens timed")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    result = machine.describe()
    llm = LLM(
        args.model, dtype=args.dtype, max_model_len=1024, kv_cache_memory_bytes=1 << 28,
        enable_prefix_caching=False,
    )  # fmt: skip
    prompt = [1000 + i for i in range(args.prompt)]
    seconds(llm, prompt, 8)
    bytes_per_token = weight_bytes(llm)
    rounds = []
    for _ in range(args.rounds):
        # The machine's rate changes with its neighbours: each round has its own, taken twice.
        stream = machine.stream_read_gb_s(repeats=2)
        short = seconds(llm, prompt, 8)
        per_token = (seconds(llm, prompt, args.output + 8) - short) / args.output
        stream = (stream + machine.stream_read_gb_s(repeats=2)) / 2
        rate = bytes_per_token / per_token / 1e9
        rounds.append(
            {
                "ms_per_token": round(per_token * 1e3, 3),
                "weight_gb_s": round(rate, 2),
                "stream_read_gb_s": round(stream, 2),
                "fraction_of_stream": round(rate / stream, 3),
            }
        )
    llm.shutdown()
    result |= {
        "model": args.model,
        "dtype": args.dtype,
        "weight_mb": round(bytes_per_token / 1e6, 1),
        "median_ms_per_token": median(r["ms_per_token"] for r in rounds),
        "median_fraction_of_stream": median(r["fraction_of_stream"] for r in rounds),
        "rounds": rounds,
    }
    machine.save("cpu_decode", "python benchmarks/decode.py", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
