"""``AsyncLLM``: the front end of a server, in one event loop. Imports no torch.

Tokenises and detokenises here; the engine runs in its own process. Outputs are read in a
callback of the loop and put in one queue per request.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import Any

import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.errors import ConfigError, EngineDeadError, UnsupportedError, VLLMValidationError
from vllm.inputs import PromptType
from vllm.logger import init_logger
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutputs, EngineFacts
from vllm.v1.engine.core_client import AsyncMPClient, rpc_arguments
from vllm.v1.engine.input_processor import InputProcessor, TokenizedPrompt
from vllm.v1.engine.output_processor import OutputProcessor, OutputQueue
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.engine.phases import StartupPhases
from vllm.v1.engine.startup import StartedEngine, start_process
from vllm.v1.kv_cache.published import publish_layout
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.stats import IterationStats

__all__ = ["AsyncLLM", "AsyncLLMEngine"]

logger = init_logger(__name__)


class AsyncLLM:
    """An engine process and the requests of one event loop; make it with a ``from_`` method.

    ``errored`` and ``dead_error`` tell whether and why the engine is gone; from then on every
    request, in flight or new, raises ``EngineDeadError``.
    """

    def __init__(
        self, engine: StartedEngine, *, log_requests: bool = False, log_stats: bool = True
    ) -> None:
        self.vllm_config = engine.vllm_config
        self.model_config = engine.vllm_config.model_config
        self.tokenizer = engine.tokenizer
        self.client: AsyncMPClient = engine.client
        self.log_requests = log_requests
        self.log_stats = log_stats
        self.input_processor = InputProcessor(self.vllm_config, self.tokenizer)
        self.output_processor = OutputProcessor(
            self.tokenizer, stream_interval=self.vllm_config.scheduler_config.stream_interval
        )
        self.client.set_callbacks(self._on_outputs, self._on_death)
        self.stat_loggers = StatLoggerManager(self.vllm_config, self.client.facts, log=log_stats)
        publish_layout(self.client.facts.kv_cache_layout, self.vllm_config.instance_id, self)
        self._ids = itertools.count()
        index = self.client.client_index
        self._id_mark = f"{index}." if index else ""
        """Two front ends of one engine may be asked for the same id."""
        self._stats_task: asyncio.Task[None] | None = None
        self._closed = False

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **kwargs: Any) -> "AsyncLLM":
        """Start an engine; its process imports while the configuration is resolved here.

        Raises:
            VLLMValidationError, VLLMError, ValueError, OSError: why it cannot start.
        """
        kwargs.setdefault("log_requests", getattr(engine_args, "enable_log_requests", False))
        kwargs.setdefault("log_stats", not engine_args.disable_log_stats)
        return cls._start(engine_args.create_engine_config, **kwargs)

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig, **kwargs: Any) -> "AsyncLLM":
        """Start an engine with a configuration that is at hand; raises as the other does."""
        kwargs.setdefault("log_stats", not vllm_config.observability_config.disable_log_stats)
        return cls._start(lambda: vllm_config, **kwargs)

    @classmethod
    def _start(cls, make_config: Callable[[], VllmConfig], **kwargs: Any) -> "AsyncLLM":
        if not envs.VLLM_ENABLE_V1_MULTIPROCESSING:
            raise ConfigError(
                "VLLM_ENABLE_V1_MULTIPROCESSING=0 works with LLM only: a server's engine needs "
                "its own process",
                parameter="VLLM_ENABLE_V1_MULTIPROCESSING",
            )
        engine = start_process(
            make_config, AsyncMPClient, log_stats=True, phases=StartupPhases(logger)
        )
        return cls(engine, **kwargs)

    # Facts

    @property
    def facts(self) -> EngineFacts:
        """Cache sizes, layout and start-up times."""
        return self.client.facts

    @property
    def dead_error(self) -> EngineDeadError | None:
        return self.client.dead_error

    @property
    def errored(self) -> bool:
        return self.client.dead_error is not None

    @property
    def is_running(self) -> bool:
        return not self.errored

    @property
    def is_stopped(self) -> bool:
        return self.errored

    def get_tokenizer(self) -> Any:
        """None with ``--skip-tokenizer-init``."""
        return self.tokenizer

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def get_num_unfinished_requests(self) -> int:
        """Sequences in flight; a request with ``n`` counts n times."""
        return len(self.output_processor)

    def tokenize(
        self, prompt: PromptType, params: SamplingParams | None = None, **kwargs: Any
    ) -> TokenizedPrompt:
        """Token ids of a prompt in any form; the result is a prompt that ``generate`` takes."""
        return self.input_processor.tokenize(prompt, params, **kwargs)

    # Requests

    async def generate(
        self,
        prompt: PromptType | TokenizedPrompt,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        kv_transfer_params: dict[str, Any] | None = None,
        arrival_time: float | None = None,
        lora_request: Any = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request, as ``sampling_params.output_kind`` says.

        A consumer that falls behind gets several steps in one output. Leaving the generator
        before its end aborts the request. Two requests may have the same ``request_id``.

        Raises:
            VLLMValidationError: the request cannot run.
            QueueFullError: too many requests wait.
            EngineGenerateError: the engine failed on this request.
            EngineDeadError: the engine has ended.
        """
        if lora_request is not None:
            raise UnsupportedError(
                "lora_request is not supported by this engine yet", parameter="lora_request"
            )
        self._begin()
        queue = OutputQueue(sampling_params.output_kind)
        engine_ids: list[str] = []
        finished = False
        try:
            request, text = self.input_processor.process(
                f"{request_id}-{self._id_mark}{next(self._ids):x}",
                prompt,
                sampling_params,
                arrival_time=arrival_time,
                priority=priority,
                cache_salt=cache_salt,
                kv_transfer_params=kv_transfer_params,
            )
            request.client_index = self.client.client_index
            self._add(request_id, request, text, queue, engine_ids)
            while not finished:
                output = await queue.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                self._abort(engine_ids)

    def _begin(self) -> None:
        """Be attached to the running loop, with an engine that lives."""
        if self.dead_error is not None:
            raise self.dead_error
        self.client.attach()
        interval = envs.VLLM_LOG_STATS_INTERVAL
        if self._stats_task is None and self.log_stats and interval > 0:
            self._stats_task = asyncio.create_task(self._log_stats_every(interval))

    def _add(
        self,
        request_id: str,
        request: Any,
        text: str | None,
        queue: OutputQueue,
        engine_ids: list[str],
    ) -> None:
        """Send a request, all its sequences; their engine ids go to ``engine_ids``."""
        params = request.sampling_params
        if self.log_requests:
            logger.info(
                "Request %s: %d prompt tokens, %s",
                request_id,
                len(request.prompt_token_ids),
                params,
            )
        if params.n == 1:
            engine_ids.append(request.request_id)
            self.output_processor.add_request(request_id, request, text, queue=queue)
            self.client.add_request(request)
            return
        parent = ParentRequest(request.request_id, params)
        for index in range(params.n):
            child = parent.child_request(request, index)
            engine_ids.append(child.request_id)
            self.output_processor.add_request(
                request_id, child, text, parent=parent, index=index, queue=queue
            )
            self.client.add_request(child)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests; their generators give a last output with ``finish_reason`` "abort"."""
        request_ids = [request_id] if isinstance(request_id, str) else request_id
        self._abort(self.output_processor.engine_ids_of(request_ids))

    def _abort(self, engine_ids: list[str]) -> None:
        stats = IterationStats()
        known, _ = self.output_processor.abort_requests(engine_ids, stats)
        self.stat_loggers.record(None, stats)
        self.client.abort_requests(known)

    def _on_outputs(self, outputs: EngineCoreOutputs) -> None:
        stats = IterationStats()
        processed = self.output_processor.process_outputs(outputs.outputs, outputs.timestamp, stats)
        self.client.abort_requests(processed.reqs_to_abort)
        self.stat_loggers.record(outputs.scheduler_stats, stats)

    def _on_death(self, error: EngineDeadError) -> None:
        if not self._closed:
            logger.error("%s", error)
        self.output_processor.fail_all(error)

    async def wait_for_requests_to_drain(self, timeout: float | None = None) -> bool:
        """Wait until nothing is in flight; False if that took longer than ``timeout`` seconds."""
        try:
            await asyncio.wait_for(self.output_processor.wait_until_idle(), timeout)
        except TimeoutError:
            return False
        return True

    # The engine

    async def check_health(self) -> None:
        """Raises EngineDeadError if the engine is gone."""
        if self.dead_error is not None:
            raise self.dead_error

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False where running requests still hold blocks."""
        return await self.client.call_utility("reset_prefix_cache")

    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        """Let new requests wait until ``resume_generation``.

        Args:
            mode: what becomes of those in flight: "abort" ends them, "wait" lets them end first
                (new ones too, until none is left), "keep" holds them.
            clear_cache: forget cached prefixes, where no request is left that holds blocks.

        Raises:
            VLLMValidationError: an unknown mode.
        """
        if mode not in ("abort", "wait", "keep"):
            raise VLLMValidationError(
                f"mode must be abort, wait or keep, not {mode!r}", parameter="mode", value=mode
            )
        if mode == "wait":
            await self.output_processor.wait_until_idle()
        await self.client.call_utility("pause")
        if mode == "abort":
            await self.client.call_utility("abort_all")
        if clear_cache and mode != "keep":
            await self.client.call_utility("reset_prefix_cache")

    async def resume_generation(self) -> None:
        await self.client.call_utility("resume")

    async def is_paused(self) -> bool:
        return await self.client.call_utility("is_paused")

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Give memory back until ``wake_up``; new requests wait. See ``EngineCore.sleep``.

        Args:
            mode: what becomes of requests in flight: "abort" ends them, "wait" lets them end first.

        Raises:
            VLLMValidationError: an unknown mode.
            EngineGenerateError: no such level, or an engine without sleep mode.
        """
        if mode not in ("abort", "wait"):
            raise VLLMValidationError(
                f"mode must be abort or wait, not {mode!r}", parameter="mode", value=mode
            )
        if mode == "wait":
            await self.output_processor.wait_until_idle()
        level = await self.client.call_utility("sleep", level)
        self.stat_loggers.prometheus.record_sleep_state(level)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """See ``EngineCore.wake_up``."""
        await self.client.call_utility("wake_up", tags)
        if not await self.is_sleeping():
            self.stat_loggers.prometheus.record_sleep_state(None)

    async def is_sleeping(self) -> bool:
        return await self.client.call_utility("is_sleeping")

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """See ``LLMEngine.collective_rpc``; ``method`` is a name."""
        call = rpc_arguments(method, timeout, args, kwargs, takes_functions=False)
        return await self.client.call_utility("collective_rpc", *call)

    async def do_log_stats(self) -> None:
        """Log the line of statistics now, if anything happened since the last."""
        self.stat_loggers.log()

    async def _log_stats_every(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            self.stat_loggers.log()

    def shutdown(self, timeout: float = 5.0) -> None:
        """End the engine; requests in flight raise EngineDeadError. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._stats_task is not None and not self._stats_task.get_loop().is_closed():
            self._stats_task.cancel()
        self.client.shutdown(timeout)
        self.output_processor.fail_all(EngineDeadError("the engine has been shut down"))

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.shutdown(timeout=1.0)


AsyncLLMEngine = AsyncLLM
