import numpy as np
import pytest

from tests.core.helpers import (
    EOS,
    FakeModel,
    chunked_spec,
    full_spec,
    make_request,
    make_scheduler,
    mamba_spec,
    window_spec,
)
from vllm.errors import ConfigError, QueueFullError, VLLMValidationError
from vllm.v1.engine import EngineCoreEventType, FinishReason
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import RequestStatus


def setup(*args, next_token=None, **kwargs):
    scheduler = make_scheduler(*args, **kwargs)
    return scheduler, FakeModel(scheduler, next_token)


def distinct(request_id, length, **kwargs):
    """A request that shares no prefix with any other."""
    seed = sum(map(ord, request_id)) * 1000
    return make_request(request_id, [seed + i for i in range(length)], **kwargs)


def scheduled(output):
    return dict(output.num_scheduled_tokens)


# Batching


def test_all_that_fits_runs_at_once():
    scheduler, model = setup()
    for name in "abc":
        scheduler.add_request(distinct(name, 20, max_tokens=3))
    output = scheduler.schedule()
    assert scheduled(output) == {"a": 20, "b": 20, "c": 20}
    assert [new.req_id for new in output.scheduled_new_reqs] == ["a", "b", "c"]
    model.execute(output)
    assert scheduler.get_request_counts() == (3, 0)


def test_a_request_joins_those_that_decode():
    scheduler, model = setup()
    scheduler.add_request(distinct("a", 20))
    model.step()
    scheduler.add_request(distinct("b", 30))
    output = scheduler.schedule()
    assert scheduled(output) == {"a": 1, "b": 30}
    assert output.scheduled_cached_reqs.req_ids == ["a"]


def test_a_long_prompt_is_computed_in_chunks_beside_others():
    scheduler, model = setup(max_num_batched_tokens=50)
    scheduler.add_request(distinct("a", 20))
    model.step()
    scheduler.add_request(distinct("b", 120, max_tokens=2))
    chunks = []
    for _ in range(3):
        output = scheduler.schedule()
        chunks.append(scheduled(output))
        scheduler.update_from_output(output, model.execute(output))
    assert chunks == [{"a": 1, "b": 49}, {"a": 1, "b": 49}, {"a": 1, "b": 22}]
    assert model.run().keys() == {"a", "b"}


def test_a_long_prompt_leaves_room_under_its_threshold():
    scheduler, _ = setup(max_num_batched_tokens=100, long_prefill_token_threshold=30)
    scheduler.add_request(distinct("a", 90))
    scheduler.add_request(distinct("b", 40))
    assert scheduled(scheduler.schedule()) == {"a": 30, "b": 30}


def test_without_chunks_a_prompt_waits_for_a_step_that_takes_it_whole():
    scheduler, model = setup(
        max_model_len=60, max_num_batched_tokens=60, enable_chunked_prefill=False
    )
    scheduler.add_request(distinct("a", 40, max_tokens=4))
    scheduler.add_request(distinct("b", 30, max_tokens=4))
    first = scheduler.schedule()
    assert scheduled(first) == {"a": 40}
    scheduler.update_from_output(first, model.execute(first))
    second = scheduler.schedule()
    assert scheduled(second) == {"a": 1, "b": 30}
    scheduler.update_from_output(second, model.execute(second))
    assert {name: len(tokens) for name, tokens in model.run().items()} == {"a": 2, "b": 3}


def test_no_more_than_max_num_seqs_run():
    scheduler, model = setup(max_num_seqs=2)
    for name in "abcd":
        scheduler.add_request(distinct(name, 10, max_tokens=2))
    model.step()
    assert scheduler.get_request_counts() == (2, 2)
    assert {len(tokens) for tokens in model.run().values()} <= {1, 2}


def test_the_token_budget_is_shared_by_those_that_decode():
    scheduler, model = setup(max_num_seqs=8, max_num_batched_tokens=4, max_model_len=64)
    for name in "abcdef":
        scheduler.add_request(distinct(name, 2, max_tokens=5))
    tokens = model.run()
    assert {name: len(t) for name, t in tokens.items()} == dict.fromkeys("abcdef", 5)


def test_blocks_of_the_step_are_told_once():
    scheduler, model = setup()
    scheduler.add_request(distinct("a", 16, max_tokens=20))
    output = scheduler.schedule()
    assert [len(ids) for ids in output.scheduled_new_reqs[0].block_ids] == [1]
    scheduler.update_from_output(output, model.execute(output))
    output = scheduler.schedule()
    assert [len(ids) for ids in output.scheduled_cached_reqs.new_block_ids[0]] == [1]
    scheduler.update_from_output(output, model.execute(output))
    assert scheduler.schedule().scheduled_cached_reqs.new_block_ids == [None]


# Endings


def test_outputs_say_why_a_request_ended():
    scheduler, model = setup(next_token=lambda tokens: EOS if len(tokens) == 22 else 9)
    scheduler.add_request(distinct("eos", 20))
    scheduler.add_request(distinct("length", 23, max_tokens=2))
    scheduler.add_request(distinct("stop", 23, stop_token_ids=[9]))
    last = {}
    while scheduler.has_unfinished_requests():
        last.update({out.request_id: out for out in model.step() if out.finished})
    assert last["eos"].finish_reason is FinishReason.STOP and last["eos"].stop_reason is None
    assert last["length"].finish_reason is FinishReason.LENGTH
    assert last["stop"].finish_reason is FinishReason.STOP and last["stop"].stop_reason == 9


def test_max_model_len_ends_a_request():
    scheduler, model = setup(max_model_len=40)
    scheduler.add_request(distinct("a", 30, max_tokens=None))
    assert len(model.run()["a"]) == 10


def test_workers_hear_of_what_has_ended_even_if_nothing_is_left():
    scheduler, model = setup()
    scheduler.add_request(distinct("a", 10, max_tokens=1))
    model.step()
    assert not scheduler.has_unfinished_requests() and scheduler.has_requests()
    output = scheduler.schedule()
    assert output.finished_req_ids == {"a"} and output.total_num_scheduled_tokens == 0
    assert not scheduler.has_requests()


def test_each_client_gets_its_own_outputs():
    scheduler, model = setup(include_finished_set=True)
    scheduler.add_request(distinct("a", 10, client_index=0, max_tokens=1))
    scheduler.add_request(distinct("b", 10, client_index=3))
    output = scheduler.schedule()
    outputs = scheduler.update_from_output(output, model.execute(output))
    assert {c: [o.request_id for o in out.outputs] for c, out in outputs.items()} == {
        0: ["a"], 3: ["b"],
    }  # fmt: skip
    assert outputs[0].finished_requests == {"a"} and outputs[3].finished_requests is None
    assert outputs[0].scheduler_stats is not None and outputs[3].scheduler_stats is None
    # Whoever has outputs: two clients would write older numbers over newer ones.
    output = scheduler.schedule()
    outputs = scheduler.update_from_output(output, model.execute(output))
    assert [o.request_id for o in outputs[3].outputs] == ["b"] and not outputs[0].outputs
    assert outputs[0].scheduler_stats is not None and outputs[3].scheduler_stats is None


@pytest.mark.parametrize("when", ["waiting", "scheduled", "running", "preempted"])
def test_an_abort_gives_everything_back(when):
    scheduler, model = setup(5, max_num_seqs=3)
    scheduler.add_request(distinct("keep", 20, max_tokens=30))
    scheduler.add_request(distinct("gone", 20, max_tokens=30))
    output = None
    if when == "scheduled":
        output = scheduler.schedule()
    elif when == "running":
        model.step()
    elif when == "preempted":
        while scheduler.requests["gone"].status is not RequestStatus.PREEMPTED:
            model.step()
    scheduler.finish_requests(["gone", "unknown"], RequestStatus.FINISHED_ABORTED)
    scheduler.check_integrity()
    if output is not None:
        outputs = scheduler.update_from_output(output, model.execute(output))
        assert [out.request_id for out in outputs[0].outputs] == ["keep"]
    tokens = model.run()
    assert "gone" not in tokens and scheduler.kv_cache_manager.usage == 0


def test_all_requests_can_be_ended_at_once():
    scheduler, model = setup(max_num_seqs=2)
    for name in "abcd":
        scheduler.add_request(distinct(name, 10))
    model.step()
    scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    scheduler.check_integrity()
    assert scheduler.get_request_counts() == (0, 0)
    assert scheduler.schedule().finished_req_ids == set("abcd")


# Admission


def test_the_65th_request_of_a_queue_of_64_is_refused():
    scheduler, model = setup(max_num_queued_reqs=64, max_num_seqs=2)
    for i in range(64):
        scheduler.add_request(distinct(f"r{i}", 10, max_tokens=2))
    with pytest.raises(QueueFullError, match="--max-num-queued-reqs is 64"):
        scheduler.add_request(distinct("one more", 10))
    # Two have been admitted, so two more may wait.
    model.step()
    scheduler.add_request(distinct("s0", 10, max_tokens=2))
    scheduler.add_request(distinct("s1", 10, max_tokens=2))
    with pytest.raises(QueueFullError):
        scheduler.add_request(distinct("s2", 10))
    scheduler.check_integrity()
    assert len(model.run()) == 66


def test_a_prompt_that_could_never_fit_is_refused_with_the_option_to_raise():
    scheduler, model = setup(5, max_model_len=1024)
    with pytest.raises(VLLMValidationError, match=r"64 tokens.*4 blocks.*--kv-cache-memory-bytes"):
        scheduler.add_request(distinct("a", 64))
    scheduler.add_request(distinct("b", 63, max_tokens=None))
    # It ends where the pool ends.
    assert len(model.run()["b"]) == 1


def test_a_prompt_as_long_as_the_model_allows_is_refused():
    scheduler, _ = setup(max_model_len=32)
    with pytest.raises(VLLMValidationError, match="--max-model-len is 32"):
        scheduler.add_request(distinct("a", 32))
    with pytest.raises(VLLMValidationError, match="empty"):
        scheduler.add_request(make_request("b", []))


def test_an_id_that_is_being_served_is_refused():
    scheduler, _ = setup()
    scheduler.add_request(distinct("a", 10))
    with pytest.raises(VLLMValidationError, match="already being served"):
        scheduler.add_request(distinct("a", 12))
    scheduler.check_integrity()


def test_the_watermark_stays_free_but_never_blocks_a_lone_request():
    scheduler, model = setup(11, watermark=0.3)
    scheduler.add_request(distinct("a", 90, max_tokens=2))
    scheduler.add_request(distinct("b", 30, max_tokens=2))
    output = scheduler.schedule()
    assert scheduled(output) == {"a": 90}
    scheduler.update_from_output(output, model.execute(output))
    tokens = model.run()
    assert len(tokens["a"]) == 1 and len(tokens["b"]) == 2
    scheduler.add_request(distinct("c", 150, max_tokens=2))
    assert len(model.run()["c"]) == 2


def test_a_request_that_does_not_fit_is_tried_again_once_blocks_are_free(monkeypatch):
    scheduler, model = setup(9)
    scheduler.add_request(distinct("a", 90, max_tokens=4))
    scheduler.add_request(distinct("b", 90, max_tokens=1))
    lookups = []
    original = scheduler.kv_cache_manager.get_computed_blocks
    monkeypatch.setattr(
        scheduler.kv_cache_manager,
        "get_computed_blocks",
        lambda request: lookups.append(request.request_id) or original(request),
    )
    assert {name: len(tokens) for name, tokens in model.run().items()} == {"a": 4, "b": 1}
    assert lookups == ["a", "b", "b"]


# Policies


def test_priority_reorders_what_waits():
    scheduler, model = setup(max_num_seqs=1, policy="priority")
    for name, priority in (("first", 5), ("low", 9), ("high", 0), ("middle", 5)):
        scheduler.add_request(distinct(name, 10, priority=priority, arrival_time=1.0, max_tokens=1))
    order = []
    while scheduler.has_unfinished_requests():
        order += [out.request_id for out in model.step()]
    assert order == ["high", "first", "middle", "low"]


def test_fcfs_ignores_priority():
    scheduler, model = setup(max_num_seqs=1)
    for name, priority in (("first", 5), ("high", 0)):
        scheduler.add_request(distinct(name, 10, priority=priority, max_tokens=1))
    assert [out.request_id for out in model.step()] == ["first"]


def test_fcfs_preempts_the_last_that_came():
    scheduler, model = setup(9)
    for name in "abc":
        scheduler.add_request(distinct(name, 30, max_tokens=40))
    preempted = []
    for _ in range(12):
        output = scheduler.schedule()
        preempted += output.preempted_req_ids
        scheduler.update_from_output(output, model.execute(output))
        scheduler.check_integrity()
    assert preempted == ["c"]
    tokens = model.run()
    assert all(len(t) <= 40 for t in tokens.values())


def test_priority_preempts_the_least_urgent_even_if_it_is_in_the_step_already():
    scheduler, model = setup(9, policy="priority")
    for i, (name, priority) in enumerate((("worst", 9), ("mid", 5), ("best", 0))):
        scheduler.add_request(
            distinct(name, 30, priority=priority, arrival_time=float(i), max_tokens=40)
        )
        model.step()
    preempted = []
    while not preempted:
        output = scheduler.schedule()
        preempted += output.preempted_req_ids
        assert not output.preempted_req_ids & output.num_scheduled_tokens.keys()
        scheduler.check_integrity()
        scheduler.update_from_output(output, model.execute(output))
    assert preempted == ["worst"]
    assert model.run().keys() == {"worst", "mid", "best"}


def test_what_a_preempted_request_did_not_compute_is_not_found():
    # The model checks what every request reads; two requests share all of their tokens here.
    scheduler, model = setup(12, policy="priority", max_num_batched_tokens=48)
    for i, priority in enumerate((9, 5, 0, 7)):
        scheduler.add_request(
            make_request(f"r{i}", 40 + i, priority=priority, arrival_time=float(i), max_tokens=60)
        )
    tokens = model.run()
    assert len({tuple(t) for t in tokens.values()}) == 4
    assert all(len(t) == 60 for t in tokens.values())


def test_a_preempted_request_resumes_with_all_its_tokens():
    scheduler, model = setup(9)
    for name in "abc":
        scheduler.add_request(distinct(name, 30, max_tokens=40))
    alone = {}
    for name in "abc":
        one, its_model = setup(9)
        one.add_request(distinct(name, 30, max_tokens=40))
        alone |= its_model.run()
    resumed = set()
    together: dict[str, list[int]] = {}
    while scheduler.has_requests():
        output = scheduler.schedule()
        resumed |= output.scheduled_cached_reqs.resumed_req_ids
        for req_id in output.scheduled_cached_reqs.resumed_req_ids:
            request = scheduler.requests[req_id]
            assert output.scheduled_cached_reqs.all_token_ids[req_id] == request.all_token_ids
        outputs = scheduler.update_from_output(output, model.execute(output))
        for out in outputs[0].outputs:
            together.setdefault(out.request_id, []).extend(out.new_token_ids)
            last = out
    assert resumed and together == alone
    assert last.num_preemptions >= 1


def test_a_preempted_request_finds_its_own_blocks_again():
    scheduler, model = setup(9)
    for name in "ab":
        scheduler.add_request(distinct(name, 60, max_tokens=20))
    # Both hold four blocks and need a fifth.
    for _ in range(6):
        model.step()
    request = scheduler.requests["b"]
    assert request.status is RequestStatus.PREEMPTED
    scheduler.finish_requests(["a"], RequestStatus.FINISHED_ABORTED)
    output = scheduler.schedule()
    assert output.scheduled_cached_reqs.num_computed_tokens == [48]


# The prefix cache


def test_a_hit_is_reported_and_not_computed_again():
    scheduler, model = setup()
    scheduler.add_request(make_request("a", 100, max_tokens=1))
    first = model.step()
    scheduler.add_request(make_request("b", 100, max_tokens=2))
    output = scheduler.schedule()
    assert scheduled(output) == {"b": 4}
    assert output.scheduled_new_reqs[0].num_computed_tokens == 96
    outputs = scheduler.update_from_output(output, model.execute(output))
    assert first[0].num_cached_tokens == 0
    assert outputs[0].outputs[0].num_cached_tokens == 96
    assert outputs[0].scheduler_stats.prefix_cache_queries == 100
    assert outputs[0].scheduler_stats.prefix_cache_hits == 96


def test_requests_of_one_step_share_what_it_computes():
    scheduler, model = setup()
    scheduler.add_request(make_request("a", 100, max_tokens=2))
    scheduler.add_request(make_request("b", 100, max_tokens=2))
    output = scheduler.schedule()
    assert scheduled(output) == {"a": 100, "b": 4}
    model.execute(output)


def test_salt_keeps_tenants_apart():
    scheduler, model = setup()
    hits = {}
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x"), ("d", None)):
        scheduler.add_request(make_request(name, 64, max_tokens=1, cache_salt=salt))
        hits[name] = model.step()[0].num_cached_tokens
    assert hits == {"a": 0, "b": 0, "c": 48, "d": 0}


def test_a_generated_continuation_is_found_in_the_next_turn():
    scheduler, model = setup(next_token=lambda tokens: 50)
    scheduler.add_request(make_request("a", 20, max_tokens=45))
    answer = model.run()["a"]
    prompt = [100 + i for i in range(20)] + answer + [7] * 10
    scheduler.add_request(make_request("b", prompt, max_tokens=1))
    # The KV of the last sampled token is never computed: 64 of 65 tokens are there.
    assert model.step()[0].num_cached_tokens == 64


def test_no_caching_computes_everything():
    scheduler, model = setup(prefix_caching=False)
    for name in "ab":
        scheduler.add_request(make_request(name, 64, max_tokens=1))
        output = scheduler.schedule()
        assert scheduled(output) == {name: 64}
        scheduler.update_from_output(output, model.execute(output))
    assert scheduler.block_hasher is None


def test_reset_forgets_what_is_not_in_use():
    scheduler, model = setup()
    scheduler.add_request(make_request("a", 64, max_tokens=2))
    model.step()
    assert not scheduler.reset_prefix_cache()
    model.run()
    assert scheduler.reset_prefix_cache()
    scheduler.add_request(make_request("b", 64, max_tokens=1))
    assert model.step()[0].num_cached_tokens == 0


def test_prompt_logprobs_compute_the_whole_prompt_and_come_once():
    scheduler, model = setup(9)
    scheduler.add_request(make_request("a", 40, max_tokens=1))
    model.run()
    scheduler.add_request(make_request("b", 40, max_tokens=50, prompt_logprobs=1))
    scheduler.add_request(distinct("c", 40, max_tokens=50))
    rows = LogprobsLists(
        np.array([[1, 2]] * 39, np.int32), np.zeros((39, 2), np.float32), np.ones(39, np.int32)
    )
    got = []
    while scheduler.has_requests():
        output = scheduler.schedule()
        result = model.execute(output)
        for new in output.scheduled_new_reqs:
            assert new.req_id != "b" or new.num_computed_tokens == 0
        if "b" in output.num_scheduled_tokens:
            result.prompt_logprobs_dict["b"] = rows
        for out in scheduler.update_from_output(output, result)[0].outputs:
            got += [out.new_prompt_logprobs] if out.new_prompt_logprobs else []
    assert len(got) == 1 and len(got[0]) == 39
    assert got[0][0].token_ids == [1, 2] and got[0][0].rank == 1


def test_logprobs_reach_the_client():
    scheduler, model = setup()
    scheduler.add_request(distinct("a", 10))
    output = scheduler.schedule()
    result = model.execute(output)
    result.logprobs["a"] = LogprobsLists(
        np.array([[9, 4]], np.int32), np.array([[-0.5, -0.25]], np.float32), np.array([2], np.int32)
    )
    (out,) = scheduler.update_from_output(output, result)[0].outputs
    (row,) = out.new_logprobs
    assert (row.token_ids, row.logprobs, row.rank) == ([9, 4], [-0.5, -0.25], 2)


def test_several_tokens_of_one_step_end_at_the_first_that_stops():
    scheduler, model = setup()
    scheduler.add_request(distinct("a", 10))
    output = scheduler.schedule()
    result = model.execute(output)
    result.sampled_token_ids = [[5, EOS, 6]]
    (out,) = scheduler.update_from_output(output, result)[0].outputs
    assert out.new_token_ids == [5, EOS] and out.finish_reason is FinishReason.STOP


def test_a_request_that_the_runner_gives_up_ends_with_its_error():
    scheduler, model = setup()
    scheduler.add_request(distinct("a", 10, max_tokens=3))
    scheduler.add_request(distinct("b", 10, max_tokens=3))
    output = scheduler.schedule()
    result = model.execute(output)
    result.request_errors["a"] = "no token is left"
    result.sampled_token_ids[0] = []
    outs = {out.request_id: out for out in scheduler.update_from_output(output, result)[0].outputs}
    assert outs["a"].finish_reason is FinishReason.ERROR and outs["a"].error == "no token is left"
    assert outs["a"].error_type == "EngineGenerateError" and not outs["b"].finished
    scheduler.check_integrity()
    assert len(model.run()["b"]) == 2


def test_events_tell_a_requests_story():
    scheduler, model = setup(9)
    for name in "ab":
        scheduler.add_request(distinct(name, 60, max_tokens=30))
    events: dict[str, list] = {"a": [], "b": []}
    while scheduler.has_requests():
        for out in model.step():
            events[out.request_id] += [event.type for event in out.events or []]
    queued, started, lost = (
        EngineCoreEventType.QUEUED,
        EngineCoreEventType.SCHEDULED,
        EngineCoreEventType.PREEMPTED,
    )
    assert events == {"a": [queued, started], "b": [queued, started, lost, started]}


def test_statistics_are_gauges_and_increments():
    scheduler, model = setup(9, max_num_seqs=2)
    for name in "abc":
        scheduler.add_request(distinct(name, 60, max_tokens=30))
    output = scheduler.schedule()
    outputs = scheduler.update_from_output(output, model.execute(output))
    stats = outputs[0].scheduler_stats
    assert (stats.num_running_reqs, stats.num_waiting_reqs) == (2, 1)
    assert stats.kv_cache_usage == 1.0 and stats.num_scheduled_tokens == 120
    assert stats.num_waiting_by_reason == {"capacity": 1, "deferred": 0}
    preemptions = 0
    while scheduler.has_requests():
        output = scheduler.schedule()
        for out in scheduler.update_from_output(output, model.execute(output)).values():
            preemptions += out.scheduler_stats.num_preemptions
    assert preemptions >= 1
    assert make_scheduler(log_stats=False).make_stats() is None


# Kinds of cache


@pytest.mark.parametrize(
    "specs",
    [
        (window_spec(40),),
        (chunked_spec(48),),
        (full_spec(), window_spec(24)),
        (full_spec(32), window_spec(40)),
        (full_spec(), window_spec(20), chunked_spec(32)),
        (full_spec(), mamba_spec("align")),
        (full_spec(), mamba_spec("none", block_size=1024)),
        (full_spec(48), mamba_spec("align", block_size=48)),
    ],
    ids=lambda specs: "+".join(type(spec).__name__ for spec in specs),
)
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_every_kind_of_cache_reads_right_under_pressure(specs, policy):
    """The model stand-in checks each token that an attention layer would read."""
    scheduler, model = setup(28, *specs, max_num_batched_tokens=64, policy=policy)
    for i in range(8):
        prompt = [100 + j for j in range(20 + 13 * (i % 4))] + [i] * i
        scheduler.add_request(
            make_request(f"r{i}", prompt, max_tokens=50, priority=i % 3, arrival_time=float(i))
        )
    tokens = model.run()
    assert {len(t) for t in tokens.values()} == {50} and len(tokens) == 8
    assert scheduler.kv_cache_manager.usage == 0


def test_blocks_beside_states_are_to_be_zeroed_once():
    scheduler, model = setup(20, full_spec(), mamba_spec("align"))
    scheduler.add_request(distinct("a", 16, max_tokens=3))
    output = scheduler.schedule()
    assert output.new_block_ids_to_zero == output.scheduled_new_reqs[0].block_ids
    scheduler.update_from_output(output, model.execute(output))
    output = scheduler.schedule()
    assert output.new_block_ids_to_zero == output.scheduled_cached_reqs.new_block_ids[0]
    scheduler.update_from_output(output, model.execute(output))
    assert scheduler.schedule().new_block_ids_to_zero is None


def test_chunks_end_where_states_can_be_found():
    scheduler, model = setup(40, full_spec(), mamba_spec("align"), max_num_batched_tokens=50)
    scheduler.add_request(distinct("a", 120, max_tokens=1))
    ends, at = [], 0
    while scheduler.has_unfinished_requests():
        output = scheduler.schedule()
        at += output.num_scheduled_tokens["a"]
        ends.append(at)
        scheduler.update_from_output(output, model.execute(output))
    assert ends == [48, 96, 112, 120]


def test_state_blocks_of_two_sizes_are_refused():
    with pytest.raises(ConfigError, match="--mamba-block-size"):
        make_scheduler(20, mamba_spec("align", 16), mamba_spec("align", 32))


# Structured output


class Grammars:
    """A grammar manager whose grammars become ready, and end, when told to."""

    class State:
        def __init__(self):
            self.is_grammar_ready = False
            self.error = None
            self.error_type = None
            self.cancelled = False

        def cancel(self):
            self.cancelled = True

    def __init__(self):
        self.accepted: dict[str, list[int]] = {}
        self.refuse: set[int] = set()
        self.final: set[int] = set()

    def grammar_init(self, request):
        request.structured_output_request = self.State()

    def grammar_bitmask(self, requests, ids):
        assert all(requests[i].structured_output_request.is_grammar_ready for i in ids)
        return np.full((len(ids), 32), -1, np.int32)

    def accept_tokens(self, request, token_ids):
        self.accepted.setdefault(request.request_id, []).extend(token_ids)
        return not self.refuse & set(token_ids)

    def is_terminated(self, request):
        return bool(self.final & set(self.accepted[request.request_id]))


def structured(request_id, length=10, **kwargs):
    from vllm.sampling_params import StructuredOutputsParams

    return distinct(
        request_id, length, structured_outputs=StructuredOutputsParams(json_object=True), **kwargs
    )


def test_a_request_waits_for_its_grammar_while_others_run():
    grammars = Grammars()
    scheduler, model = setup(grammar_manager=grammars, max_num_batched_tokens=30)
    scheduler.add_request(request := structured("s", 40, max_tokens=2))
    scheduler.add_request(distinct("a", 10, max_tokens=3))
    assert request.status is RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    output = scheduler.schedule()
    assert scheduled(output) == {"a": 10} and scheduler.get_grammar_bitmask(output) is None
    outputs = scheduler.update_from_output(output, model.execute(output))
    assert outputs[0].scheduler_stats.num_waiting_by_reason == {"capacity": 0, "deferred": 1}
    request.structured_output_request.is_grammar_ready = True
    # A chunk of the prompt samples nothing and needs no mask; its last one does.
    output = scheduler.schedule()
    assert output.has_structured_output_requests and scheduled(output)["s"] == 29
    assert scheduler.get_grammar_bitmask(output) is None
    scheduler.update_from_output(output, model.execute(output))
    output = scheduler.schedule()
    mask = scheduler.get_grammar_bitmask(output)
    assert mask.structured_output_request_ids == ["s"] and mask.grammar_bitmask.shape == (1, 32)
    scheduler.update_from_output(output, model.execute(output))
    model.run()
    assert len(grammars.accepted["s"]) == 2


def test_a_grammar_that_does_not_compile_ends_only_its_request():
    scheduler, model = setup(grammar_manager=Grammars())
    scheduler.add_request(bad := structured("bad"))
    scheduler.add_request(distinct("a", 10, max_tokens=2))
    bad.structured_output_request.is_grammar_ready = True
    bad.structured_output_request.error = "json: not a schema"
    outs = {out.request_id: out for out in model.step()}
    assert outs["bad"].finish_reason is FinishReason.ERROR
    assert outs["bad"].error == "json: not a schema"
    assert outs["bad"].error_type == "VLLMValidationError"
    assert not outs["a"].finished and len(model.run()["a"]) == 1


def test_a_complete_grammar_stops_its_request():
    grammars = Grammars()
    grammars.final = {50}
    scheduler, model = setup(grammar_manager=grammars, next_token=lambda tokens: 50)
    scheduler.add_request(request := structured("s"))
    request.structured_output_request.is_grammar_ready = True
    (out,) = model.step()
    assert out.finish_reason is FinishReason.STOP and out.new_token_ids == [50]


def test_a_token_that_the_grammar_refuses_ends_its_request_with_an_error():
    grammars = Grammars()
    grammars.refuse = {50}
    scheduler, model = setup(grammar_manager=grammars, next_token=lambda tokens: 50)
    scheduler.add_request(request := structured("s"))
    request.structured_output_request.is_grammar_ready = True
    (out,) = model.step()
    assert out.finish_reason is FinishReason.ERROR and "grammar" in out.error
    assert not scheduler.has_unfinished_requests()


def test_aborting_a_request_that_waits_for_its_grammar():
    scheduler, _ = setup(grammar_manager=Grammars())
    scheduler.add_request(request := structured("s"))
    scheduler.finish_requests("s", RequestStatus.FINISHED_ABORTED)
    scheduler.check_integrity()
    assert request.structured_output_request.cancelled
    assert scheduler.get_request_counts() == (0, 0)


def test_structured_output_without_a_manager_is_refused():
    scheduler, _ = setup()
    with pytest.raises(VLLMValidationError, match="structured"):
        scheduler.add_request(structured("s"))


def test_the_check_notices_a_request_in_two_places():
    scheduler, model = setup()
    scheduler.add_request(distinct("a", 10))
    model.step()
    scheduler.waiting.add_request(scheduler.requests["a"])
    with pytest.raises(AssertionError, match="waiting"):
        scheduler.check_integrity()


def test_the_check_notices_blocks_of_a_request_that_is_gone():
    scheduler, model = setup()
    scheduler.add_request(distinct("a", 10))
    model.step()
    scheduler.requests.pop("a")
    scheduler.running.clear()
    with pytest.raises(AssertionError, match="hold blocks"):
        scheduler.check_integrity()


def test_kv_events_are_collected_where_enabled():
    scheduler, model = setup(kv_events=True)
    scheduler.add_request(distinct("a", 40, max_tokens=1))
    model.step()
    (event,) = scheduler.take_events()
    assert len(event.block_hashes) == 2 and event.block_size == 16 and len(event.token_ids) == 32
