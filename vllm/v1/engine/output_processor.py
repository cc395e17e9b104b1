"""Engine outputs to ``RequestOutput``: text, stop strings, log-probabilities, statistics.

Runs in the front end. Knows nothing of processes, sockets or the scheduler.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import vllm.errors
from vllm.errors import (
    EngineGenerateError,
    QueueFullError,
    VLLMError,
    VLLMValidationError,
)
from vllm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.logprobs import LogprobsCollector, TokenText
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.stats import IterationStats

__all__ = ["OutputProcessor", "OutputQueue", "ProcessedOutputs", "error_of"]


def error_of(output: EngineCoreOutput) -> Exception:
    """The exception that an output with ``finish_reason`` ERROR stands for."""
    message = output.error or "the request failed in the engine"
    cls = getattr(vllm.errors, output.error_type or "", None)
    if not isinstance(cls, type) or not issubclass(cls, VLLMError | VLLMValidationError):
        cls = EngineGenerateError
    return cls(message)


class OutputQueue:
    """Outputs of one request on their way to its consumer, within one event loop.

    A consumer that is slower than the engine finds them merged into one, so memory and work stay
    bounded by the tokens generated.
    """

    def __init__(self, output_kind: RequestOutputKind) -> None:
        self._delta = output_kind is RequestOutputKind.DELTA
        self._item: RequestOutput | Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: RequestOutput | Exception) -> None:
        if self._item is None or isinstance(item, Exception):
            self._item = item
        elif isinstance(self._item, RequestOutput):
            _merge(self._item, item, self._delta)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def get_nowait(self) -> RequestOutput | None:
        """What is there, or None.

        Raises:
            Exception: what was put instead of an output.
        """
        item = self._item
        if isinstance(item, Exception):
            raise item
        self._item = None
        return item

    async def get(self) -> RequestOutput:
        """The next output, once there is one; for one consumer."""
        while (item := self.get_nowait()) is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return item


def _merge(old: RequestOutput, new: RequestOutput, delta: bool) -> None:
    """Bring ``old`` up to date with ``new``, which came after it."""
    old.finished = new.finished
    old.metrics = new.metrics
    old.num_cached_tokens = new.num_cached_tokens
    old.kv_transfer_params = new.kv_transfer_params or old.kv_transfer_params
    if new.prompt_logprobs:
        old.prompt_logprobs = new.prompt_logprobs
    by_index = {completion.index: completion for completion in old.outputs}
    for completion in new.outputs:
        known = by_index.get(completion.index)
        if known is None:
            old.outputs.append(completion)
        elif not delta:
            old.outputs[old.outputs.index(known)] = completion
        else:
            known.text += completion.text
            known.token_ids.extend(completion.token_ids)
            if completion.logprobs:
                known.logprobs = (known.logprobs or []) + completion.logprobs
            known.cumulative_logprob = completion.cumulative_logprob
            known.finish_reason = completion.finish_reason
            known.stop_reason = completion.stop_reason


class _RequestState:
    """One sequence in flight."""

    __slots__ = (
        "detokenizer",
        "encoder_token_ids",
        "index",
        "kv_transfer_params",
        "logprobs",
        "max_tokens",
        "metrics",
        "num_cached_tokens",
        "num_shown_tokens",
        "output_kind",
        "parent",
        "prompt",
        "prompt_token_ids",
        "queue",
        "stream_interval",
        "user_request_id",
    )

    def __init__(
        self,
        user_request_id: str,
        request: EngineCoreRequest,
        prompt: str | None,
        parent: ParentRequest | None,
        index: int,
        queue: OutputQueue | None,
        tokenizer: Any,
        token_text: TokenText | None,
        stream_interval: int,
    ) -> None:
        params = request.sampling_params
        self.user_request_id = user_request_id
        self.prompt = prompt
        self.prompt_token_ids = request.prompt_token_ids
        self.encoder_token_ids = request.encoder_token_ids
        self.parent = parent
        self.index = index
        self.queue = queue
        self.output_kind = params.output_kind
        self.max_tokens = params.max_tokens
        self.stream_interval = params.stream_interval or stream_interval
        self.num_shown_tokens = 0
        self.detokenizer = IncrementalDetokenizer(tokenizer, params, request.prompt_token_ids)
        self.logprobs = LogprobsCollector(token_text, params)
        self.metrics = RequestMetrics(arrival_time=request.arrival_time)
        self.num_cached_tokens = 0
        self.kv_transfer_params: dict[str, Any] | None = None

    def make_output(
        self, finish_reason: FinishReason | None, stop_reason: int | str | None
    ) -> RequestOutput | None:
        """What to show after this step; None where nothing is due yet."""
        finished = finish_reason is not None
        detokenizer = self.detokenizer
        num_tokens = len(detokenizer.token_ids)
        if not finished and not self._is_due(num_tokens):
            return None
        delta = self.output_kind is RequestOutputKind.DELTA
        completion = CompletionOutput(
            index=self.index,
            text=detokenizer.take_text(finished, delta),
            token_ids=detokenizer.take_token_ids(delta),
            cumulative_logprob=self.logprobs.cumulative_logprob,
            logprobs=self.logprobs.take(delta),
            finish_reason=str(finish_reason) if finish_reason is not None else None,
            stop_reason=stop_reason if finished else None,
        )
        self.num_shown_tokens = num_tokens
        outputs = [completion]
        if self.parent is not None:
            outputs = self.parent.add(completion, num_tokens)
            if not outputs:
                return None
            finished = self.parent.finished
            self.kv_transfer_params = self.parent.kv_transfer_params
        return RequestOutput(
            request_id=self.user_request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self.logprobs.take_prompt(delta),
            outputs=outputs,
            finished=finished,
            metrics=self.metrics,
            num_cached_tokens=self.num_cached_tokens,
            kv_transfer_params=self.kv_transfer_params,
            encoder_prompt_token_ids=self.encoder_token_ids,
        )

    def _is_due(self, num_tokens: int) -> bool:
        if self.output_kind is RequestOutputKind.FINAL_ONLY:
            return False
        num_new = num_tokens - self.num_shown_tokens
        return num_new > 0 and (self.num_shown_tokens == 0 or num_new >= self.stream_interval)


@dataclass(slots=True)
class ProcessedOutputs:
    """``request_outputs`` of requests without a queue; ids that the engine must still abort;
    ``errors`` by user's request id, of requests without a queue."""

    request_outputs: list[RequestOutput] = field(default_factory=list)
    reqs_to_abort: list[str] = field(default_factory=list)
    errors: dict[str, Exception] = field(default_factory=dict)


class OutputProcessor:
    """All sequences in flight, by engine request id."""

    def __init__(self, tokenizer: Any, *, stream_interval: int = 1) -> None:
        self.tokenizer = tokenizer
        self._token_text = TokenText(tokenizer) if tokenizer is not None else None
        self._stream_interval = stream_interval
        self._states: dict[str, _RequestState] = {}
        self._by_user_id: dict[str, set[str]] = {}
        self._idle = asyncio.Event()

    def __len__(self) -> int:
        return len(self._states)

    def has_unfinished_requests(self) -> bool:
        return bool(self._states)

    def add_request(
        self,
        user_request_id: str,
        request: EngineCoreRequest,
        prompt: str | None,
        *,
        parent: ParentRequest | None = None,
        index: int = 0,
        queue: OutputQueue | None = None,
    ) -> None:
        """Expect outputs for ``request``; they go to ``queue``, or out of ``process_outputs``."""
        assert request.request_id not in self._states, "engine request ids are unique"
        self._states[request.request_id] = _RequestState(
            user_request_id,
            request,
            prompt,
            parent,
            index,
            queue,
            self.tokenizer,
            self._token_text,
            self._stream_interval,
        )
        self._by_user_id.setdefault(user_request_id, set()).add(request.request_id)

    def process_outputs(
        self,
        outputs: Iterable[EngineCoreOutput],
        engine_timestamp: float = 0.0,
        stats: IterationStats | None = None,
    ) -> ProcessedOutputs:
        """Take in outputs of one step; outputs of requests that have ended here are dropped."""
        processed = ProcessedOutputs()
        for output in outputs:
            state = self._states.get(output.request_id)
            if state is not None:
                self._process_one(output, state, engine_timestamp, stats, processed)
        return processed

    def _process_one(
        self,
        output: EngineCoreOutput,
        state: _RequestState,
        engine_timestamp: float,
        stats: IterationStats | None,
        processed: ProcessedOutputs,
    ) -> None:
        finish_reason, stop_reason = output.finish_reason, output.stop_reason
        if stats is not None:
            stats.update_from_output(
                output, engine_timestamp, state.metrics, len(state.prompt_token_ids)
            )
        if finish_reason is FinishReason.ERROR:
            self._fail(output, state, stats, processed)
            return
        state.num_cached_tokens = max(state.num_cached_tokens, output.num_cached_tokens)
        state.kv_transfer_params = output.kv_transfer_params or state.kv_transfer_params
        if state.parent is not None:
            state.parent.kv_transfer_params = (
                state.parent.kv_transfer_params or state.kv_transfer_params
            )
        if output.new_prompt_logprobs is not None:
            state.logprobs.add_prompt(output.new_prompt_logprobs)
        if output.new_logprobs is not None:
            state.logprobs.add_sampled(output.new_logprobs)
        stop_string = state.detokenizer.update(
            output.new_token_ids,
            finished=finish_reason is not None,
            by_stop_token=finish_reason is FinishReason.STOP,
        )
        if stop_string is not None:
            if finish_reason is None:
                processed.reqs_to_abort.append(output.request_id)
            finish_reason, stop_reason = FinishReason.STOP, stop_string
        request_output = state.make_output(finish_reason, stop_reason)
        if finish_reason is not None:
            self._finish(output.request_id, state, finish_reason, stats)
        if request_output is not None:
            if state.queue is not None:
                state.queue.put(request_output)
            else:
                processed.request_outputs.append(request_output)

    def _fail(
        self,
        output: EngineCoreOutput,
        state: _RequestState,
        stats: IterationStats | None,
        processed: ProcessedOutputs,
    ) -> None:
        """End the request, all its sequences, with an exception."""
        error = error_of(output)
        if stats is not None and isinstance(error, QueueFullError):
            reason = "max_num_queued_reqs"
            stats.rejections[reason] = stats.rejections.get(reason, 0) + 1
        siblings = state.parent.child_ids if state.parent is not None else [output.request_id]
        for engine_id in siblings:
            sibling = self._states.get(engine_id)
            if sibling is not None:
                self._finish(engine_id, sibling, FinishReason.ERROR, stats)
                if engine_id != output.request_id:
                    processed.reqs_to_abort.append(engine_id)
        if state.queue is not None:
            state.queue.put(error)
        else:
            processed.errors[state.user_request_id] = error

    def _finish(
        self,
        engine_id: str,
        state: _RequestState,
        finish_reason: FinishReason,
        stats: IterationStats | None,
    ) -> None:
        del self._states[engine_id]
        siblings = self._by_user_id[state.user_request_id]
        siblings.discard(engine_id)
        if not siblings:
            del self._by_user_id[state.user_request_id]
        if not self._states:
            self._idle.set()
        if stats is None:
            return
        stats.update_from_finished(
            finish_reason,
            state.metrics,
            len(state.prompt_token_ids),
            state.num_cached_tokens,
            state.max_tokens,
        )
        parent = state.parent
        if parent is None:
            stats.max_num_generation_tokens.append(state.metrics.num_generation_tokens)
            stats.n_params.append(1)
        elif parent.finished:
            stats.max_num_generation_tokens.append(parent.max_num_generation_tokens)
            stats.n_params.append(parent.params.n)

    def engine_ids_of(self, user_request_ids: Iterable[str]) -> list[str]:
        """Engine request ids of users' ids; unknown ones are left out."""
        return [
            engine_id
            for user_request_id in user_request_ids
            for engine_id in sorted(self._by_user_id.get(user_request_id, ()))
        ]

    def abort_requests(
        self, engine_ids: Iterable[str], stats: IterationStats | None = None
    ) -> tuple[list[str], list[RequestOutput]]:
        """End sequences here; returns the ids to abort in the engine, and the last outputs of
        requests without a queue (the others go to their queues). Unknown ids are left out."""
        known = [engine_id for engine_id in engine_ids if engine_id in self._states]
        last_outputs: list[RequestOutput] = []
        for engine_id in known:
            state = self._states[engine_id]
            output = state.make_output(FinishReason.ABORT, None)
            self._finish(engine_id, state, FinishReason.ABORT, stats)
            if output is None:
                continue
            if state.queue is not None:
                state.queue.put(output)
            else:
                last_outputs.append(output)
        return known, last_outputs

    def fail_all(self, error: Exception) -> None:
        """The engine is gone: every queue gets ``error`` and nothing is in flight any more."""
        for state in self._states.values():
            if state.queue is not None:
                state.queue.put(error)
        self._states.clear()
        self._by_user_id.clear()
        self._idle.set()

    async def wait_until_idle(self) -> None:
        """Returns when no request is in flight."""
        while self._states:
            self._idle.clear()
            await self._idle.wait()
