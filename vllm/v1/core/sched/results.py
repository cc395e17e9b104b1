"""What a step has computed goes into the requests, and out to the clients."""

from __future__ import annotations

import time
from collections.abc import Set
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.utils import check_stop, logprobs_rows
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import SchedulerStats
    from vllm.v1.outputs import ModelRunnerOutput

__all__ = ["StepResults"]


class StepResults:
    """Outputs by client, from where they arise until they are collected."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._outputs: dict[int, list[EngineCoreOutput]] = {}
        self._finished: dict[int, set[str]] = {}

    @property
    def has_unsent(self) -> bool:
        """Something has ended outside a step, and its client does not know."""
        return bool(self._outputs)

    def take_samples(self, result: ModelRunnerOutput, discarded: Set[str]) -> None:
        """Append sampled tokens to their requests, and end those that they end.

        Args:
            discarded: requests whose samples mean nothing.
        """
        scheduler, outputs = self._scheduler, self._outputs
        get_request = scheduler.requests.get
        logprobs, prompt_logprobs = result.logprobs, result.prompt_logprobs_dict
        any_stopped = False
        client_index = -1
        client_outputs: list[EngineCoreOutput] = []
        for request_id, token_ids in zip(result.req_ids, result.sampled_token_ids, strict=True):
            # The request may have been aborted meanwhile.
            request = get_request(request_id)
            if request is None or not token_ids or request_id in discarded:
                continue
            if len(token_ids) == 1 and not request.use_structured_output:
                token_id = token_ids[0]
                num_tokens = request.append_output_token_id(token_id)
                stopped = (
                    num_tokens >= request.max_total_tokens or token_id in request.stop_ids
                ) and check_stop(request)
            else:
                stopped = self._append_and_check(request, token_ids)
                num_tokens = request.num_tokens
            if stopped:
                output, was_running = self._end(request, token_ids)
                any_stopped |= was_running
            elif request.events or num_tokens - request.num_prompt_tokens == len(token_ids):
                output = EngineCoreOutput(
                    request_id,
                    token_ids,
                    events=request.take_events(),
                    num_cached_tokens=request.num_cached_tokens,
                    num_preemptions=request.num_preemptions,
                )
            else:
                # Nothing else is new to its client.
                output = EngineCoreOutput(request_id, token_ids)
            if logprobs and request_id in logprobs:
                output.new_logprobs = logprobs_rows(logprobs[request_id])[: len(token_ids)]
            # A preempted prompt is computed again; its client has been told.
            if (
                prompt_logprobs
                and request_id in prompt_logprobs
                and num_tokens - request.num_prompt_tokens == len(token_ids)
            ):
                output.new_prompt_logprobs = logprobs_rows(prompt_logprobs[request_id])
            if request.client_index != client_index:
                client_index = request.client_index
                client_outputs = outputs.setdefault(client_index, [])
            client_outputs.append(output)
        if any_stopped:
            scheduler.drop_finished_from_running()

    def _end(self, request: Request, token_ids: list[int]) -> tuple[EngineCoreOutput, bool]:
        """Forget a request that a sample has ended; its last output, and whether it ran."""
        scheduler = self._scheduler
        was_running = request not in scheduler.waiting
        if not was_running:
            scheduler.waiting.remove_request(request)
        params = scheduler.finish(request)
        return _make_last_output(request, token_ids, params), was_running

    def _append_and_check(self, request: Request, token_ids: list[int]) -> bool:
        """Append sampled tokens up to the one that ends the request; True if one does.

        ``token_ids`` loses what comes after it.
        """
        stopped = False
        for count, token_id in enumerate(token_ids, start=1):
            request.append_output_token_id(token_id)
            if check_stop(request):
                del token_ids[count:]
                stopped = True
                break
        if request.use_structured_output:
            manager = self._scheduler.structured_output_manager
            assert manager is not None
            if not manager.accept_tokens(request, token_ids):
                state = request.structured_output_request
                assert state is not None
                request.fail(
                    state.error or f"the grammar does not allow the sampled tokens {token_ids}",
                    state.error_type or "EngineGenerateError",
                )
                return True
            if not stopped and manager.is_terminated(request):
                request.status = RequestStatus.FINISHED_STOPPED
                stopped = True
        return stopped

    def add_ended(self, request: Request, kv_transfer_params: dict[str, Any] | None) -> None:
        """Tell the client that ``request`` has ended outside a step."""
        output = _make_last_output(request, [], kv_transfer_params)
        self._outputs.setdefault(request.client_index, []).append(output)

    def add_finished(self, request: Request) -> None:
        """Name ``request`` among those that have ended, however that came."""
        self._finished.setdefault(request.client_index, set()).add(request.request_id)

    def collect(self, stats: SchedulerStats | None) -> dict[int, EngineCoreOutputs]:
        """All there is to tell, by client; the statistics go to one of them."""
        now = time.monotonic()
        by_client = {
            client: EngineCoreOutputs(outputs=outputs, timestamp=now)
            for client, outputs in self._outputs.items()
        }
        self._outputs = {}
        if self._finished:
            for client, finished in self._finished.items():
                by_client.setdefault(
                    client, EngineCoreOutputs(timestamp=now)
                ).finished_requests = finished
            self._finished = {}
        if stats is not None:
            first = next(iter(by_client.values()), None)
            if first is None:
                first = by_client[0] = EngineCoreOutputs(timestamp=now)
            first.scheduler_stats = stats
        return by_client


def _make_last_output(
    request: Request, token_ids: list[int], kv_transfer_params: dict[str, Any] | None
) -> EngineCoreOutput:
    return EngineCoreOutput(
        request.request_id,
        token_ids,
        finish_reason=request.get_finished_reason(),
        stop_reason=request.stop_reason,
        events=request.take_events(),
        kv_transfer_params=kv_transfer_params,
        num_cached_tokens=max(request.num_cached_tokens, 0),
        num_preemptions=request.num_preemptions,
        error=request.error,
        error_type=request.error_type,
    )
