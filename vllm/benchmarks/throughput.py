"""``vllm bench throughput``: how many requests and tokens a second the engine completes offline."""

from __future__ import annotations

import argparse
import sys
import time

from vllm.benchmarks.args import ThroughputArgs
from vllm.benchmarks.datasets import make_samples
from vllm.benchmarks.engine import check_lengths, make_llm, write_json
from vllm.sampling_params import SamplingParams
from vllm.utils.flags import flags_of

__all__ = ["run"]


def run(namespace: argparse.Namespace) -> int:
    """Complete all prompts in one call and print the rates.

    Raises:
        ConfigError: an option cannot work.
    """
    args = ThroughputArgs(**{name: getattr(namespace, name) for name in flags_of(ThroughputArgs)})
    llm = make_llm(namespace)
    samples = make_samples(args, llm.get_tokenizer(), namespace.seed)
    longest = max(sample.prompt_len + sample.output_len for sample in samples)
    check_lengths(llm, longest, "the longest prompt and its output")
    params = [
        SamplingParams(
            n=args.n,
            temperature=1.0,
            ignore_eos=True,
            max_tokens=sample.output_len,
            detokenize=not args.disable_detokenize,
        )
        for sample in samples
    ]
    start = time.perf_counter()
    outputs = llm.generate([sample.prompt for sample in samples], params)
    elapsed = time.perf_counter() - start
    prompt_tokens = sum(len(output.prompt_token_ids or ()) for output in outputs)
    output_tokens = sum(len(part.token_ids) for output in outputs for part in output.outputs)
    total = prompt_tokens + output_tokens
    sys.stdout.write(
        f"Throughput: {len(samples) / elapsed:.2f} requests/s, {total / elapsed:.2f} total "
        f"tokens/s, {output_tokens / elapsed:.2f} output tokens/s\n"
        f"Total num prompt tokens:  {prompt_tokens}\n"
        f"Total num output tokens:  {output_tokens}\n"
    )
    write_json(
        args.output_json,
        {
            "elapsed_time": elapsed,
            "num_requests": len(samples),
            "total_num_tokens": total,
            "requests_per_second": len(samples) / elapsed,
            "tokens_per_second": total / elapsed,
            "output_tokens_per_second": output_tokens / elapsed,
        },
    )
    return 0
