"""``vllm bench serve``: measures a running OpenAI-compatible server as its clients see it.

Sends the prompts of a dataset at a rate and a concurrency, times every token, prints a table and
writes vLLM's result file. Knows no engine: any such server will do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.benchmarks.args import ServeArgs
from vllm.benchmarks.client import Connections, Outcome
from vllm.benchmarks.datasets import Sample, make_samples
from vllm.benchmarks.load import Load, Target, due_times, pairs, send_all
from vllm.benchmarks.metrics import (
    parse_goodput,
    parse_metrics,
    parse_percentiles,
    report,
    summarize,
)
from vllm.errors import VLLMError
from vllm.utils.flags import flags_of

__all__ = ["run"]


def _load_tokenizer(args: ServeArgs, model: str) -> Any:
    from vllm.transformers_utils.model_path import resolve_model_path
    from vllm.transformers_utils.tokenizer import get_tokenizer

    name = args.tokenizer or args.model or model
    path = resolve_model_path(name, weights=False, option="--tokenizer")
    return get_tokenizer(
        str(path), mode=args.tokenizer_mode, trust_remote_code=args.trust_remote_code
    )


async def _wait_until_ready(args: ServeArgs, target: Target) -> None:
    if args.ready_check_timeout_sec or not target.model:
        async with contextlib.aclosing(Connections(target.headers)) as connections:
            await target.wait_until_ready(connections, args.ready_check_timeout_sec)


async def _warm_up(args: ServeArgs, target: Target, sample: Sample) -> None:
    async with contextlib.aclosing(Connections(target.headers)) as connections:
        for _ in range(args.num_warmups):
            outcome = await target.send(connections, sample)
            if not outcome.success:
                raise VLLMError(f"the warm-up request failed: {outcome.error}")


def _benchmark(args: ServeArgs) -> tuple[Target, list[Outcome], float]:
    target = Target(args)
    asyncio.run(_wait_until_ready(args, target))
    samples = make_samples(args, _load_tokenizer(args, target.model), args.seed)
    asyncio.run(_warm_up(args, target, samples[0]))
    load = Load(
        samples=samples,
        dues=due_times(len(samples), args.request_rate, args.burstiness, args.seed),
        max_concurrency=args.max_concurrency,
        shows_progress=not args.disable_tqdm,
    )
    return target, *send_all(target, load, args.client_processes)


def _settings(args: ServeArgs, target: Target) -> dict[str, Any]:
    """What was run, for the result file."""
    return {
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": args.backend,
        "endpoint_type": args.backend,
        "label": args.label,
        "model_id": target.model,
        "tokenizer_id": args.tokenizer or args.model or target.model,
        "num_prompts": args.num_prompts,
        "request_rate": "inf" if args.request_rate == float("inf") else args.request_rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        "client_processes": args.client_processes,
    }


def _details(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "input_lens": [o.prompt_tokens or o.sample.prompt_len for o in outcomes],
        "output_lens": [o.output_tokens for o in outcomes],
        "start_times": [o.start for o in outcomes],
        "ttfts": [o.ttft for o in outcomes],
        "itls": [o.itl for o in outcomes],
        "generated_texts": [o.text for o in outcomes],
        "errors": [o.error for o in outcomes],
    }


def _save(args: ServeArgs, document: dict[str, Any]) -> None:
    rate = document["request_rate"]
    concurrency = f"-concurrency{args.max_concurrency}" if args.max_concurrency else ""
    model = os.path.basename(str(document["model_id"]))
    name = args.result_filename or (
        f"{args.label or args.backend}-{rate}qps{concurrency}-{model}-{document['date']}.json"
    )
    path = Path(args.result_dir or ".") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.append_result:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(document) + "\n")
    else:
        path.write_text(json.dumps(document), encoding="utf-8")


def run(namespace: argparse.Namespace) -> int:
    """Run the benchmark; status 1 where no request succeeded.

    Raises:
        ConfigError: an option cannot work.
        VLLMError: no server answers.
    """
    args = ServeArgs(**{name: getattr(namespace, name) for name in flags_of(ServeArgs)})
    metrics = parse_metrics(args.percentile_metrics)
    percentiles = parse_percentiles(args.metric_percentiles)
    goodput = parse_goodput(args.goodput)
    metadata = pairs("--metadata", args.metadata)
    target, outcomes, duration = _benchmark(args)
    result = summarize(outcomes, duration, percentiles=percentiles, goodput=goodput)
    sys.stdout.write(report(result, metrics, percentiles))
    errors = [outcome.error for outcome in outcomes if not outcome.success]
    if errors:
        sys.stderr.write(f"{len(errors)} of {len(outcomes)} requests failed; first: {errors[0]}\n")
    if args.save_result or args.append_result:
        document = _settings(args, target) | metadata | result
        if args.save_detailed:
            document |= _details(outcomes)
        _save(args, document)
    return 0 if result["completed"] else 1
