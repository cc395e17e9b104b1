"""One worker in the engine core's own process."""

from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.import_utils import import_class
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.outputs import ModelRunnerOutput, PendingModelRunnerOutput

__all__ = ["UniProcExecutor", "resolve_worker_class"]


def resolve_worker_class(vllm_config: VllmConfig) -> type[Any]:
    """The class that ``--worker-cls`` names, or the platform's own.

    Raises:
        ConfigError: there is no such class.
    """
    path = vllm_config.parallel_config.worker_cls
    if path == "auto":
        from vllm.platforms import current_platform

        path = current_platform.worker_cls
    return import_class(path, "--worker-cls")


class UniProcExecutor(Executor):
    """Calls the worker directly."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__(vllm_config)
        worker_class = resolve_worker_class(vllm_config)
        self.worker = worker_class(
            vllm_config, local_rank=0, rank=0, distributed_init_method="tcp://127.0.0.1:0"
        )
        self._closed = False

    def register_transfer_callback(self, callback: Callable[[], None]) -> None:
        self.worker.register_transfer_callback(callback)

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
    ) -> list[Any]:
        if isinstance(method, str):
            return [getattr(self.worker, method)(*args, **(kwargs or {}))]
        return [method(self.worker, *args, **(kwargs or {}))]

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        (kv_cache_config,) = kv_cache_configs
        self.worker.initialize_from_config(kv_cache_config)

    def execute_model(
        self, scheduler_output: SchedulerOutput
    ) -> ModelRunnerOutput | PendingModelRunnerOutput | None:
        return self.worker.execute_model(scheduler_output)

    def sample_tokens(
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | PendingModelRunnerOutput:
        return self.worker.sample_tokens(grammar_output)

    def check_health(self) -> None:
        self.worker.check_health()

    def shutdown(self) -> None:
        if not self._closed:
            self._closed = True
            self.worker.shutdown()
