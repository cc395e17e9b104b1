"""Where a step's time goes: kernels by name, and how long the GPU waits between them.

    python benchmarks/gpu/step_profile.py --model DIR [--batches 1,32,256] [--prefill]

The engine runs in this process, with dummy weights, so that torch's profiler sees it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from vllm import LLM, SamplingParams


def breakdown(profile: Any, steps: int) -> dict[str, Any]:
    """Per step: kernels by name (count, microseconds), busy and idle time of the device."""
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    by_name: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    busy, reached = 0.0, spans[0][0]
    for start, end, name in spans:
        by_name[name][0] += 1
        by_name[name][1] += end - start
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    total = reached - spans[0][0]
    kernels = sorted(by_name.items(), key=lambda item: -item[1][1])
    return {
        "span_us": round(total / steps, 1),
        "busy_us": round(busy / steps, 1),
        "idle_percent": round(100 * (1 - busy / total), 1),
        "launches": round(len(spans) / steps, 1),
        "kernels": [
            {"name": name[:110], "count": round(count / steps, 2), "us": round(us / steps, 1)}
            for name, (count, us) in kernels[:18]
        ],
    }


class Gaps:
    """How long the device has nothing to do between steps, by events of its own; no profiler."""

    def __init__(self, llm: LLM) -> None:
        self._runner = llm.llm_engine.client._core.executor.worker.model_runner
        self._edges: list[list[torch.cuda.Event]] = []

    def __enter__(self) -> Gaps:
        runner = self._runner
        self._execute, self._sample = runner.execute_model, runner.sample_tokens
        runner.execute_model, runner.sample_tokens = self._begin, self._end
        return self

    def __exit__(self, *_: object) -> None:
        del self._runner.execute_model, self._runner.sample_tokens

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, *args: Any) -> Any:
        self._edges.append([self._mark()])
        return self._execute(*args)

    def _end(self, *args: Any) -> Any:
        result = self._sample(*args)
        self._edges[-1].append(self._mark())
        return result

    def percent(self) -> float:
        """Of the time from the first step to the last one."""
        edges = [edge for edge in self._edges if len(edge) == 2]
        idle = sum(a[1].elapsed_time(b[0]) for a, b in itertools.pairwise(edges))
        return round(100 * idle / edges[0][0].elapsed_time(edges[-1][1]), 2)


def run_steps(llm: LLM, prompts: int, length: int, skip: int, steps: int) -> dict[str, Any]:
    rng = random.Random(0)
    vocab = llm.llm_engine.model_config.get_vocab_size()
    engine = llm.llm_engine
    params = SamplingParams(
        temperature=0.6, ignore_eos=True, max_tokens=skip + 2 * steps + 12, detokenize=False
    )
    for i in range(prompts):
        ids = [rng.randrange(10, vocab - 1000) for _ in range(length)]
        engine.add_request(f"{time.monotonic_ns()}-{i}", {"prompt_token_ids": ids}, params)
    for _ in range(skip):
        engine.step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        engine.step()
    torch.cuda.synchronize()
    plain = (time.perf_counter() - begin) / steps
    with Gaps(llm) as gaps:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(5):
            engine.step()
        torch.cuda.synchronize()
    result = breakdown(profile, 5)
    result["wall_us_unprofiled"] = round(plain * 1e6, 1)
    result["idle_percent_between_steps"] = gaps.percent()
    while engine.has_unfinished_requests():
        engine.step()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--batches", default="1,32,256")
    parser.add_argument("--prefill", action="store_true", help="also steps of 2048-token prompts")
    parser.add_argument("--kw", default="{}")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    llm = LLM(
        model=args.model, load_format="dummy", skip_tokenizer_init=True, max_model_len=4096,
        enable_prefix_caching=False, **json.loads(args.kw),
    )  # fmt: skip
    result: dict[str, Any] = {"model": args.model, "device": torch.cuda.get_device_name()}
    result["startup_seconds"] = llm.llm_engine.client.facts.startup_seconds
    cases = [(f"decode {b}", int(b), 128, 60, 40) for b in args.batches.split(",")]
    if args.prefill:
        cases.append(("prefill 48 x 2048", 48, 2048, 3, 2))
    for name, count, length, skip, steps in cases:
        row = result[name] = run_steps(llm, count, length, skip, steps)
        print(name, {k: v for k, v in row.items() if k != "kernels"}, flush=True)
        for kernel in row["kernels"]:
            print(f"   {kernel['us']:9.1f} us {kernel['count']:7.1f} x  {kernel['name']}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
