"""The worker of one CPU process: threads, memory, and the model runner on them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import vllm.envs as envs
from vllm.errors import CapacityError
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.memory_pages import drop_pages, trim_heap
from vllm.v1.worker.device import CPUDeviceLayer
from vllm.v1.worker.kv_hooks import connector_maker
from vllm.v1.worker.model_runner import ModelRunner
from vllm.v1.worker.worker_base import WorkerBase

if TYPE_CHECKING:
    from torch import nn

    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache.planner import BackendConstraints
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
    from vllm.v1.outputs import ModelRunnerOutput

__all__ = ["CPUWorker"]

logger = init_logger(__name__)

_GIB = 1 << 30
# Left to activations, logits and the allocator when the cache is checked against free memory.
_HEADROOM_BYTES = 512 << 20
_WARM_UP_TOKENS = 16


class CPUWorker(WorkerBase):
    def __init__(
        self,
        vllm_config: VllmConfig,
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = True,
    ) -> None:
        super().__init__(vllm_config, local_rank, rank, distributed_init_method, is_driver_worker)
        self.model_runner = ModelRunner(vllm_config, CPUDeviceLayer(), connector_maker(vllm_config))
        self._has_weights = True
        """Until they are dropped to sleep, and again afterwards."""

    def init_device(self) -> None:
        from vllm.distributed.parallel_state import (
            init_distributed_environment,
            initialize_model_parallel,
        )

        parallel = self.parallel_config
        self.num_threads = current_platform.init_threads(self.local_rank, parallel.world_size)
        init_distributed_environment(
            world_size=parallel.world_size,
            rank=self.rank,
            distributed_init_method=self.distributed_init_method,
            local_rank=self.local_rank,
            backend=current_platform.dist_backend,
        )
        initialize_model_parallel(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        current_platform.seed_everything(self.model_config.seed)

    def load_model(self) -> None:
        self.model_runner.load_model()

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        return self.model_runner.get_kv_cache_spec()

    def get_kv_cache_constraints(self) -> dict[str, BackendConstraints]:
        return self.model_runner.get_kv_cache_constraints()

    def determine_available_memory(self) -> int:
        """``--kv-cache-memory-bytes``, else VLLM_CPU_KVCACHE_SPACE GiB, if the machine has it for
        each of its workers.
        """
        asked = self.cache_config.kv_cache_memory_bytes
        if asked is None:
            option, wanted = "VLLM_CPU_KVCACHE_SPACE", int(envs.VLLM_CPU_KVCACHE_SPACE * _GIB)
        else:
            option, wanted = "--kv-cache-memory-bytes", asked
        free = current_platform.get_device_available_memory() // self.parallel_config.world_size
        room = free - _HEADROOM_BYTES
        if room <= 0:
            raise CapacityError(
                f"no memory is left for a KV cache: {free / _GIB:.2f} GiB are free once the model "
                f"is loaded, of which {_HEADROOM_BYTES / _GIB:.2f} GiB are needed to compute; end "
                "other programs, or serve a smaller model or --dtype"
            )
        if wanted > room:
            raise CapacityError(
                f"{option} asks for {wanted / _GIB:.2f} GiB of KV cache, but only "
                f"{room / _GIB:.2f} GiB of memory are left once the model is loaded: set "
                f"--kv-cache-memory-bytes to at most {room}"
            )
        return wanted

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        self.model_runner.initialize_kv_cache(kv_cache_config)

    def compile_or_warm_up_model(self) -> None:
        self.model_runner.warm_up(
            min(_WARM_UP_TOKENS, self.scheduler_config.max_num_batched_tokens)
        )

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        return self.model_runner.execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput:
        return self.model_runner.sample_tokens(grammar_output)

    def sleep(self, level: int) -> None:
        self.model_runner.release_kv_cache(drop_pages)
        if level == 2:
            self.model_runner.release_model()
            self._has_weights = False
            # Parameters and modules refer to each other; start-up froze them.
            gc.unfreeze()
            gc.collect()
        trim_heap()

    def wake_up(self, tags: Sequence[str]) -> None:
        if "weights" in tags and not self._has_weights:
            self.model_runner.restore_model()
            self._has_weights = True
            gc.collect()
            gc.freeze()
        if "kv_cache" in tags:
            self.model_runner.restore_kv_cache()

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
        self.model_runner.close()
