"""The synchronous front end: requests in, ``RequestOutput`` out of ``step``.

``LLM`` drives it. Owns the input and output processors and a client; knows no scheduler.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import vllm.envs as envs
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import PromptType
from vllm.logger import init_logger
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core_client import (
    EngineCoreClient,
    InprocClient,
    SyncMPClient,
    rpc_arguments,
)
from vllm.v1.engine.input_processor import InputProcessor, TokenizedPrompt
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.engine.phases import StartupPhases
from vllm.v1.engine.startup import StartedEngine, start_in_process, start_process
from vllm.v1.kv_cache.published import publish_layout
from vllm.v1.metrics.prometheus import PrometheusStatLogger
from vllm.v1.metrics.stats import IterationStats

__all__ = ["LLMEngine"]

logger = init_logger(__name__)


class LLMEngine:
    """One engine and the requests that this thread has given it."""

    def __init__(self, engine: StartedEngine, *, log_stats: bool = True) -> None:
        self.vllm_config = engine.vllm_config
        self.model_config = engine.vllm_config.model_config
        self.tokenizer = engine.tokenizer
        self.client: EngineCoreClient = engine.client
        self.input_processor = InputProcessor(self.vllm_config, self.tokenizer)
        self.output_processor = OutputProcessor(
            self.tokenizer, stream_interval=self.vllm_config.scheduler_config.stream_interval
        )
        self.stat_logger = (
            PrometheusStatLogger(self.vllm_config, self.client.facts) if log_stats else None
        )
        publish_layout(self.client.facts.kv_cache_layout, self.vllm_config.instance_id, self)
        self._ids = itertools.count()

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLMEngine":
        """Start an engine: in its own process, or in this one where
        VLLM_ENABLE_V1_MULTIPROCESSING=0.

        Raises:
            VLLMValidationError, VLLMError, ValueError, OSError: why it cannot start.
        """
        phases = StartupPhases(logger)
        log_stats = not engine_args.disable_log_stats
        make_config = engine_args.create_engine_config
        if envs.VLLM_ENABLE_V1_MULTIPROCESSING:
            engine = start_process(make_config, SyncMPClient, log_stats=log_stats, phases=phases)
        else:
            engine = start_in_process(make_config, log_stats=log_stats, phases=phases)
        return cls(engine, log_stats=log_stats)

    def add_request(
        self,
        request_id: str,
        prompt: PromptType | TokenizedPrompt,
        params: SamplingParams,
        *,
        arrival_time: float | None = None,
        priority: int = 0,
    ) -> None:
        """Queue a request.

        Raises:
            VLLMValidationError: the request cannot run; nothing was queued.
        """
        engine_id = f"{request_id}-{next(self._ids):x}"
        request, text = self.input_processor.process(
            engine_id, prompt, params, arrival_time=arrival_time, priority=priority
        )
        if params.n == 1:
            self.output_processor.add_request(request_id, request, text)
            self.client.add_request(request)
            return
        parent = ParentRequest(engine_id, request.sampling_params)
        for index in range(params.n):
            child = parent.child_request(request, index)
            self.output_processor.add_request(request_id, child, text, parent=parent, index=index)
            self.client.add_request(child)

    def abort_request(self, request_ids: Iterable[str]) -> None:
        """Drop requests by the ids they were added with; unknown ones are left out."""
        stats = IterationStats()
        engine_ids = self.output_processor.engine_ids_of(request_ids)
        known, _ = self.output_processor.abort_requests(engine_ids, stats)
        if self.stat_logger is not None:
            self.stat_logger.record(None, stats)
        self.client.abort_requests(known)

    def step(self) -> list[RequestOutput]:
        """Wait for the engine's next outputs.

        Raises:
            EngineDeadError: the engine has ended.
            VLLMError, VLLMValidationError: a request failed inside the engine; the others go on.
        """
        outputs = self.client.get_output()
        stats = IterationStats()
        processed = self.output_processor.process_outputs(outputs.outputs, outputs.timestamp, stats)
        if self.stat_logger is not None:
            self.stat_logger.record(outputs.scheduler_stats, stats)
        self.client.abort_requests(processed.reqs_to_abort)
        for error in processed.errors.values():
            raise error
        return processed.request_outputs

    def has_unfinished_requests(self) -> bool:
        return self.output_processor.has_unfinished_requests()

    def get_num_unfinished_requests(self) -> int:
        return len(self.output_processor)

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def reset_prefix_cache(self) -> bool:
        return self.client.call_utility("reset_prefix_cache")

    def sleep(self, level: int = 1) -> None:
        """See ``EngineCore.sleep``."""
        level = self.client.call_utility("sleep", level)
        if self.stat_logger is not None:
            self.stat_logger.record_sleep_state(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """See ``EngineCore.wake_up``."""
        self.client.call_utility("wake_up", tags)
        if self.stat_logger is not None and not self.is_sleeping():
            self.stat_logger.record_sleep_state(None)

    def is_sleeping(self) -> bool:
        return self.client.call_utility("is_sleeping")

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Call a method of every worker, and give back the answers in the order of ranks.

        Args:
            method: name of a public method of the worker (``--worker-cls``). Where the engine runs
                in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), a function of the worker, too.
            timeout: seconds to wait for workers that are processes of their own.
            args, kwargs: plain data, as answers must be.

        Raises:
            VLLMValidationError: a function that cannot reach the engine, or no such timeout.
            EngineGenerateError: the call has failed, or a worker has not answered in time.
        """
        in_process = isinstance(self.client, InprocClient)
        call = rpc_arguments(method, timeout, args, kwargs, takes_functions=in_process)
        return self.client.call_utility("collective_rpc", *call)

    def shutdown(self, timeout: float = 5.0) -> None:
        """End the engine; may be called twice."""
        self.client.shutdown(timeout)
