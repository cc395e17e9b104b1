"""The engine core: scheduler and executor, and one step of their work at a time.

Knows nothing of text, tokenizers, sockets or threads; ``core_proc`` gives it a process,
``core_client`` calls it in place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
)
from vllm.errors import EngineGenerateError, VLLMError, VLLMValidationError
from vllm.logger import init_logger
from vllm.utils.import_utils import import_class
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineFacts,
    FinishReason,
    UtilityOutput,
)
from vllm.v1.engine.kv_events import make_kv_events
from vllm.v1.engine.phases import StartupPhases
from vllm.v1.engine.stepping import make_stepping
from vllm.v1.engine.tokenizer import tokenizer_from_config
from vllm.v1.executor.abstract import Executor
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

__all__ = ["SLEEP_TAGS", "EngineCore"]

logger = init_logger(__name__)

SLEEP_TAGS = ("weights", "kv_cache", "scheduling")
"""What a wake-up may bring back by itself; the last is implied once the others are there."""
_ASLEEP_AT = {0: ("scheduling",), 1: SLEEP_TAGS, 2: SLEEP_TAGS}


class EngineCore:
    """Runs requests. Not thread-safe, but for ``preprocess``.

    Raises:
        VLLMValidationError, VLLMError: what the options, the model or the memory do not allow.
    """

    UTILITIES = frozenset(
        {
            "abort_all",
            "check_health",
            "check_integrity",
            "collective_rpc",
            "get_request_counts",
            "is_paused",
            "is_sleeping",
            "pause",
            "reset_prefix_cache",
            "resume",
            "sleep",
            "wake_up",
        }
    )
    """Methods that a front end may call by name."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        executor_class: type[Executor],
        *,
        log_stats: bool = True,
        phases: StartupPhases | None = None,
    ) -> None:
        from vllm.plugins import load_general_plugins

        phases = phases or StartupPhases(logger)
        load_general_plugins()
        self.vllm_config = vllm_config
        self._paused = False
        self._asleep: set[str] = set()
        """Of ``SLEEP_TAGS``: what a wake-up has to bring back."""
        self._sleep_level = 0
        self._unscheduled: dict[int, list[EngineCoreOutput]] = {}
        """Outputs that no step makes: refusals and mass aborts, by client."""
        self.executor = executor_class(vllm_config)
        try:
            self._start(phases, log_stats)
        except BaseException:
            # The caller may go on without an engine, and nobody else knows of its workers.
            self.executor.shutdown()
            raise

    def _start(self, phases: StartupPhases, log_stats: bool) -> None:
        vllm_config = self.vllm_config
        with phases.phase("preparing the device"):
            self.executor.init_device()
        with phases.phase("loading the model"):
            self.executor.load_model()
        with phases.phase("planning and allocating the KV cache"):
            kv_cache_config = self._initialize_kv_cache()
        with phases.phase("warming up"):
            self.executor.compile_or_warm_up_model()
        self.structured_output_manager = StructuredOutputManager(
            vllm_config, lambda: tokenizer_from_config(vllm_config.model_config)
        )
        scheduler_path = vllm_config.scheduler_config.scheduler_cls
        scheduler_class = (
            import_class(scheduler_path, "--scheduler-cls") if scheduler_path else Scheduler
        )
        self.scheduler = scheduler_class(
            vllm_config,
            kv_cache_config,
            self.structured_output_manager,
            block_size=self._block_size(kv_cache_config),
            log_stats=log_stats,
            connector=self._make_connector(kv_cache_config),
        )
        self._kv_events = make_kv_events(vllm_config, kv_cache_config)
        self._stepping = make_stepping(
            self.scheduler,
            self.executor,
            overlapped=vllm_config.scheduler_config.async_scheduling,
        )
        self._block_hasher = self.scheduler.block_hasher
        self.facts = self._facts(kv_cache_config, phases)

    def _initialize_kv_cache(self) -> Any:
        from vllm.distributed.kv_transfer.movement import cache_movement
        from vllm.v1.kv_cache.planner import get_kv_cache_configs
        from vllm.v1.kv_cache.published import publish_layout

        specs = self.executor.get_kv_cache_specs()
        memory = self.executor.determine_available_memory()
        constraints = self.executor.get_kv_cache_constraints()
        movement = cache_movement(self.vllm_config)
        configs = get_kv_cache_configs(self.vllm_config, specs, memory, constraints, movement)
        publish_layout(configs[0].kv_cache_layout, self.vllm_config.instance_id, self)
        self.executor.initialize_from_config(configs)
        return configs[0]

    def _make_connector(self, kv_cache_config: Any) -> KVConnectorBase_V1 | None:
        """The scheduler half of the configured connector, introduced to its worker halves."""
        transfer = self.vllm_config.kv_transfer_config
        if transfer is None or transfer.kv_connector is None:
            return None
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        connector = KVConnectorFactory.create_connector(
            self.vllm_config, KVConnectorRole.SCHEDULER, kv_cache_config
        )
        self.executor.init_kv_output_aggregator(connector)
        answers = self.executor.get_kv_connector_handshake_metadata()
        metadata = dict(answer for answer in answers if answer is not None)
        if metadata:
            connector.set_xfer_handshake_metadata_pp_aware(metadata)
        return connector

    # Requests

    def preprocess(self, request: EngineCoreRequest) -> Request:
        """The scheduler's form of ``request``, its blocks hashed; any thread may call this."""
        return Request.from_engine_core_request(request, self._block_hasher)

    def add_request(self, request: Request) -> None:
        """Queue a request; one that is refused is answered by the next step with an error."""
        try:
            self.scheduler.add_request(request)
        except (VLLMError, VLLMValidationError) as error:
            self.reject(request.client_index, request.request_id, error)

    def reject(self, client_index: int, request_id: str, error: Exception) -> None:
        """Answer a request with ``error``; no others are touched."""
        self._answer(
            client_index,
            EngineCoreOutput(
                request_id,
                [],
                finish_reason=FinishReason.ERROR,
                error=str(error),
                error_type=type(error).__name__,
            ),
        )

    def _answer(self, client_index: int, output: EngineCoreOutput) -> None:
        """Send ``output`` with the next step's."""
        self._unscheduled.setdefault(client_index, []).append(output)

    def abort_requests(self, request_ids: list[str]) -> None:
        """Drop requests without an answer; unknown ids are left out."""
        self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    # Steps

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return (
            bool(self._unscheduled)
            or self._stepping.in_flight
            or (not self._halted and self.scheduler.has_requests())
        )

    def step(self) -> tuple[dict[int, EngineCoreOutputs], bool]:
        """One step; returns outputs by client, and whether anything was done.

        Nothing was where all requests wait for something that a thread prepares: the caller
        should leave that thread some time.
        """
        outputs: dict[int, EngineCoreOutputs] = {}
        made_progress = False
        if not self._halted and self.scheduler.has_requests():
            outputs, made_progress = self._stepping.step()
        elif self._stepping.in_flight:
            outputs = self._stepping.drain()
        self._kv_events.publish(self.scheduler)
        if self._unscheduled:
            for client_index, answers in self._unscheduled.items():
                outputs.setdefault(client_index, EngineCoreOutputs()).outputs.extend(answers)
            self._unscheduled = {}
            first = next(iter(outputs.values()))
            if self._halted and first.scheduler_stats is None:
                # No step follows that would say how many requests are left.
                first.scheduler_stats = self.scheduler.make_stats()
        return outputs, made_progress or any(part.outputs for part in outputs.values())

    def on_idle(self) -> None:
        """Called when nothing is left to do: in debug mode the pool must add up."""
        if envs.VLLM_KV_CACHE_DEBUG:
            self.scheduler.check_integrity()

    # Utilities

    def call_utility(self, call_id: int, method: str, args: list[Any]) -> UtilityOutput:
        """Call one of ``UTILITIES``; what a user can correct comes back as a message."""
        if method not in self.UTILITIES:
            return UtilityOutput(call_id, f"the engine has no utility {method!r}")
        call: Callable[..., Any] = getattr(self, method)
        try:
            return UtilityOutput(call_id, None, call(*args))
        except EngineGenerateError as error:
            return UtilityOutput(call_id, str(error))
        except (
            VLLMError,
            VLLMValidationError,
            TimeoutError,
            TypeError,
            AttributeError,
        ) as error:
            return UtilityOutput(call_id, f"{type(error).__name__}: {error}")

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False where running requests still hold blocks."""
        done = self.scheduler.reset_prefix_cache()
        self._kv_events.publish(self.scheduler)
        return done

    def abort_all(self) -> int:
        """End every request of every client, each with an answer; returns how many."""
        requests = list(self.scheduler.requests.values())
        for request in requests:
            output = EngineCoreOutput(request.request_id, [], finish_reason=FinishReason.ABORT)
            self._answer(request.client_index, output)
        self.abort_requests([request.request_id for request in requests])
        return len(requests)

    def get_request_counts(self) -> tuple[int, int]:
        """How many requests run and how many wait."""
        return self.scheduler.get_request_counts()

    def pause(self) -> None:
        """Take requests in but run no step until ``resume``."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def is_paused(self) -> bool:
        return self._paused

    @property
    def _halted(self) -> bool:
        return self._paused or bool(self._asleep)

    def sleep(self, level: int = 1) -> int:
        """End all requests, forget cached prefixes, and give memory back until ``wake_up``.

        Requests that come meanwhile wait. An engine that sleeps at this level or a deeper one
        goes on sleeping; returns the level at which it sleeps now.

        Args:
            level: 0 gives nothing back; 1 the KV cache's memory (and a GPU's copy of the
                weights); 2 the weights' as well.

        Raises:
            VLLMValidationError: no such level, the engine was started without sleep mode, or it
                has to be woken first: it sleeps at level 1 and 2 is asked for, or has a part of
                its memory back.
            VLLMError: blocks are still being sent elsewhere; try again.
        """
        if level not in _ASLEEP_AT:
            raise VLLMValidationError(
                f"level must be 0, 1 or 2, not {level!r}", parameter="level", value=level
            )
        if not self.vllm_config.model_config.enable_sleep_mode:
            raise VLLMValidationError(
                "sleep needs an engine started with --enable-sleep-mode",
                parameter="enable_sleep_mode",
            )
        if self._asleep and self._sleep_level > 0:
            if self._asleep != set(SLEEP_TAGS) or level > self._sleep_level:
                raise VLLMValidationError(
                    f"the engine sleeps at level {self._sleep_level} and lacks "
                    f"{', '.join(sorted(self._asleep))}: call wake_up before sleep at level "
                    f"{level}",
                    parameter="level",
                    value=level,
                )
            return self._sleep_level
        self.abort_all()
        for client_index, outputs in self._stepping.drain().items():
            self._unscheduled.setdefault(client_index, []).extend(outputs.outputs)
        if level > 0:
            if not self.reset_prefix_cache():
                raise VLLMError("blocks of the KV cache are still in use by transfers; try again")
            if level == 2:
                # What was stored outside belongs to weights that need not come back.
                self.scheduler.kv_transfer.connector.reset_cache()
            self.executor.sleep(level)
        self._asleep = set(_ASLEEP_AT[level])
        self._sleep_level = level
        return level

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Bring back ``tags`` ("weights", "kv_cache", "scheduling"), by default all; requests run
        again once nothing is missing.

        Raises:
            VLLMValidationError: an unknown tag.
        """
        unknown = set(tags or ()) - set(SLEEP_TAGS)
        if unknown:
            raise VLLMValidationError(
                f"tags must be among {', '.join(SLEEP_TAGS)}, not {', '.join(sorted(unknown))}",
                parameter="tags",
            )
        missing = self._asleep if tags is None else self._asleep & set(tags)
        memory = sorted(missing - {"scheduling"}, reverse=True)
        if memory:
            self.executor.wake_up(memory)
        self._asleep = self._asleep - missing
        if memory and self._asleep == {"scheduling"}:
            self._asleep = set()

    def is_sleeping(self) -> bool:
        return bool(self._asleep)

    def check_health(self) -> None:
        self.executor.check_health()

    def check_integrity(self) -> None:
        self.scheduler.check_integrity()

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Call a public method of every worker by name; see ``Executor.collective_rpc``."""
        if isinstance(method, str) and method.startswith("_"):
            raise VLLMValidationError(f"{method} is not a public method of the worker")
        try:
            return self.executor.collective_rpc(method, tuple(args), kwargs, timeout)
        except (VLLMError, VLLMValidationError, TimeoutError, TypeError, AttributeError):
            raise
        except Exception as error:
            # Methods may be anybody's: whatever one raises ends its call alone.
            logger.exception("collective_rpc: %s has failed", method)
            raise EngineGenerateError(f"{type(error).__name__}: {error}") from error

    def shutdown(self) -> None:
        self.structured_output_manager.shutdown()
        self.scheduler.shutdown()
        self._kv_events.shutdown()
        self.executor.shutdown()

    # Facts

    def _block_size(self, kv_cache_config: Any) -> int:
        return kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size

    def _facts(self, kv_cache_config: Any, phases: StartupPhases) -> EngineFacts:
        from vllm.v1.kv_cache.explain import build_report, summarize

        report = build_report(kv_cache_config, self.vllm_config)
        facts = EngineFacts(
            num_gpu_blocks=report.num_blocks,
            block_size=self._block_size(kv_cache_config),
            kv_cache_layout=report.layout,
            kv_cache_memory_bytes=report.pool_bytes,
            kv_cache_size_tokens=report.num_tokens,
            kv_cache_max_concurrency=report.max_concurrency,
            num_kv_cache_groups=len(kv_cache_config.kv_cache_groups),
            startup_seconds=dict(phases.seconds),
        )
        for line in summarize(report):
            logger.info("%s", line)
        return facts
