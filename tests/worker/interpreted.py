"""The GPU's model runner on the CPU: Triton's interpreter stands in for the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tests.worker.driver import make_config
from vllm.config import AttentionConfig, ParallelConfig, VllmConfig
from vllm.v1.worker.cpu_worker import CPUWorker
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


def make_interpreted_config(model: Path, *, overlapped: bool, **options) -> VllmConfig:
    config = make_config(model, **options)
    # Few tokens a step: the prompts of the warm-up are as long as a step may be.
    scheduler = replace(
        config.scheduler_config, async_scheduling=overlapped, max_num_batched_tokens=28
    )
    return replace(
        config,
        attention_config=AttentionConfig(backend="TRITON_ATTN"),
        scheduler_config=scheduler,
        parallel_config=ParallelConfig(worker_cls="tests.worker.interpreted.InterpretedWorker"),
    )
