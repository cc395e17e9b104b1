"""Workers as Ray actors, on one host or several; needs the extra ``ray``.

Joins the cluster that RAY_ADDRESS names or that runs on this host, or starts a local one. Workers
are placed together where they fit on one node, else on as few as possible; those of a node have
neighbouring ranks. The first answer that says a worker is gone ends the engine.
"""

from __future__ import annotations

import os
import socket
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.errors import CapacityError, ConfigError, WorkerError
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.engine.failures import exception_of, failure_of, is_expected
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.messages import (
    decode_grammar,
    decode_result,
    decode_step,
    encode_grammar,
    encode_result,
    encode_step,
)
from vllm.v1.outputs import ModelRunnerOutput, PendingModelRunnerOutput

__all__ = ["RayDistributedExecutor", "RayWorker"]

logger = init_logger(__name__)

_PLACEMENT_SECONDS = 120
_HEALTH_SECONDS = 2.0
# How workers of other processes may be set up: what users set for this engine.
_PASSED_ON = (
    "VLLM_", "GLOO_", "NCCL_", "NVSHMEM_", "TORCH_SYMM_MEM_", "OMP_", "HF_", "TRITON_",
    "PYTHONPATH", "PYTHONHASHSEED",
)  # fmt: skip


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "--distributed-executor-backend ray needs Ray: pip install ray",
            parameter="distributed_executor_backend",
            value="ray",
        ) from None
    return ray


class RayWorker:
    """The body of an actor: a worker, told what to do by method calls that Ray keeps in order."""

    def __init__(self) -> None:
        self._worker: Any = None
        self._launched: deque[PendingModelRunnerOutput] = deque()

    def place(self) -> tuple[str, str]:
        """Node and address of this actor."""
        import ray

        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def free_port(self) -> int:
        with socket.socket() as sock:
            sock.bind(("", 0))
            return sock.getsockname()[1]

    def start(self, vllm_config: VllmConfig, rank: int, local_rank: int, method: str) -> None:
        """Make the worker that this actor is for."""
        from vllm.plugins import load_general_plugins
        from vllm.v1.executor.uniproc_executor import resolve_worker_class

        current_platform.prepare_environment()
        load_general_plugins()
        self._worker = resolve_worker_class(vllm_config)(
            vllm_config,
            local_rank=local_rank,
            rank=rank,
            distributed_init_method=method,
            is_driver_worker=rank == 0,
        )

    def call(self, method: str | Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """``(value, None)``, or ``(None, failure)`` where the worker raised."""
        try:
            if isinstance(method, str):
                return getattr(self._worker, method)(*args, **kwargs), None
            return method(self._worker, *args, **kwargs), None
        except Exception as error:  # noqa: BLE001 - the engine raises it again
            if not is_expected(error):
                logger.error("%s failed:\n%s", method, traceback.format_exc().rstrip())
            return None, failure_of(error)

    def execute(self, step: bytes) -> bytes | None:
        """Run a step; its result, or None where sampling or the device is still to come."""
        return self._finish(self._worker.execute_model(decode_step(step)))

    def sample(self, grammar: bytes) -> bytes | None:
        return self._finish(self._worker.sample_tokens(decode_grammar(grammar)))

    def take_result(self) -> bytes:
        """The result of the oldest step that the device was still running."""
        return encode_result(self._launched.popleft().result())

    def _finish(self, output: ModelRunnerOutput | PendingModelRunnerOutput | None) -> bytes | None:
        if isinstance(output, PendingModelRunnerOutput):
            self._launched.append(output)
            return None
        return None if output is None else encode_result(output)

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()


class _Awaited(PendingModelRunnerOutput):
    """The result of a step that actors are running."""

    __slots__ = ("_executor", "_refs")

    def __init__(self, executor: RayDistributedExecutor, refs: list[Any]) -> None:
        self._executor = executor
        self._refs = refs

    def result(self) -> ModelRunnerOutput:
        return self._executor.result_of(self._refs)


class RayDistributedExecutor(Executor):
    """Calls the same method of all actors; results of steps come from the first.

    Raises:
        ConfigError: Ray is not installed.
        CapacityError: the cluster has not the devices for all workers.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__(vllm_config)
        self._ray = ray = _import_ray()
        self._overlaps = vllm_config.scheduler_config.async_scheduling
        self._on_failure: Callable[[Exception], None] | None = None
        self._failure: WorkerError | None = None
        self._closed = threading.Event()
        self._owns_ray = not ray.is_initialized()
        self._workers: list[Any] = []
        self._group: Any = None
        if self._owns_ray:
            self._join_cluster()
        try:
            self._place_workers(vllm_config.parallel_config.world_size)
            self._start_workers()
        except BaseException:
            self.shutdown()
            raise
        self._gathers = vllm_config.kv_transfer_config is not None
        self._watcher = threading.Thread(target=self._watch, name="ray-watch", daemon=True)
        self._watcher.start()

    # Start

    def _join_cluster(self) -> None:
        options = {"logging_level": "warning", "log_to_driver": True}
        try:
            self._ray.init(address="auto", **options)
        except ConnectionError:
            logger.info("No Ray cluster runs here: starting one on this host")
            self._ray.init(address="local", include_dashboard=False, **options)

    def _place_workers(self, count: int) -> None:
        """One actor for each bundle of a placement group, in the order of nodes."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        ray = self._ray
        device = current_platform.ray_device_key
        bundle = {device: 1.0, "CPU": 1.0} if device else {"CPU": 1.0}
        available = ray.cluster_resources()
        for resource, amount in bundle.items():
            if available.get(resource, 0) < amount * count:
                raise CapacityError(
                    f"{count} workers need {amount * count:g} {resource} of the Ray cluster, which "
                    f"has {available.get(resource, 0):g}: lower --tensor-parallel-size, or add "
                    "nodes"
                )
        self._group = placement_group([bundle] * count, strategy="PACK")
        if not self._group.wait(_PLACEMENT_SECONDS):
            raise CapacityError(
                f"the Ray cluster found no room for {count} workers in {_PLACEMENT_SECONDS} s: "
                "others hold its devices"
            )
        env = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
        actor_class = ray.remote(RayWorker)
        options = {"num_cpus": 1, "num_gpus": 1 if device == "GPU" else 0}
        workers = [
            actor_class.options(
                **options,
                runtime_env={"env_vars": env},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=index
                ),
            ).remote()
            for index in range(count)
        ]
        places = self._get([worker.place.remote() for worker in workers])
        # The first worker's node leads; those of a node follow each other.
        nodes = list(dict.fromkeys(node for node, _ in places))
        order = sorted(range(count), key=lambda index: nodes.index(places[index][0]))
        self._workers = [workers[index] for index in order]
        self._nodes = [places[index][0] for index in order]
        self._leader = places[order[0]][1]

    def _start_workers(self) -> None:
        port = self._get([self._workers[0].free_port.remote()])[0]
        host = f"[{self._leader}]" if ":" in self._leader else self._leader
        method = f"tcp://{host}:{port}"
        starts = []
        for rank, (worker, node) in enumerate(zip(self._workers, self._nodes, strict=True)):
            # Ray shows an actor its own GPU only, as number 0.
            local_rank = 0 if current_platform.ray_device_key else self._nodes[:rank].count(node)
            starts.append(worker.start.remote(self.vllm_config, rank, local_rank, method))
        self._get(starts)

    # Failures

    def register_failure_callback(self, callback: Callable[[Exception], None]) -> None:
        self._on_failure = callback

    def _watch(self) -> None:
        """Thread: asks now and then whether the actors live; a queue of steps does not matter."""
        ray = self._ray
        while not self._closed.wait(_HEALTH_SECONDS):
            try:
                ray.get([worker.__ray_ready__.remote() for worker in self._workers])
            except ray.exceptions.RayError as error:
                if not self._closed.is_set():
                    failure = self._fail(error)
                    if self._on_failure is not None:
                        self._on_failure(failure)
                return

    def _fail(self, error: Exception) -> WorkerError:
        if self._failure is None:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self._failure = WorkerError(f"a Ray worker has failed: {lines[-1] if lines else error}")
        return self._failure

    def _get(self, refs: list[Any]) -> list[Any]:
        """The answers of all; the first worker that fails or dies ends the waiting."""
        if self._failure is not None:
            raise self._failure
        waiting = list(refs)
        try:
            while waiting:
                done, waiting = self._ray.wait(waiting, num_returns=1)
                self._ray.get(done)
            return self._ray.get(refs)
        except self._ray.exceptions.RayError as error:
            raise self._fail(error) from None

    def check_health(self) -> None:
        self.collective_rpc("check_health")

    # Calls and steps

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
    ) -> list[Any]:
        refs = [worker.call.remote(method, args, kwargs or {}) for worker in self._workers]
        if timeout is not None:
            _, late = self._ray.wait(refs, num_returns=len(refs), timeout=timeout)
            if late:
                name = getattr(method, "__name__", method)
                raise TimeoutError(
                    f"{name}: no answer within {timeout:g} s from {len(late)} of {len(refs)} "
                    "workers"
                )
        answers = self._get(refs)
        for rank, (_, failure) in enumerate(answers):
            if failure is not None:
                raise exception_of(failure, WorkerError(f"worker {rank}: {failure}"))
        return [value for value, _ in answers]

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        answers = self._get(
            [
                worker.call.remote("initialize_from_config", (config,), {})
                for worker, config in zip(self._workers, kv_cache_configs, strict=True)
            ]
        )
        for _, failure in answers:
            if failure is not None:
                raise exception_of(failure, WorkerError(str(failure)))

    def execute_model(
        self, scheduler_output: SchedulerOutput
    ) -> ModelRunnerOutput | PendingModelRunnerOutput | None:
        step = self._ray.put(encode_step(scheduler_output))
        refs = [worker.execute.remote(step) for worker in self._workers]
        if scheduler_output.has_structured_output_requests:
            return None
        return self._step_output(refs)

    def sample_tokens(
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | PendingModelRunnerOutput:
        grammar = encode_grammar(grammar_output)
        return self._step_output([worker.sample.remote(grammar) for worker in self._workers])

    def _step_output(self, refs: list[Any]) -> ModelRunnerOutput | PendingModelRunnerOutput:
        return _Awaited(self, refs) if self._overlaps else self.result_of(refs)

    def result_of(self, refs: list[Any]) -> ModelRunnerOutput:
        """What the step behind ``refs`` has computed; steps are asked for in order."""
        results = self._get(refs)
        late = [rank for rank, result in enumerate(results) if result is None]
        taken = self._get([self._workers[rank].take_result.remote() for rank in late])
        for rank, result in zip(late, taken, strict=True):
            results[rank] = result
        if not self._gathers:
            return decode_result(results[0])
        assert self.kv_output_aggregator is not None, "nobody joins what workers' connectors say"
        return self.kv_output_aggregator.aggregate([decode_result(result) for result in results])

    # The end

    def shutdown(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        ray = self._ray
        if not ray.is_initialized():
            return
        if self._failure is None and self._workers:
            stops = [worker.stop.remote() for worker in self._workers]
            ray.wait(stops, num_returns=len(stops), timeout=5)
        for worker in self._workers:
            ray.kill(worker)
        if self._group is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(self._group)
        if self._owns_ray:
            ray.shutdown()
