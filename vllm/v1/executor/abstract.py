"""The engine core's view of its workers, wherever they run.

An executor starts workers, hands them each step's work and answers for their health. It knows
nothing of requests, sockets or front ends.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.aggregator import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.errors import ConfigError
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput, PendingModelRunnerOutput

__all__ = ["Executor"]

_EXECUTORS = {
    "uni": ("uniproc_executor", "UniProcExecutor"),
    "mp": ("multiproc_executor", "MultiprocExecutor"),
    "ray": ("ray_executor", "RayDistributedExecutor"),
}


class Executor(ABC):
    """Runs every call on all workers; lists in answers are in the order of ranks."""

    kv_output_aggregator: KVOutputAggregator | None = None
    """Where several workers report a connector's transfers: makes one output of theirs."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.vllm_config = vllm_config

    @staticmethod
    def get_class(vllm_config: VllmConfig) -> type["Executor"]:
        """The executor that ``--distributed-executor-backend`` names.

        Raises:
            ConfigError: no executor of that name.
        """
        backend = vllm_config.parallel_config.distributed_executor_backend
        if backend in _EXECUTORS:
            module, name = _EXECUTORS[backend]
            return getattr(import_module(f"vllm.v1.executor.{module}"), name)
        raise ConfigError(
            f"--distributed-executor-backend {backend} is not available; there are "
            f"{', '.join(_EXECUTORS)}",
            parameter="distributed_executor_backend",
            value=backend,
        )

    def register_failure_callback(self, callback: Callable[[Exception], None]) -> None:
        """Have ``callback`` called, from any thread, when a worker has died between calls."""

    def register_transfer_callback(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called, from any thread, when a KV connector has something to report.

        Where workers are processes of their own nobody is told: steps ask them.
        """

    @abstractmethod
    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
    ) -> list[Any]:
        """Call a worker's method by name, or ``method(worker, ...)``, on every worker.

        Args:
            timeout: seconds to wait for the answers of worker processes; they go on after it, and
                the next call or step waits for them. A worker in this process is always waited for.

        Raises:
            TimeoutError: not all have answered in time.
        """

    def init_device(self) -> None:
        self.collective_rpc("init_device")

    def load_model(self) -> None:
        self.collective_rpc("load_model")

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        """Per worker: layer name to ``KVCacheSpec``."""
        return self.collective_rpc("get_kv_cache_spec")

    def get_kv_cache_constraints(self) -> list[Any]:
        """Per worker: what its attention backends demand of the cache."""
        return self.collective_rpc("get_kv_cache_constraints")

    def determine_available_memory(self) -> list[int]:
        """Per worker: bytes that the KV cache may take."""
        return self.collective_rpc("determine_available_memory")

    def init_kv_output_aggregator(self, connector: KVConnectorBase_V1) -> None:
        """Have the reports of ``connector``'s worker halves made one."""
        self.kv_output_aggregator = KVOutputAggregator.from_connector(
            connector, self.vllm_config.parallel_config.world_size
        )

    @abstractmethod
    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        """Allocate and bind the caches; one ``KVCacheConfig`` per worker."""

    def get_kv_connector_handshake_metadata(self) -> list[Any]:
        """Per worker: its (pipeline, tensor) rank and what its connector tells peers, or None."""
        return self.collective_rpc("get_kv_connector_handshake_metadata")

    def compile_or_warm_up_model(self) -> None:
        self.collective_rpc("compile_or_warm_up_model")

    @abstractmethod
    def execute_model(
        self, scheduler_output: SchedulerOutput
    ) -> ModelRunnerOutput | PendingModelRunnerOutput | None:
        """Run a step's forward pass; None where sampling waits for ``sample_tokens``.

        Pending only with ``--async-scheduling``: the next step may be run before its result is
        asked for.
        """

    @abstractmethod
    def sample_tokens(
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | PendingModelRunnerOutput:
        """Finish the step that ``execute_model`` left open."""

    def sleep(self, level: int) -> None:
        """See ``WorkerBase.sleep``."""
        self.collective_rpc("sleep", (level,))

    def wake_up(self, tags: Sequence[str]) -> None:
        """See ``WorkerBase.wake_up``."""
        self.collective_rpc("wake_up", (list(tags),))

    @abstractmethod
    def check_health(self) -> None:
        """Raises where a worker can no longer work."""

    @abstractmethod
    def shutdown(self) -> None:
        """Stop the workers and give back what they hold; may be called twice."""
