"""What a step has computed goes into the requests, and out to the clients."""

from __future__ import annotations

import time
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm.v1.core.sched.utils import check_stop, logprobs_rows
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import SchedulerStats
    from vllm.v1.outputs import ModelRunnerOutput

__all__ = ["StepResults"]


class _Decodes:
    """Requests of which a batch has one token each in every step, in its order.

    While the batch stays, a step's tokens are taken in for all of them together: what needs a
    look (a full block to hash, the longest length, a token that may end a request) is found by
    comparing whole arrays. Valid until one of the requests ends or is preempted.
    """

    __slots__ = (
        "_appends",
        "_looks_at",
        "_num_tokens",
        "_stop_ids",
        "clients",
        "req_ids",
        "requests",
    )

    def __init__(self, req_ids: list[str], requests: list[Request]) -> None:
        self.req_ids = req_ids
        self.requests = requests
        self._appends = [request.all_token_ids.append for request in requests]
        self._num_tokens = np.array([request.num_tokens for request in requests])
        self._looks_at = np.array([request.looks_at for request in requests])
        self._stop_ids = frozenset().union(*(request.stop_ids for request in requests))
        self.clients: dict[int, list[str]] = {}
        for request in requests:
            self.clients.setdefault(request.client_index, []).append(request.request_id)

    @classmethod
    def of(cls, req_ids: list[str], requests: Mapping[str, Request]) -> _Decodes | None:
        """For a batch whose requests' next outputs are tokens and nothing else; else None."""
        found: list[Request] = []
        for request_id in req_ids:
            request = requests.get(request_id)
            if (
                request is None
                or request.use_structured_output
                or request.events
                or request.num_tokens == request.num_prompt_tokens
            ):
                return None
            found.append(request)
        return cls(req_ids, found)

    def append(self, tokens: list[int]) -> list[int]:
        """Add a token to each request; indices of those that it may end."""
        for request, append, token in zip(self.requests, self._appends, tokens, strict=True):
            append(token)
            request.num_tokens = count = request.num_tokens + 1
            if count > request.num_expected_tokens:
                request.num_expected_tokens = count
        self._num_tokens += 1
        ending: list[int] = []
        for index in (self._num_tokens >= self._looks_at).nonzero()[0].tolist():
            request = self.requests[index]
            request.hash_new_blocks()
            self._looks_at[index] = request.looks_at
            if request.num_tokens >= request.max_total_tokens:
                ending.append(index)
        if self._stop_ids and not self._stop_ids.isdisjoint(tokens):
            stopping = {
                index
                for index, token in enumerate(tokens)
                if token in self._stop_ids and token in self.requests[index].stop_ids
            }
            ending = sorted(stopping.union(ending))
        return ending


class StepResults:
    """Outputs by client, from where they arise until they are collected."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._outputs: dict[int, list[EngineCoreOutput]] = {}
        self._next_tokens: dict[int, dict[str, int]] = {}
        self._finished: dict[int, set[str]] = {}
        self._decodes: _Decodes | None = None
        self._last_req_ids: list[str] = []

    def forget_batch(self) -> None:
        """A request has ended, or waits again."""
        self._decodes = None

    @property
    def has_unsent(self) -> bool:
        """Something has ended outside a step, and its client does not know."""
        return bool(self._outputs)

    def take_samples(self, result: ModelRunnerOutput, discarded: Set[str]) -> None:
        """Append sampled tokens to their requests, and end those that they end.

        Args:
            discarded: requests whose samples mean nothing.
        """
        if self._take_decodes(result, discarded):
            return
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
                    num_external_tokens=request.num_external_computed_tokens,
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
        if not (logprobs or prompt_logprobs or discarded):
            self._remember(result.req_ids)

    def _remember(self, req_ids: list[str]) -> None:
        """Expect the same batch again, once it has come twice."""
        if req_ids and req_ids == self._last_req_ids:
            self._decodes = _Decodes.of(req_ids, self._scheduler.requests)
        self._last_req_ids = req_ids

    def _take_decodes(self, result: ModelRunnerOutput, discarded: Set[str]) -> bool:
        """``take_samples`` where the batch is that of the last step and all of it decodes.

        False, with nothing done, where it is not.
        """
        req_ids, decodes = result.req_ids, self._decodes
        if (
            decodes is None
            or decodes.req_ids != req_ids
            or discarded
            or result.logprobs
            or result.prompt_logprobs_dict
        ):
            self._decodes = None
            return False
        lists = result.sampled_token_ids
        try:
            tokens = [token_id for (token_id,) in lists]
        except ValueError:
            # Some request has none, or several.
            self._decodes = None
            return False
        next_tokens = dict(zip(req_ids, tokens, strict=True))
        any_stopped = False
        for index in decodes.append(tokens):
            request = decodes.requests[index]
            if check_stop(request):
                del next_tokens[request.request_id]
                output, was_running = self._end(request, lists[index])
                self._outputs.setdefault(request.client_index, []).append(output)
                any_stopped |= was_running
        if len(decodes.clients) == 1:
            self._next_tokens = dict.fromkeys(decodes.clients, next_tokens)
        else:
            self._next_tokens = {
                client: {name: next_tokens[name] for name in names if name in next_tokens}
                for client, names in decodes.clients.items()
            }
        if any_stopped:
            self._scheduler.drop_finished_from_running()
        return True

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
        """All there is to tell, by client; the statistics go to the first.

        Always to the same one: of two, the slower would write an older step's over them.
        """
        now = time.monotonic()
        by_client = {
            client: EngineCoreOutputs(
                full_outputs=self._outputs.get(client, []),
                timestamp=now,
                finished_requests=self._finished.get(client),
                next_tokens=self._next_tokens.get(client, {}),
            )
            for client in (self._outputs | self._next_tokens | self._finished)
        }
        self._outputs, self._next_tokens, self._finished = {}, {}, {}
        if stats is not None:
            first = by_client.setdefault(0, EngineCoreOutputs(timestamp=now))
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
        num_external_tokens=request.num_external_computed_tokens,
    )
