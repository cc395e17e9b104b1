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
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tqdm import tqdm

import vllm.envs as envs
from vllm.benchmarks.args import ServeArgs
from vllm.benchmarks.client import Connections, Outcome, request_body, send
from vllm.benchmarks.datasets import Sample, make_samples
from vllm.benchmarks.metrics import (
    parse_goodput,
    parse_metrics,
    parse_percentiles,
    report,
    summarize,
)
from vllm.errors import ConfigError, VLLMError
from vllm.utils.flags import flags_of

__all__ = ["run"]

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "logprobs")
_READY_PAUSE = 0.5


def _pairs(option: str, items: Sequence[str] | None) -> dict[str, str]:
    """KEY=VALUE items as a dictionary.

    Raises:
        ConfigError: an item without "=".
    """
    result = {}
    for item in items or ():
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{option} takes KEY=VALUE, not {item!r}", parameter=option)
        result[key] = value
    return result


class _Target:
    """Where requests go, and what every one of them holds."""

    def __init__(self, args: ServeArgs) -> None:
        base = args.base_url or f"http://{args.host}:{args.port}"
        if not base.startswith(("http://", "https://")):
            raise ConfigError(
                f"--base-url must begin with http:// or https://, not {base!r}",
                parameter="base_url",
                value=base,
            )
        self.base = base.rstrip("/")
        self.chat = args.backend == "openai-chat"
        default = "/v1/chat/completions" if self.chat else "/v1/completions"
        self.endpoint = args.endpoint or default
        if self.chat != self.endpoint.rstrip("/").endswith("chat/completions"):
            raise ConfigError(
                f"--backend {args.backend} does not fit --endpoint {self.endpoint}; use {default}",
                parameter="endpoint",
                value=self.endpoint,
            )
        self.url = self.base + "/" + self.endpoint.lstrip("/")
        self.headers = _pairs("--header", args.header)
        # The pieces of a stream are timed as they come off the wire, so none may be compressed.
        self.headers["Accept-Encoding"] = "identity"
        if envs.VLLM_API_KEY:
            self.headers.setdefault("Authorization", f"Bearer {envs.VLLM_API_KEY}")
        self.sampling = {
            name: value for name in _SAMPLING if (value := getattr(args, name)) is not None
        }
        if args.ignore_eos:
            self.sampling["ignore_eos"] = True
        self.sampling |= args.extra_body
        self.model = args.served_model_name or args.model or ""

    async def send(self, connections: Connections, sample: Sample) -> Outcome:
        body = request_body(sample, chat=self.chat, model=self.model, sampling=self.sampling)
        with connections.one() as client:
            return await send(client, self.url, sample, body)

    async def wait_until_ready(self, connections: Connections, timeout: float) -> None:
        """Ask for the models until the server answers; takes the first for ``model`` if unset.

        Raises:
            VLLMError: no answer within ``timeout`` seconds, or one that names no model.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                with connections.one() as client:
                    answer = await client.get(f"{self.base}/v1/models")
                if answer.status_code == 200:
                    break
                problem = f"status {answer.status_code}: {answer.text.strip()}"
                if 400 <= answer.status_code < 500:
                    raise VLLMError(f"{self.base}/v1/models answered {problem}")
            except httpx.HTTPError as error:
                problem = str(error) or type(error).__name__
            if time.monotonic() >= deadline:
                raise VLLMError(f"no server is ready at {self.base}: {problem} (--base-url)")
            await asyncio.sleep(_READY_PAUSE)
        if not self.model:
            models = answer.json().get("data", [])
            if not models:
                raise VLLMError(f"the server at {self.base} serves no model")
            self.model = models[0]["id"]


def _load_tokenizer(args: ServeArgs, model: str) -> Any:
    from vllm.transformers_utils.model_path import resolve_model_path
    from vllm.transformers_utils.tokenizer import get_tokenizer

    name = args.tokenizer or args.model or model
    path = resolve_model_path(name, weights=False, option="--tokenizer")
    return get_tokenizer(
        str(path), mode=args.tokenizer_mode, trust_remote_code=args.trust_remote_code
    )


async def _arrivals(
    samples: Sequence[Sample], rate: float, burstiness: float, seed: int
) -> AsyncIterator[Sample]:
    """The samples, each when it is due: gaps are gamma distributed, 1 / rate on average."""
    if rate == float("inf"):
        for sample in samples:
            yield sample
        return
    generator = np.random.default_rng(seed)
    gaps = generator.gamma(burstiness, 1 / (rate * burstiness), len(samples))
    start = time.perf_counter()
    for sample, due in zip(samples, np.cumsum(gaps) - gaps[0], strict=True):
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        yield sample


async def _measure(
    args: ServeArgs, target: _Target, connections: Connections, samples: Sequence[Sample]
) -> tuple[list[Outcome], float]:
    """All outcomes in the order of ``samples``, and the seconds they took together."""
    limit: contextlib.AbstractAsyncContextManager[Any] = (
        asyncio.Semaphore(args.max_concurrency)
        if args.max_concurrency
        else contextlib.nullcontext()
    )
    progress = tqdm(total=len(samples), disable=args.disable_tqdm, unit="req")

    async def one(sample: Sample) -> Outcome:
        async with limit:
            outcome = await target.send(connections, sample)
        progress.update()
        return outcome

    start = time.perf_counter()
    tasks = [
        asyncio.create_task(one(sample))
        async for sample in _arrivals(samples, args.request_rate, args.burstiness, args.seed)
    ]
    outcomes = await asyncio.gather(*tasks)
    duration = time.perf_counter() - start
    progress.close()
    return list(outcomes), duration


async def _benchmark(args: ServeArgs) -> tuple[_Target, list[Outcome], float]:
    target = _Target(args)
    async with contextlib.aclosing(Connections(target.headers)) as connections:
        if args.ready_check_timeout_sec or not target.model:
            await target.wait_until_ready(connections, args.ready_check_timeout_sec)
        samples = make_samples(args, _load_tokenizer(args, target.model), args.seed)
        for _ in range(args.num_warmups):
            outcome = await target.send(connections, samples[0])
            if not outcome.success:
                raise VLLMError(f"the warm-up request failed: {outcome.error}")
        outcomes, duration = await _measure(args, target, connections, samples)
    return target, outcomes, duration


def _settings(args: ServeArgs, target: _Target) -> dict[str, Any]:
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
    metadata = _pairs("--metadata", args.metadata)
    target, outcomes, duration = asyncio.run(_benchmark(args))
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
