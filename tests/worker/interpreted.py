"""The GPU's model runner on the CPU: Triton's interpreter stands in for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.worker.driver import make_config
from vllm.config import AttentionConfig, ParallelConfig, VllmConfig
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.cuda_graphs import StepGraphs, decode_graph_sizes
from vllm.v1.worker.gpu.device import CUDADeviceLayer
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.kv_hooks import connector_maker

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Heads of 16, the smallest that the Triton kernels take."""


class InterpretedWorker(CPUWorker):
    """Threads and memory of the CPU, runner of the GPU."""

    runner_class = GPUModelRunner

    def __init__(self, vllm_config: VllmConfig, *args, **kwargs) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.model_runner = self.runner_class(
            vllm_config,
            CUDADeviceLayer(torch.device("cpu")),
            connector_maker(vllm_config),
            overlapped=vllm_config.scheduler_config.async_scheduling,
        )

    def compile_or_warm_up_model(self) -> None:
        self.model_runner.warm_up_kernels()


class RunAgain(StepGraphs):
    """Stands in for CUDA graphs: what would be captured runs again, on the same buffers, with the
    metadata of its capture, into what the capture has returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[int, tuple[Callable[[], Any], Any]] = {}
        self.replayed: list[int] = []

    def capture(self, sizes, make_step, pool) -> None:
        for size in sizes:
            run = make_step(size)
            self.steps[size] = run, run()

    def __bool__(self) -> bool:
        return bool(self.steps)

    def replay(self, size: int) -> Any:
        self.replayed.append(size)
        for _, step in self.steps.values():
            for tensor in _tensors(step):
                tensor.fill_(math.nan)
        run, kept = self.steps[size]
        for tensor, now in zip(_tensors(kept), _tensors(run()), strict=True):
            tensor.copy_(now)
        return kept

    def clear(self) -> None:
        self.steps.clear()


def _tensors(step: Any) -> list[torch.Tensor]:
    return [step] if isinstance(step, torch.Tensor) else [step.hidden, step.logits]


class CapturingRunner(GPUModelRunner):
    """Has graphs of 1 and 2 decodes, and of 4, 20 and 28 tokens where a step may have so many."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self._graphs, self._prompt_graphs = RunAgain(), RunAgain()

    def capture_graphs(self) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_runner, "capturing", nullcontext)
            return super().capture_graphs()

    @property
    def decode_graph_sizes(self) -> list[int]:
        largest = min(2, self.vllm_config.scheduler_config.max_num_seqs)
        return decode_graph_sizes(largest)

    @property
    def prompt_graph_sizes(self) -> list[int]:
        most = self.vllm_config.scheduler_config.max_num_batched_tokens
        return [size for size in (28, 20, 4) if size <= most]


class CapturingWorker(InterpretedWorker):
    """Small steps run as if captured."""

    runner_class = CapturingRunner

    def compile_or_warm_up_model(self) -> None:
        self.model_runner.capture_graphs()
        self.model_runner.warm_up_kernels()

    def wake_up(self, tags: Sequence[str]) -> None:
        super().wake_up(tags)
        self.model_runner.recapture_graphs()


def make_interpreted_config(
    model: Path, *, overlapped: bool, captured: bool = False, max_tokens: int = 28, **options
) -> VllmConfig:
    """``max_tokens`` of a step; other options are those of ``make_config``."""
    config = make_config(model, **options)
    worker = "CapturingWorker" if captured else "InterpretedWorker"
    # Few tokens a step: the prompts of the warm-up are as long as a step may be.
    scheduler = replace(
        config.scheduler_config, async_scheduling=overlapped, max_num_batched_tokens=max_tokens
    )
    return replace(
        config,
        attention_config=AttentionConfig(backend="TRITON_ATTN"),
        scheduler_config=scheduler,
        parallel_config=ParallelConfig(worker_cls=f"tests.worker.interpreted.{worker}"),
    )
