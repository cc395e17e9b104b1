"""The check that a scheduler's books are in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

__all__ = ["check_integrity"]


def check_integrity(scheduler: Scheduler) -> None:
    """Check queues, states and blocks against each other. O(requests + blocks).

    Raises:
        AssertionError: naming the request or block that is wrong.
    """
    scheduler.kv_cache_manager.check_integrity()
    places: dict[str, str] = {}
    for place, members, states in (
        ("running", scheduler.running, {RequestStatus.RUNNING}),
        ("waiting", scheduler.waiting, {RequestStatus.WAITING, RequestStatus.PREEMPTED}),
        (
            "waiting for its grammar",
            scheduler.waiting_for_grammar.values(),
            {RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR},
        ),
        (
            "loading",
            scheduler.kv_transfer.loading,
            {RequestStatus.WAITING_FOR_REMOTE_KVS},
        ),
    ):
        for request in members:
            request_id = request.request_id
            assert request.status in states, f"{request} is {place}"
            assert request_id not in places, f"{request} is {place} and {places[request_id]}"
            places[request_id] = place
            assert request.num_tokens == len(request.all_token_ids), f"{request} miscounts"
            assert request.num_computed_tokens <= request.num_expected_tokens, f"{request} overran"
    assert places.keys() == scheduler.requests.keys(), "a request is nowhere, or was forgotten"
    with_blocks = {rid for m in scheduler.kv_cache_manager.managers for rid in m.req_to_blocks}
    allowed = scheduler.requests.keys() | scheduler.kv_transfer.holding
    assert with_blocks <= allowed, f"{with_blocks - allowed} have ended and hold blocks"
