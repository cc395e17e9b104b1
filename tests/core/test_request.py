import pytest

from tests.core.helpers import EOS, make_request
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.request import Request, RequestStatus


def after(tokens, **params):
    """A request of 10 prompt tokens that has just sampled ``tokens``."""
    request = make_request("r", 10, **params)
    request.append_output_token_ids(tokens)
    return request


def test_a_message_becomes_a_request():
    message = EngineCoreRequest(
        "id",
        [1, 2, 3],
        SamplingParams(max_tokens=7),
        arrival_time=12.5,
        priority=3,
        cache_salt="s",
        client_index=2,
        kv_transfer_params={"a": 1},
    )
    request = Request.from_engine_core_request(message)
    assert request.request_id == "id" and request.prompt_token_ids == [1, 2, 3]
    assert request.arrival_time == 12.5 and request.priority == 3 and request.client_index == 2
    assert request.cache_salt == "s" and request.kv_transfer_params == {"a": 1}
    assert request.max_total_tokens == 10


def test_output_does_not_change_the_prompt():
    request = after([7, 8])
    assert request.num_prompt_tokens == 10 and len(request.prompt_token_ids) == 10
    assert request.all_token_ids[10:] == request.output_token_ids == [7, 8]
    assert request.num_tokens == 12 and request.num_output_tokens == 2


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (RequestStatus.FINISHED_STOPPED, FinishReason.STOP),
        (RequestStatus.FINISHED_LENGTH_CAPPED, FinishReason.LENGTH),
        (RequestStatus.FINISHED_ABORTED, FinishReason.ABORT),
        (RequestStatus.FINISHED_IGNORED, FinishReason.LENGTH),
        (RequestStatus.FINISHED_ERROR, FinishReason.ERROR),
        (RequestStatus.RUNNING, None),
        (RequestStatus.PREEMPTED, None),
    ],
)
def test_final_states_have_a_reason(status, reason):
    assert RequestStatus.get_finished_reason(status) is reason
    assert RequestStatus.is_finished(status) == (reason is not None)


def test_eos_stops_without_a_stop_reason():
    request = after([5, EOS])
    assert check_stop(request)
    assert request.status is RequestStatus.FINISHED_STOPPED and request.stop_reason is None


def test_a_stop_token_is_named():
    request = after([5, 9], stop_token_ids=[9])
    assert check_stop(request)
    assert request.status is RequestStatus.FINISHED_STOPPED and request.stop_reason == 9


def test_ignored_eos_goes_on_unless_it_is_a_stop_token_too():
    assert not check_stop(after([EOS], ignore_eos=True))
    request = after([EOS], ignore_eos=True, stop_token_ids=[EOS])
    assert check_stop(request) and request.stop_reason == EOS


def test_nothing_stops_before_min_tokens():
    assert not check_stop(after([4, EOS], min_tokens=3))
    assert not check_stop(after([4, 9], min_tokens=3, stop_token_ids=[9]))
    assert check_stop(after([4, 4, EOS], min_tokens=3))


def test_length_ends_at_max_tokens():
    assert not check_stop(after([4] * 4, max_tokens=5))
    request = after([4] * 5, max_tokens=5)
    assert check_stop(request) and request.status is RequestStatus.FINISHED_LENGTH_CAPPED


def test_eos_as_the_last_permitted_token_is_a_stop():
    request = after([4, EOS], max_tokens=2)
    assert check_stop(request) and request.status is RequestStatus.FINISHED_STOPPED


def test_the_longest_request_ends_before_max_tokens_and_min_tokens():
    request = after([4, 4], max_tokens=None, min_tokens=9)
    assert not check_stop(request)
    request.max_total_tokens = 12
    assert check_stop(request) and request.status is RequestStatus.FINISHED_LENGTH_CAPPED


def test_events_are_taken_once():
    from vllm.v1.engine import EngineCoreEventType

    request = make_request("r", 4)
    assert request.take_events() is None
    request.record_event(EngineCoreEventType.QUEUED, 1.5)
    (event,) = request.take_events()
    assert event.type is EngineCoreEventType.QUEUED and event.timestamp == 1.5
    assert request.take_events() is None
