"""The worker of one GPU: the device, its memory, and the model runner on it."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from vllm.errors import CapacityError
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.system import format_bytes
from vllm.v1.worker.gpu.device import CUDADeviceLayer
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sleep import SleepMemory
from vllm.v1.worker.kv_hooks import connector_maker
from vllm.v1.worker.worker_base import WorkerBase

if TYPE_CHECKING:
    from torch import nn

    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache.planner import BackendConstraints
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
    from vllm.v1.outputs import ModelRunnerOutput, PendingModelRunnerOutput

__all__ = ["Worker"]

logger = init_logger(__name__)

# What the driver, cuBLAS and compiled kernels take after the memory has been measured, and what
# the allocator loses between its blocks.
_HEADROOM_BYTES = 384 << 20
# Float32 kernels have more numbers than registers: the driver sets memory aside for the rest, for
# as many threads as the device can run (1.3 GiB on an H100).
_FLOAT32_HEADROOM_BYTES = 1536 << 20
# What is measured differs by some MiB from start to start: advice holds for all of them.
_ADVICE_STEP_BYTES = 128 << 20


class Worker(WorkerBase):
    _has_model = True
    """Until it is dropped to sleep, and again afterwards."""

    def init_device(self) -> None:
        from vllm.distributed.parallel_state import (
            init_distributed_environment,
            initialize_model_parallel,
        )

        current_platform.init_threads()
        self.device = current_platform.set_device(self.local_rank)
        parallel = self.parallel_config
        init_distributed_environment(
            world_size=parallel.world_size,
            rank=self.rank,
            distributed_init_method=self.distributed_init_method,
            local_rank=self.local_rank,
            backend=current_platform.dist_backend,
        )
        initialize_model_parallel(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        current_platform.seed_everything(self.model_config.seed)
        # Memory that can be given back is the driver's, not torch's.
        self._sleep_memory = (
            SleepMemory(self.device) if self.model_config.enable_sleep_mode else None
        )
        self.model_runner = GPUModelRunner(
            self.vllm_config,
            CUDADeviceLayer(self.device),
            connector_maker(self.vllm_config),
            overlapped=self.scheduler_config.async_scheduling,
            sleep_memory=self._sleep_memory,
        )

    def load_model(self) -> None:
        free = current_platform.get_device_available_memory(self.local_rank)
        try:
            self.model_runner.load_model()
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"the weights do not fit in the {format_bytes(free)} that are free on "
                f"{current_platform.get_device_name(self.local_rank)}: end other programs on it, "
                "or serve a smaller model or --dtype"
            ) from error

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        return self.model_runner.get_kv_cache_spec()

    def get_kv_cache_constraints(self) -> dict[str, BackendConstraints]:
        return self.model_runner.get_kv_cache_constraints()

    def determine_available_memory(self) -> int:
        """``--kv-cache-memory-bytes``, else what ``--gpu-memory-utilization`` leaves once weights
        and the largest step have theirs, which is measured by running such a step.
        """
        total = current_platform.get_device_total_memory(self.local_rank)
        needed = self._measure_use()
        asked = self.cache_config.kv_cache_memory_bytes
        if asked is not None:
            room = total - needed
            if asked > room:
                most = max(room // _ADVICE_STEP_BYTES - 1, 0) * _ADVICE_STEP_BYTES
                raise CapacityError(
                    f"--kv-cache-memory-bytes asks for {format_bytes(asked)} of KV cache, but "
                    f"{format_bytes(max(room, 0))} are left beside the model: set it to at most "
                    f"{most}"
                )
            return asked
        share = self.cache_config.gpu_memory_utilization
        available = int(total * share) - needed
        if available <= 0:
            least = math.ceil(100 * (needed / total + 0.01)) / 100
            advice = (
                f"set it to at least {least:.2f}"
                if least <= 1
                else "lower --max-num-batched-tokens, or serve a smaller model or --dtype"
            )
            raise CapacityError(
                f"--gpu-memory-utilization {share} of {format_bytes(total)} leaves nothing for a "
                f"KV cache: weights and the largest step take {format_bytes(needed)}; {advice}"
            )
        return available

    def _measure_use(self) -> int:
        """Bytes of the device that anything but the cache will take."""
        runner, scheduler = self.model_runner, self.scheduler_config
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            runner.profile(
                scheduler.max_num_batched_tokens,
                min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens),
            )
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"a step of --max-num-batched-tokens {scheduler.max_num_batched_tokens} does not "
                "fit in the device's memory beside the weights: lower it"
            ) from error
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        elsewhere = total - free - torch.cuda.memory_reserved(self.device)
        graphs = self._graph_bytes()
        logger.info(
            "Memory: %s for weights and the largest step, %s for graphs, %s outside of PyTorch",
            format_bytes(peak),
            format_bytes(graphs),
            format_bytes(elsewhere),
        )
        wide = self.model_config.dtype is torch.float32
        return (
            peak + elsewhere + graphs + _HEADROOM_BYTES + (_FLOAT32_HEADROOM_BYTES if wide else 0)
        )

    def _graph_bytes(self) -> int:
        """What the captured steps keep: the outputs of each (1.1 GiB of logits for 128,256 tokens
        in bf16), and the memory that they share, which the largest one needs.
        """
        runner = self.model_runner
        decodes, prompts = runner.decode_graph_sizes, runner.prompt_graph_sizes
        if not decodes:
            return 0
        config = self.model_config
        text_config, vocab = config.hf_text_config, config.get_vocab_size()
        hidden = text_config.hidden_size
        width = 4 * getattr(text_config, "intermediate_size", hidden)
        kept = sum(decodes) * (vocab + hidden) + sum(prompts) * hidden
        shared = max(decodes[0] * (vocab + width), max(prompts, default=0) * width) * 3 // 2
        return (kept + shared) * config.dtype.itemsize

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        self.model_runner.initialize_kv_cache(kv_cache_config)

    def compile_or_warm_up_model(self) -> None:
        begin = time.monotonic()
        self.model_runner.warm_up_kernels()
        compiled = time.monotonic()
        count = self.model_runner.capture_graphs()
        if count:
            # What prepares a captured step's inputs is compiled apart.
            self.model_runner.warm_up_kernels()
        free, _ = torch.cuda.mem_get_info(self.device)
        logger.info(
            "Warm-up: kernels %.1f s, %d CUDA graphs %.1f s; %s of the device are free",
            compiled - begin,
            count,
            time.monotonic() - compiled,
            format_bytes(free),
        )

    def execute_model(
        self, scheduler_output: SchedulerOutput
    ) -> ModelRunnerOutput | PendingModelRunnerOutput | None:
        return self.model_runner.execute_model(scheduler_output)

    def sample_tokens(
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | PendingModelRunnerOutput:
        return self.model_runner.sample_tokens(grammar_output)

    def sleep(self, level: int) -> None:
        memory = self._sleep_memory
        assert memory is not None, "the engine asks for --enable-sleep-mode first"
        if level == 1:
            # First: the host may not have the memory, and then nothing has changed.
            memory.offload_weights()
        self.model_runner.release_kv_cache(lambda _: memory.release_pool())
        if level == 2:
            memory.drop_weights()
            self.model_runner.release_model()
            self._has_model = False
            # Parameters and modules refer to each other; start-up froze them.
            gc.unfreeze()
            gc.collect()
        torch.cuda.empty_cache()

    def wake_up(self, tags: Sequence[str]) -> None:
        memory = self._sleep_memory
        assert memory is not None, "the engine asks for --enable-sleep-mode first"
        if "weights" in tags:
            memory.restore_weights()
            if not self._has_model:
                self.model_runner.restore_model()
                self._has_model = True
                gc.collect()
                gc.freeze()
        if "kv_cache" in tags and memory.restore_pool():
            self.model_runner.restore_kv_cache()
        if self._has_model and memory.is_awake:
            self.model_runner.recapture_graphs()

    def register_transfer_callback(self, callback: Callable[[], None]) -> None:
        self.model_runner.register_transfer_callback(callback)

    def get_kv_connector_handshake_metadata(
        self,
    ) -> tuple[tuple[int, int], KVConnectorHandshakeMetadata] | None:
        metadata = self.model_runner.get_kv_connector_handshake_metadata()
        if metadata is None:
            return None
        return divmod(self.rank, self.parallel_config.tensor_parallel_size), metadata

    def get_model(self) -> nn.Module:
        return self.model_runner.get_model()

    def shutdown(self) -> None:
        runner = getattr(self, "model_runner", None)
        if runner is not None:
            runner.close()
