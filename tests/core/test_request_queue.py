import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.helpers import make_request
from vllm.errors import ConfigError
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue


def names(queue):
    return [request.request_id for request in queue]


def test_fcfs_serves_in_order_of_arrival_and_returns_to_the_front():
    queue = create_request_queue("fcfs")
    a, b, c = (make_request(name, 5, priority=p) for name, p in (("a", 9), ("b", 0), ("c", 5)))
    for request in (a, b, c):
        queue.add_request(request)
    assert queue.pop_request() is a
    queue.prepend_request(a)
    assert names(queue) == ["a", "b", "c"]
    first, second = queue.pop_request(), queue.pop_request()
    queue.prepend_requests([first, second])
    assert names(queue) == ["a", "b", "c"]


def test_priority_serves_the_smallest_number_then_the_earliest_arrival():
    queue = create_request_queue("priority")
    for name, priority, arrival in (
        ("late", 0, 3.0),
        ("low", 5, 0.0),
        ("early", 0, 1.0),
        ("urgent", -1, 9.0),
        ("same", 0, 1.0),
    ):
        queue.add_request(make_request(name, 5, priority=priority, arrival_time=arrival))
    assert names(queue) == ["urgent", "early", "same", "late", "low"]
    assert queue.peek_request().request_id == "urgent"
    assert [queue.pop_request().request_id for _ in range(5)] == [
        "urgent", "early", "same", "late", "low",
    ]  # fmt: skip


@pytest.mark.parametrize("policy", list(SchedulingPolicy))
def test_an_empty_queue_has_no_next_request(policy):
    queue = create_request_queue(policy)
    with pytest.raises(IndexError):
        queue.peek_request()
    with pytest.raises(IndexError):
        queue.pop_request()
    with pytest.raises(KeyError):
        queue.remove_request(make_request("r", 5))


@given(
    st.sampled_from(list(SchedulingPolicy)),
    st.lists(st.tuples(st.sampled_from("arpw"), st.integers(0, 3)), max_size=40),
)
@settings(deadline=None)
def test_a_queue_is_a_sorted_list(policy, actions):
    queue = create_request_queue(policy)
    model: list = []
    number = 0
    for action, choice in actions:
        if action == "a":
            request = make_request(f"r{number}", 5, priority=choice, arrival_time=float(number))
            number += 1
            queue.add_request(request)
            model.append(request)
        elif action == "r" and model:
            request = model.pop(choice % len(model))
            assert request in queue
            queue.remove_request(request)
            assert request not in queue
        elif action == "p" and model:
            assert queue.pop_request() is model.pop(0)
        elif action == "w" and model:
            # Taken and put back, as by a preemption.
            request = queue.pop_request()
            queue.prepend_request(request)
        if policy is SchedulingPolicy.PRIORITY:
            model.sort(key=lambda r: r.priority_key)
        assert names(queue) == [request.request_id for request in model]
        assert len(queue) == len(model)


def test_unknown_policy_names_the_option():
    with pytest.raises(ConfigError, match="--scheduling-policy must be fcfs or priority"):
        create_request_queue("sjf")
