"""``vllm bench latency``: seconds that one batch takes, from prompts to last tokens."""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
from tqdm import tqdm

from vllm.benchmarks.args import LatencyArgs
from vllm.benchmarks.engine import check_lengths, make_llm, write_json
from vllm.inputs import TokensPrompt
from vllm.sampling_params import SamplingParams
from vllm.utils.flags import flags_of

__all__ = ["run"]

_PERCENTILES = (10, 25, 50, 75, 90, 99)


def run(namespace: argparse.Namespace) -> int:
    """Time batches of random prompts and print their average and percentiles.

    Raises:
        ConfigError: an option cannot work.
    """
    args = LatencyArgs(**{name: getattr(namespace, name) for name in flags_of(LatencyArgs)})
    llm = make_llm(namespace)
    check_lengths(llm, args.input_len + args.output_len, "--input-len and --output-len")
    generator = np.random.default_rng(namespace.seed)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    params = SamplingParams(
        n=args.n,
        temperature=1.0,
        ignore_eos=True,
        max_tokens=args.output_len,
        detokenize=not args.disable_detokenize,
    )

    def one_batch() -> float:
        # New prompts each time: none may be found in the prefix cache.
        ids = generator.integers(0, vocabulary, (args.batch_size, args.input_len))
        prompts = [TokensPrompt(prompt_token_ids=row) for row in ids.tolist()]
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    for _ in tqdm(range(args.num_iters_warmup), desc="Warm-up iterations"):
        one_batch()
    latencies = [one_batch() for _ in tqdm(range(args.num_iters), desc="Timed iterations")]
    percentiles = {str(p): float(np.percentile(latencies, p)) for p in _PERCENTILES}
    sys.stdout.write(f"Avg latency: {np.mean(latencies)} seconds\n")
    for name, value in percentiles.items():
        sys.stdout.write(f"{name}% percentile latency: {value} seconds\n")
    write_json(
        args.output_json,
        {
            "avg_latency": float(np.mean(latencies)),
            "latencies": latencies,
            "percentiles": percentiles,
        },
    )
    return 0
