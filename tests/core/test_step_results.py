"""Tokens of a batch that stays the same are taken in as a whole, with the same outcome."""

import pytest

from tests.core.helpers import BLOCK, FakeModel, make_request, make_scheduler
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.serial import decode_outputs, encode
from vllm.v1.request import RequestStatus

STOP = 7


def next_token(tokens: list[int]) -> int:
    """Prompts that begin with 1 stop when they have 30 tokens."""
    return STOP if tokens[0] == 1 and len(tokens) == 30 else 10 + sum(tokens) % 80


def prompts() -> dict[str, list[int]]:
    return {name: [i + 1, *range(200, 208 + 3 * i)] for i, name in enumerate("abcd")}


def start(scheduler, names="abcd"):
    for i, name in enumerate(names):
        scheduler.add_request(
            make_request(
                name,
                prompts()[name],
                max_tokens=40 + i,
                client_index=i % 2,
                stop_token_ids=[STOP] if name == "a" else None,
            )
        )


def expected(name: str, count: int) -> list[int]:
    tokens = prompts()[name].copy()
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[-count:]


def run(scheduler, model, until=lambda step: False):
    """Tokens, ends and clients by request, and how many steps went on with the last."""
    tokens: dict[str, list[int]] = {}
    ends: dict[str, FinishReason] = {}
    clients: dict[str, set[int]] = {}
    followed = steps = 0
    while scheduler.has_unfinished_requests() and not until(steps):
        output = scheduler.schedule()
        followed += output.scheduled_cached_reqs.as_expected
        cached = output.scheduled_cached_reqs
        if cached.as_expected:
            for name in cached.req_ids:
                request = scheduler.requests[name]
                # Counted as computed by this step.
                assert request.num_computed_tokens == request.num_tokens
        else:
            for name, sampled in zip(cached.req_ids, cached.num_output_tokens, strict=True):
                assert sampled == scheduler.requests[name].num_output_tokens
        for client, part in scheduler.update_from_output(output, model.execute(output)).items():
            for one in part.outputs:
                tokens.setdefault(one.request_id, []).extend(one.new_token_ids)
                clients.setdefault(one.request_id, set()).add(client)
                if one.finished:
                    ends[one.request_id] = one.finish_reason
        steps += 1
    return tokens, ends, clients, followed


def test_each_request_gets_its_tokens_and_its_end():
    scheduler = make_scheduler()
    start(scheduler)
    tokens, ends, clients, followed = run(scheduler, FakeModel(scheduler, next_token))
    stopped = 30 + 1 - len(prompts()["a"])
    counts = {"a": stopped, "b": 41, "c": 42, "d": 43}
    assert tokens == {name: expected(name, count) for name, count in counts.items()}
    assert ends == {"a": FinishReason.STOP} | dict.fromkeys("bcd", FinishReason.LENGTH)
    assert clients == {"a": {0}, "b": {1}, "c": {0}, "d": {1}}
    assert followed > 30
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_usable_blocks


def test_plain_tokens_travel_by_themselves_and_read_as_outputs():
    scheduler = make_scheduler()
    start(scheduler)
    model = FakeModel(scheduler, next_token)
    run(scheduler, model, until=lambda step: step == 8)
    output = scheduler.schedule()
    parts = scheduler.update_from_output(output, model.execute(output))
    assert {client: list(part.next_tokens) for client, part in parts.items()} == {
        0: ["a", "c"],
        1: ["b", "d"],
    }
    for part in parts.values():
        assert not part.full_outputs
        arrived = decode_outputs(encode(part))
        expected_outputs = [
            EngineCoreOutput(name, [model.tokens[name][-1]]) for name in part.next_tokens
        ]
        assert part.outputs == arrived.outputs == expected_outputs
        assert arrived.outputs == expected_outputs, "a second look shows them once"


def test_blocks_that_fill_up_are_found_by_the_next_prompt():
    scheduler = make_scheduler()
    start(scheduler, "b")
    model = FakeModel(scheduler, next_token)
    tokens, *_ = run(scheduler, model)
    turn = [*prompts()["b"], *tokens["b"]]
    scheduler.add_request(make_request("next", turn))
    scheduler.schedule()
    assert scheduler.requests["next"].num_cached_tokens == (len(turn) - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("leaves", ["abort", "preempt"])
def test_a_request_that_leaves_between_steps_takes_nothing_with_it(leaves):
    scheduler = make_scheduler()
    start(scheduler)
    model = FakeModel(scheduler, next_token)
    run(scheduler, model, until=lambda step: step == 8)
    if leaves == "abort":
        scheduler.finish_requests("b", RequestStatus.FINISHED_ABORTED)
    else:
        scheduler.preempt(scheduler.requests["b"])
    tokens, ends, *_ = run(scheduler, model)
    assert tokens["c"] == expected("c", 42)[8:] and tokens["d"] == expected("d", 43)[8:]
    assert ("b" in ends) == (leaves == "preempt")
    if leaves == "preempt":
        assert tokens["b"] == expected("b", 41)[8:]
