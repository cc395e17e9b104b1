"""The GPU's model runner on the CPU: Triton's interpreter stands in for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.worker.driver import make_config
from vllm.config import AttentionConfig, ParallelConfig, VllmConfig
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu.cuda_graphs import StepGraphs
from vllm.v1.worker.gpu.device import CUDADeviceLayer
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Heads of 16, the smallest that the Triton kernels take."""


class InterpretedWorker(CPUWorker):
    """Threads and memory of the CPU, runner of the GPU."""

    def __init__(self, vllm_config: VllmConfig, *args, **kwargs) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self.model_runner = GPUModelRunner(
            vllm_config,
            CUDADeviceLayer(torch.device("cpu")),
            overlapped=vllm_config.scheduler_config.async_scheduling,
        )

    def compile_or_warm_up_model(self) -> None:
        self.model_runner.warm_up_kernels()


class RunAgain(StepGraphs):
    """Stands in for CUDA graphs: what would be captured runs again, on the same buffers and with
    the metadata of its capture.
    """

    def __init__(self) -> None:
        self.steps: dict[int, Callable[[], Any]] = {}
        self.replayed: list[int] = []

    def capture(self, sizes, make_step, pool) -> None:
        for size in sizes:
            self.steps[size] = make_step(size)
            self.steps[size]()

    def replay(self, size: int) -> Any:
        self.replayed.append(size)
        return self.steps[size]()

    def clear(self) -> None:
        self.steps.clear()


class CapturingWorker(InterpretedWorker):
    """Small steps run as if captured."""

    def compile_or_warm_up_model(self) -> None:
        super().compile_or_warm_up_model()
        runner, scheduler = self.model_runner, self.vllm_config.scheduler_config
        runner._graphs, runner._prompt_graphs = RunAgain(), RunAgain()
        prompts = [size for size in (28, 20, 4) if size <= scheduler.max_num_batched_tokens]
        with torch.inference_mode():
            runner._prompt_graphs.capture(prompts, runner._prompts_of, None)
            runner._graphs.capture([2, 1], runner._decode_of, None)
        runner._preparer.largest_graph = 2
        runner._preparer.prompt_graph_sizes = prompts[::-1]


def make_interpreted_config(
    model: Path, *, overlapped: bool, captured: bool = False, **options
) -> VllmConfig:
    config = make_config(model, **options)
    worker = "CapturingWorker" if captured else "InterpretedWorker"
    # Few tokens a step: the prompts of the warm-up are as long as a step may be.
    scheduler = replace(
        config.scheduler_config, async_scheduling=overlapped, max_num_batched_tokens=28
    )
    return replace(
        config,
        attention_config=AttentionConfig(backend="TRITON_ATTN"),
        scheduler_config=scheduler,
        parallel_config=ParallelConfig(worker_cls=f"tests.worker.interpreted.{worker}"),
    )
