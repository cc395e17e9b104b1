"""KV events as an independent subscriber, which knows only the wire format, sees them."""

import msgspec
import pytest
import zmq

from tests.core.helpers import make_scheduler
from tests.entrypoints.server import PATIENCE, free_port
from tests.kv_transfer.conftest import greedy, prompt_of
from vllm.errors import ConfigError
from vllm.v1.engine.kv_events import NullKVEventSource


class Subscriber:
    """Plain ZMQ and msgpack: arrays, tagged by class name."""

    def __init__(self, endpoint, topic=""):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.connect(endpoint)
        self.socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        self.numbers = []

    def receive(self, milliseconds=1000 * PATIENCE):
        if not self.socket.poll(milliseconds):
            return None
        topic, number, payload = self.socket.recv_multipart()
        self.numbers.append(int.from_bytes(number, "big"))
        timestamp, events, *_ = msgspec.msgpack.decode(payload)
        assert timestamp > 1.7e9
        return topic, events

    def close(self):
        self.context.destroy(linger=0)


def events_config(port, **more):
    return {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://127.0.0.1:{port}",
        **more,
    }


@pytest.fixture
def subscriber():
    port = free_port()
    subscriber = Subscriber(f"tcp://127.0.0.1:{port}", "kv@")
    subscriber.port = port
    yield subscriber
    subscriber.close()


def first_batch(llm, subscriber):
    """Of a prompt, and its tokens. PUB drops what comes before the subscription."""
    num_sent = 0
    while not subscriber.numbers:
        assert num_sent < 10 * PATIENCE, "nothing was published"
        assert llm.reset_prefix_cache()
        num_sent += 1
        subscriber.receive(100)
    while subscriber.numbers[-1] < num_sent - 1:
        subscriber.receive()
    prompt = prompt_of(40, 100)
    greedy(llm, [prompt], count=1)
    return prompt["prompt_token_ids"], subscriber.receive()


def test_stored_removed_and_cleared_blocks_are_published(make_llm, subscriber):
    llm = make_llm(
        kv_events_config=events_config(subscriber.port, topic="kv@me"), num_gpu_blocks_override=18
    )
    tokens, (topic, events) = first_batch(llm, subscriber)
    assert topic == b"kv@me"
    ((kind, hashes, parent, token_ids, size, *rest),) = events
    assert kind == "BlockStored" and parent is None and size == 16
    assert token_ids == tokens[:32] and len(hashes) == 2
    assert all(isinstance(value, int) and value < 1 << 64 for value in hashes)
    lora_id, medium, lora_name, extra_keys, group, spec_kind = rest[:6]
    assert (medium, group, spec_kind) == ("GPU", 0, "full_attention")
    assert lora_id is None and lora_name is None and extra_keys is None
    # The same prefix continued: its parent is the block before.
    greedy(llm, [{"prompt_token_ids": tokens + list(range(10, 30))}], count=1)
    _, events = subscriber.receive()
    assert events[0][0] == "BlockStored" and events[0][2] == hashes[-1]
    # A pool of 17 blocks: a long prompt takes the place of the others.
    greedy(llm, [prompt_of(250, 9)], count=1)
    _, events = subscriber.receive()
    removed = [event for event in events if event[0] == "BlockRemoved"]
    assert {value for event in removed for value in event[1]} & set(hashes)
    assert llm.reset_prefix_cache()
    batches = [subscriber.receive()]
    while batches[-1][1][-1] != ["AllBlocksCleared"]:
        batches.append(subscriber.receive())
    assert subscriber.numbers == list(range(subscriber.numbers[0], subscriber.numbers[-1] + 1))


def test_missed_batches_are_replayed(make_llm, subscriber):
    replay_port = free_port()
    config = events_config(
        subscriber.port, replay_endpoint=f"tcp://127.0.0.1:{replay_port}", buffer_steps=3
    )
    llm = make_llm(kv_events_config=config)
    for seed in range(5):
        greedy(llm, [prompt_of(40, seed)], count=1)
    asking = subscriber.context.socket(zmq.DEALER)
    asking.connect(f"tcp://127.0.0.1:{replay_port}")
    asking.send_multipart((b"", b"no number"))
    asking.send_multipart((b"", (3).to_bytes(8, "big")))
    answers = []
    while not answers or answers[-1][2] != (-1).to_bytes(8, "big", signed=True):
        assert asking.poll(1000 * PATIENCE)
        answers.append(asking.recv_multipart())
    numbers = [int.from_bytes(answer[2], "big") for answer in answers[:-1]]
    assert numbers == [3, 4]
    _, events, *_ = msgspec.msgpack.decode(answers[0][3])
    assert (
        events[0][0] == "BlockStored" and events[0][3] == prompt_of(40, 3)["prompt_token_ids"][:32]
    )


def test_hashes_can_be_whole(make_llm, subscriber, monkeypatch):
    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", "0")
    llm = make_llm(kv_events_config=events_config(subscriber.port, topic="kv@"))
    _, (_, events) = first_batch(llm, subscriber)
    assert all(len(value) == 32 for value in events[0][1])


def test_offloading_tells_of_its_medium(make_llm, subscriber):
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"num_cpu_blocks": 4},
    }
    llm = make_llm(
        kv_events_config=events_config(subscriber.port, topic="kv@"), kv_transfer_config=transfer
    )
    _, (_, events) = first_batch(llm, subscriber)
    stored = [event for event in events if event[0] == "BlockStored" and event[6] == "CPU"]
    assert len(stored) == 2
    greedy(llm, [prompt_of(60, 8)], count=1)
    _, events = subscriber.receive()
    assert sorted({event[2] for event in events if event[0] == "BlockRemoved"}) == ["CPU"]


def test_an_endpoint_that_is_taken_is_named(make_llm, subscriber):
    socket = subscriber.context.socket(zmq.PUB)
    socket.bind(f"tcp://127.0.0.1:{subscriber.port}")
    with pytest.raises(ConfigError, match=r"--kv-events-config\.endpoint tcp"):
        make_llm(kv_events_config=events_config(subscriber.port))


def test_events_that_nobody_listens_to_do_not_pile_up():
    scheduler = make_scheduler(9)
    pool = scheduler.kv_cache_manager.block_pool
    pool.enable_kv_cache_events = True
    NullKVEventSource().publish(scheduler)
    assert scheduler.reset_prefix_cache()
    NullKVEventSource().publish(scheduler)
    assert scheduler.take_events() == []
    assert scheduler.reset_prefix_cache()
    assert scheduler.take_events() != []
