"""What the host does in one decode step at 256 running requests, with a model that does nothing.

A stub takes the place of the model: layers that declare real caches, hidden states and logits that
are always the same. What is left is the engine's own work: scheduling, the batch, inputs and
metadata, choosing the best of a few logits, results, the messages to the front end. Times are
medians over the steps of the best of several rounds, in microseconds; other work on the machine
disturbs the best round least, and hardly the steps of the fifth percentile.

python benchmarks/host_cost.py [--requests 256] [--profile] [--output FILE]
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import platform
import pstats
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from machine import cpu_name, num_cores
from torch import nn

from vllm import SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import collect_layers
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.serial import encode
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.worker.cpu_worker import CPUWorker

HIDDEN = 8
# Sampling is the device's work: few enough columns that it costs the host next to nothing.
LOGITS = 16


class StubModel(nn.Module):
    """Caches of the real layers; no weights and no work."""

    def __init__(self, vllm_config: VllmConfig, max_tokens: int) -> None:
        super().__init__()
        config = vllm_config.model_config
        with set_current_vllm_config(vllm_config), collect_layers() as layers:
            for index in range(config.get_num_layers()):
                Attention(
                    config.get_total_num_kv_heads(),
                    config.get_head_size(),
                    1.0,
                    prefix=f"layers.{index}",
                )
        self.static_forward_context = layers
        self.hidden = torch.zeros(max_tokens, HIDDEN)
        self.logits = torch.eye(LOGITS).repeat(-(-max_tokens // LOGITS), 1)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.hidden[: input_ids.shape[0]]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.logits[: hidden_states.shape[0]]


class StubWorker(CPUWorker):
    def load_model(self) -> None:
        config = self.vllm_config
        model = StubModel(config, config.scheduler_config.max_num_batched_tokens)
        self.model_runner.vocab_size = LOGITS
        self.model_runner.set_model(model)


class Stopwatch:
    """Times the calls of a method; ``take`` gives the seconds since it was last asked."""

    def __init__(self, owner: Any, name: str) -> None:
        self._inner = getattr(owner, name)
        self._seconds = 0.0
        setattr(owner, name, self)

    def __call__(self, *args: Any) -> Any:
        begin = time.perf_counter()
        result = self._inner(*args)
        self._seconds += time.perf_counter() - begin
        return result

    def take(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def start(num_requests: int, prompt_tokens: int) -> EngineCore:
    args = EngineArgs(
        model="smollm2",
        worker_cls="host_cost.StubWorker",
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=num_requests,
        kv_cache_memory_bytes=9 << 30,
        enable_prefix_caching=True,
    )
    core = EngineCore(args.create_engine_config(), UniProcExecutor, log_stats=True)
    for index in range(num_requests):
        request = EngineCoreRequest(
            f"cmpl-{index:032x}-0-{index:x}",
            [index % 997 + 1] * prompt_tokens,
            SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True),
            time.time(),
        )
        core.add_request(core.preprocess(request))
    while core.scheduler.num_waiting or any(
        request.num_computed_tokens < request.num_prompt_tokens
        for request in core.scheduler.running
    ):
        core.step()
    for _ in range(20):
        core.step()
    return core


def measure(core: EngineCore, steps: int) -> list[dict[str, float]]:
    """Seconds of each part of each step."""
    watches = {
        "schedule": Stopwatch(core.scheduler, "schedule"),
        "worker": Stopwatch(core.executor, "execute_model"),
        "results": Stopwatch(core.scheduler, "update_from_output"),
    }
    samples = []
    for _ in range(steps):
        for watch in watches.values():
            watch.take()
        begin = time.perf_counter()
        outputs, _ = core.step()
        end_of_step = time.perf_counter()
        for client_outputs in outputs.values():
            encode(client_outputs)
        end = time.perf_counter()
        sample = {name: watch.take() for name, watch in watches.items()}
        sample["encode"] = end - end_of_step
        sample["total"] = end - begin
        samples.append(sample)
    for watch, (owner, name) in zip(
        watches.values(),
        (
            (core.scheduler, "schedule"),
            (core.executor, "execute_model"),
            (core.scheduler, "update_from_output"),
        ),
        strict=True,
    ):
        delattr(owner, name)
        assert getattr(owner, name) is not watch
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--output", type=Path, help="also write this JSON file")
    args = parser.parse_args()
    core = start(args.requests, args.prompt_tokens)
    gc.collect()
    gc.freeze()
    if args.profile:
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(args.steps):
            for outputs in core.step()[0].values():
                encode(outputs)
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
        core.shutdown()
        return
    rounds = [measure(core, args.steps) for _ in range(args.rounds)]
    core.shutdown()
    best = min(rounds, key=lambda samples: statistics.median(s["total"] for s in samples))
    figures = {
        name: round(statistics.median(sample[name] for sample in best) * 1e6, 1) for name in best[0]
    }
    totals = sorted(sample["total"] for part in rounds for sample in part)
    least = {"total": round(totals[len(totals) // 20] * 1e6, 1)}
    medians = [round(statistics.median(s["total"] for s in part) * 1e6, 1) for part in rounds]
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"{cpu_name()}, {num_cores()} cores",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "command": "python benchmarks/host_cost.py",
        "running_requests": args.requests,
        "microseconds_per_step": figures,
        "fifth_percentile": least,
        "rounds_total": medians,
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
