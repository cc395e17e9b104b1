"""What an executor asks of a worker: one process's share of the model on one device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vllm.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import nn

    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache.planner import BackendConstraints
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
    from vllm.v1.outputs import ModelRunnerOutput, PendingModelRunnerOutput

__all__ = ["WorkerBase"]


class WorkerBase(ABC):
    """Start-up calls the methods in the order they stand here; steps follow.

    Args:
        local_rank: index of the device on this host.
        rank: index of the worker among all of them.
        distributed_init_method: URL where the workers find each other.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = True,
    ) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.cache_config = vllm_config.cache_config
        self.parallel_config = vllm_config.parallel_config
        self.scheduler_config = vllm_config.scheduler_config
        self.local_rank = local_rank
        self.rank = rank
        self.distributed_init_method = distributed_init_method
        self.is_driver_worker = is_driver_worker

    @abstractmethod
    def init_device(self) -> None:
        """Take the device and join the process groups."""

    @abstractmethod
    def load_model(self) -> None:
        """Build the model and read its weights."""

    @abstractmethod
    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Layer name to what that layer keeps per block."""

    @abstractmethod
    def get_kv_cache_constraints(self) -> dict[str, BackendConstraints]:
        """Layer name to what that layer's attention backend demands of layout and block size."""

    @abstractmethod
    def determine_available_memory(self) -> int:
        """Bytes that the KV cache may take.

        Raises:
            CapacityError: less than was asked for; the message names the option and what fits.
        """

    @abstractmethod
    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the caches and bind them to the layers."""

    @abstractmethod
    def compile_or_warm_up_model(self) -> None:
        """Do once what would make the first request slow."""

    @abstractmethod
    def execute_model(
        self, scheduler_output: SchedulerOutput
    ) -> ModelRunnerOutput | PendingModelRunnerOutput | None:
        """Run a step; None where sampling waits for ``sample_tokens``."""

    @abstractmethod
    def sample_tokens(
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | PendingModelRunnerOutput:
        """Finish the step that ``execute_model`` left open."""

    def register_transfer_callback(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called, from any thread, when the KV connector has something to say."""

    def get_kv_connector_handshake_metadata(
        self,
    ) -> tuple[tuple[int, int], KVConnectorHandshakeMetadata] | None:
        """Once, after the caches are allocated: this worker's (pipeline, tensor) rank, and what
        other engines need to connect to it; None where nothing connects.
        """
        return None

    @abstractmethod
    def get_model(self) -> nn.Module: ...

    def sleep(self, level: int) -> None:
        """Give memory back until ``wake_up``; no request holds blocks, and no step follows.

        Args:
            level: 1 gives back the KV cache's memory, and moves weights out of the device's where
                that is not the host's; 2 gives back the weights' too.

        Raises:
            UnsupportedError: the device has no sleep mode.
        """
        raise UnsupportedError(f"{type(self).__name__} has no sleep mode")

    def wake_up(self, tags: Sequence[str]) -> None:
        """Have the memory of ``tags`` ("weights", "kv_cache") again: weights as they were
        loaded, the cache empty.
        """
        raise UnsupportedError(f"{type(self).__name__} has no sleep mode")

    def check_health(self) -> None:
        """Raises where the worker can no longer work."""

    def shutdown(self) -> None:
        """Give back what the worker holds; may be called twice."""
