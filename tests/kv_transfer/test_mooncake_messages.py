"""What decoders and strangers may say to a prefill worker, and the other way round."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time

import httpx
import msgspec
import numpy as np
import pytest

from tests.core.helpers import make_request
from tests.entrypoints.server import BRIEF, PATIENCE, free_port
from tests.kv_transfer.test_mooncake_faults import PushCampaign, PushEngine
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.bootstrap import (
    BootstrapServer,
    Registration,
    make_bootstrap_app,
    register,
)
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.directory import Directory, ask_bootstrap
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.messages import (
    Discard,
    Heartbeat,
    MooncakeXferMetadata,
    MooncakeXferResponse,
    PeerLayout,
    Question,
    Status,
    Wanted,
    Withdrawal,
    decode_sealed,
    sealed,
)
from vllm.distributed.kv_transfer.kv_connector.v1.seals import prompt_digest
from vllm.distributed.kv_transfer.transport.channel import ZmqChannel
from vllm.distributed.kv_transfer.transport.memory import MemoryChannel
from vllm.errors import ConfigError, KVTransferError
from vllm.v1.engine import FinishReason

PROMPT = list(range(10, 60))


class Stranger:
    """A prefill engine with one prompt that waits, and somebody who writes to it by hand."""

    def __init__(self):
        self.campaign = PushCampaign.calm("fail")
        self.p, self.d = self.campaign.p, self.campaign.d
        self.channel = MemoryChannel(self.p.fabric, "stranger")
        self.layout = self.d.worker.receiver._layout
        request = make_request("r-p", PROMPT, max_tokens=1)
        request.kv_transfer_params = {"do_remote_decode": True, "transfer_id": "r"}
        self.p.scheduler.add_request(request)
        for _ in range(6):
            self.turn()
        self.before = self.d.cache.backing.clone()

    def turn(self):
        self.campaign.clock.now += 0.02
        self.p.step()

    def say(self, message, raw=False):
        self.channel.ask(self.p.channel.address, message if raw else sealed(message))
        for _ in range(4):
            self.turn()
        taken = self.channel.take_answers()
        answers = [decode_sealed(answer, MooncakeXferResponse) for _, answer in taken]
        # Others that wait are told so from time to time.
        final = [answer for answer in answers if answer.status is not Status.CONTINUE]
        return final[-1] if final else None

    def question(self, layout=None, layout_id=None, says=(), **wanted):
        layout = self.layout if layout is None else layout
        encoded = msgspec.msgpack.encode(layout)
        given = {
            "transfer_id": "r",
            "block_ids": [[5, 6, 7, 8]],
            "first_token": 0,
            "num_tokens": len(PROMPT),
            "digest": prompt_digest(PROMPT),
        }
        about = {
            "remote_session": layout.session,
            "remote_tp_rank": layout.tp_rank,
            "remote_tp_size": layout.tp_size,
        }
        return MooncakeXferMetadata(
            **{**about, **dict(says)},
            req_blocks={"name": Wanted(**{**given, **wanted})},
            layout_id=layout_id or hashlib.sha256(encoded).hexdigest(),
            layout=encoded,
        )

    def refused(self):
        stats = self.p.worker.take_stats() or {}
        return stats.get("refused_notifications", 0) + stats.get("failed_handshakes", 0)

    def nothing_was_written(self):
        return bool((self.d.cache.backing == self.before).all())

    def serves_on(self):
        self.campaign.d.others["http://p:8998"] = self.p
        self.campaign.request("another", list(range(100, 150)))
        return self.campaign.num_right == 1


def test_a_proper_question_is_answered_once_its_blocks_are_written():
    stranger = Stranger()
    answer = stranger.say(stranger.question())
    assert answer.status is Status.FINISH and answer.ok_reqs["name"].num_bytes > 0
    assert not stranger.nothing_was_written()
    assert stranger.p.free_blocks() == 39


def test_a_replay_gets_the_same_answer_and_writes_nothing():
    stranger = Stranger()
    question = stranger.question()
    first = stranger.say(question)
    stranger.before = stranger.d.cache.backing.clone()
    stranger.p.cache.backing.fill_(9)
    assert stranger.say(question) == first
    assert stranger.nothing_was_written()
    # Under another request id: it is fetched already.
    again = msgspec.structs.replace(question, req_blocks={"x": question.req_blocks["name"]})
    answer = stranger.say(again)
    assert answer.status is Status.ERROR and "fetched already" in answer.err_msg
    assert stranger.nothing_was_written()


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"HB:r",
        pickle.dumps({"transfer_id": "r"}),
        sealed("text"),
        sealed({"type": "xfer"}),
        sealed({"type": "withdraw", "requests": {"a": 5}}),
        sealed({"type": "other"}),
        sealed([1, [2, [3]]]),
        hashlib.blake2b(b"\xff" * 30, digest_size=16).digest() + b"\xff" * 30,
        hashlib.blake2b(b"\xa2\xff\xfe", digest_size=16).digest() + b"\xa2\xff\xfe",
    ],
)
def test_noise_is_refused_and_counted(message):
    stranger = Stranger()
    answer = stranger.say(message, raw=True)
    assert answer.status is Status.ERROR and "malformed" in answer.err_msg
    assert stranger.refused() == 1
    assert stranger.nothing_was_written() and stranger.serves_on()


def test_a_damaged_message_is_refused():
    stranger = Stranger()
    rng = np.random.default_rng(0)
    good = sealed(stranger.question())
    for _ in range(50):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= int(rng.integers(1, 256))
        assert stranger.say(bytes(bad), raw=True).status is Status.ERROR
    assert stranger.refused() == 50
    assert stranger.nothing_was_written() and stranger.serves_on()


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"block_ids": [[5, 6, 7, 1 << 40]]}, "block ids must be 0 to 39"),
        ({"block_ids": [[5, 6, 7, 40]]}, "block ids must be 0 to 39"),
        ({"block_ids": [[5, 6, 7, -1]]}, "block ids must be 0 to 39"),
        ({"block_ids": [[5]]}, "need 4 blocks"),
        ({"block_ids": []}, "1 to 64 groups"),
        ({"block_ids": [[1]] * 100}, "1 to 64 groups"),
        ({"block_ids": [[5, 6, 7, 8], [1]]}, "2 cache groups"),
        ({"num_tokens": 49}, "49 tokens are asked for, the prefill has 50"),
        ({"num_tokens": 1 << 50}, "contradict"),
        ({"first_token": 50}, "contradict"),
        ({"first_token": -1}, "contradict"),
        ({"digest": b"x" * 32}, "other tokens"),
        ({"transfer_id": ""}, "1 to 512 characters"),
        ({"transfer_id": "somebody else's"}, "no prefill"),
    ],
)
def test_what_cannot_be_meant_is_refused(wanted, why):
    stranger = Stranger()
    stranger.say(stranger.question(**wanted))
    for _ in range(60):
        stranger.turn()
    answer = stranger.say(stranger.question(**wanted))
    assert answer.status is Status.ERROR and why in answer.err_msg, answer
    assert stranger.nothing_was_written()


def change_descriptor(layout, change):
    descriptor = msgspec.json.decode(layout.descriptor)
    change(descriptor)
    return msgspec.structs.replace(layout, descriptor=msgspec.json.encode(descriptor).decode())


def grow(descriptor):
    descriptor["num_blocks"] = 1 << 30


def shift(descriptor):
    descriptor["layers"][0]["offset"] = -4096


def widen(descriptor):
    descriptor["layers"][1]["block_stride"] = 1 << 40


def move(descriptor):
    descriptor["base"] = 1 << 63


def crowd(descriptor):
    descriptor["layers"][0]["tokens_per_block"] = 1 << 40
    descriptor["size_bytes"] = 1 << 50


def rename(descriptor):
    descriptor["layers"][1]["name"] = "other"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda layout: change_descriptor(layout, grow), "end outside its"),
        (lambda layout: change_descriptor(layout, shift), "negative"),
        (lambda layout: change_descriptor(layout, widen), "end outside its"),
        (lambda layout: change_descriptor(layout, move), "beyond all addresses"),
        (lambda layout: change_descriptor(layout, crowd), "above 1048576"),
        (lambda layout: change_descriptor(layout, rename), "layers on one side only"),
        (lambda layout: msgspec.structs.replace(layout, descriptor="{}"), "descriptor"),
        (lambda layout: msgspec.structs.replace(layout, total_heads={}), "count the heads"),
        (lambda layout: msgspec.structs.replace(layout, tp_rank=7), "rank 7 of 1"),
        (
            lambda layout: msgspec.structs.replace(layout, tp_size=3, tp_rank=1),
            "cannot be shared out to 3 ranks",
        ),
        (lambda layout: msgspec.structs.replace(layout, agent=b"\xff"), "not the metadata"),
        (
            lambda layout: msgspec.structs.replace(
                layout, compatibility_hash="x", factors={"model": "other"}
            ),
            "model: m here, other there",
        ),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_at_the_handshake(change, why):
    stranger = Stranger()
    answer = stranger.say(stranger.question(layout=change(stranger.layout)))
    assert answer.status is Status.ERROR and why in answer.err_msg, answer
    assert stranger.refused() == 1
    assert stranger.nothing_was_written() and stranger.serves_on()


def test_a_layout_must_be_the_one_that_its_id_names():
    stranger = Stranger()
    answer = stranger.say(stranger.question(layout_id="0" * 64))
    assert answer.status is Status.ERROR and "its id names" in answer.err_msg
    answer = stranger.say(stranger.question(says={"remote_session": "another"}))
    assert answer.status is Status.ERROR and "another worker" in answer.err_msg
    unknown = msgspec.structs.replace(stranger.question(), layout=None, layout_id="1" * 64)
    assert stranger.say(unknown).status is Status.LAYOUT_MISS
    assert stranger.nothing_was_written()


def test_blocks_belong_to_the_decoder_that_asked_first():
    stranger = Stranger()
    beat = Heartbeat(remote_session="the first", remote_tp_size=1, transfer_ids=["r", "unknown"])
    assert stranger.say(beat) is None
    answer = stranger.say(stranger.question())
    assert answer.status is Status.ERROR and "another decoder's" in answer.err_msg
    # Nor can it give them away.
    free = stranger.p.free_blocks()
    gone = Withdrawal(
        remote_session="x", remote_tp_rank=0, remote_tp_size=1, requests={"name": "r"}
    )
    stranger.say(gone)
    assert stranger.p.free_blocks() == free
    assert stranger.nothing_was_written()


def test_more_questions_than_may_wait_are_refused():
    stranger = Stranger()
    stranger.p.worker.sender._settings.max_requests = 3
    asked = stranger.question(transfer_id="to come").req_blocks["name"]
    for name in "abc":
        many = msgspec.structs.replace(stranger.question(), req_blocks={name: asked})
        assert stranger.say(many) is None
    answer = stranger.say(msgspec.structs.replace(many, req_blocks={"d": asked}))
    assert answer.status is Status.ERROR and "max_requests" in answer.err_msg
    # For good: it does not matter that there is room later.
    stranger.p.worker.sender._settings.max_requests = 30
    again = stranger.say(msgspec.structs.replace(many, req_blocks={"d": asked}))
    assert again == answer


def test_answers_of_strangers_mean_nothing_to_a_decoder():
    campaign = PushCampaign.calm("fail")
    p, d = campaign.p, campaign.d
    second = make_request("r-d", PROMPT, max_tokens=3)
    second.kv_transfer_params = {
        "do_remote_prefill": True,
        "remote_bootstrap_addr": "http://p:8998",
        "remote_engine_id": "p",
        "transfer_id": "r",
    }
    d.scheduler.add_request(second)
    stranger = MemoryChannel(p.fabric, "stranger")
    lie = MooncakeXferResponse(status=Status.FINISH, ok_reqs={"r-d": [1, 1]})
    for _ in range(5):
        campaign.turn()
        stranger.answer(d.channel.address, msgspec.msgpack.encode(lie))
        stranger.answer(d.channel.address, sealed(lie))
        stranger.answer(d.channel.address, sealed({"status": 77}))
    assert "r-d" not in d.ended or d.ended["r-d"][1] is None
    assert d.worker.take_stats()["refused_notifications"] >= 8
    campaign.until(lambda: "r-d" in d.ended and d.ended["r-d"][1] is FinishReason.ERROR)


# The bootstrap server


@pytest.fixture
def bootstrap():
    port = free_port()
    server = BootstrapServer("127.0.0.1", port, make_bootstrap_app("e", 2, "secret", tell))
    TOLD.clear()
    yield f"http://127.0.0.1:{port}"
    server.close()


TOLD: list[tuple[str, bytes]] = []


def tell(address, message):
    TOLD.append((address, message))


def worker(**change):
    given = {
        "engine_id": "e",
        "dp_rank": 0,
        "tp_rank": 0,
        "pp_rank": 0,
        "addr": "tcp://127.0.0.1:5",
        "session": "secret",
    }
    return {**given, **change}


def test_decoders_find_all_ranks_once_all_have_registered(bootstrap):
    register(bootstrap, Registration(**worker()), PATIENCE)
    directory = Directory(ask_bootstrap)
    try:
        with pytest.raises(KVTransferError, match="knows no engine 'e'"):
            find(directory, bootstrap, "e")
        register(bootstrap, Registration(**worker(tp_rank=1, addr="tcp://127.0.0.1:6")), PATIENCE)
        # Again is no harm.
        register(bootstrap, Registration(**worker()), PATIENCE)
        directory.forget(bootstrap)
        found = find(directory, bootstrap, "e")
        assert found.addresses == ("tcp://127.0.0.1:5", "tcp://127.0.0.1:6")
        with pytest.raises(KVTransferError, match="knows no engine 'other', only e"):
            find(directory, bootstrap, "other")
    finally:
        directory.close()


def find(directory, address, engine_id):
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = directory.find(address, engine_id)
        if found is not None:
            return found
        time.sleep(0.01)
    raise AssertionError("no answer")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"session": "guess"}, 403),
        ({"engine_id": "other"}, 400),
        ({"tp_rank": 2}, 400),
        ({"addr": "tcp://127.0.0.1:7"}, 400),
        ({"addr": "http://x"}, 422),
        ({"dp_rank": -1}, 422),
        ({"tp_rank": "zero"}, 422),
    ],
)
def test_who_does_not_belong_is_not_registered(bootstrap, change, status):
    register(bootstrap, Registration(**worker()), PATIENCE)
    response = httpx.post(f"{bootstrap}/register", json=worker(**change), timeout=PATIENCE)
    assert response.status_code == status, response.text
    known = httpx.get(f"{bootstrap}/query", timeout=PATIENCE).json()
    assert known == {
        "0": {"engine_id": "e", "tp_size": 2, "worker_addr": {"0": {"0": "tcp://127.0.0.1:5"}}}
    }
    with pytest.raises(ConfigError, match="VLLM_MOONCAKE_BOOTSTRAP_PORT of its own"):
        BootstrapServer(
            "127.0.0.1", int(bootstrap.rpartition(":")[2]), make_bootstrap_app("", 1, "", tell)
        )


def test_all_workers_are_told_what_nobody_will_fetch(bootstrap):
    for rank in range(2):
        address = f"tcp://127.0.0.1:{5 + rank}"
        register(bootstrap, Registration(**worker(tp_rank=rank, addr=address)), PATIENCE)
    with httpx.Client(base_url=bootstrap, timeout=PATIENCE, limits=BRIEF) as http:
        response = http.post("/discard", json={"transfer_ids": ["r"]})
        refused = http.post("/discard", json={"transfer_ids": 5})
    assert response.status_code == 200
    assert [address for address, _ in TOLD] == ["tcp://127.0.0.1:5", "tcp://127.0.0.1:6"]
    assert decode_sealed(TOLD[0][1], Question) == Discard(transfer_ids=["r"])
    assert refused.status_code == 422


@pytest.mark.parametrize("early", [False, True])
def test_what_nobody_will_fetch_is_not_kept(early):
    stranger = Stranger()
    name = "later" if early else "r"
    assert stranger.say(Discard(transfer_ids=[name])) is None
    if early:
        request = make_request("later-p", PROMPT, max_tokens=1)
        request.kv_transfer_params = {"do_remote_decode": True, "transfer_id": name}
        stranger.p.scheduler.add_request(request)
        for _ in range(6):
            stranger.turn()
        stranger.say(Discard(transfer_ids=["r"]))
    assert stranger.p.free_blocks() == 39
    answer = stranger.say(stranger.question(transfer_id=name))
    assert answer.status is Status.ERROR and "failed elsewhere" in answer.err_msg
    assert stranger.nothing_was_written()


# The channel


def wait_for_one(take):
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = take()
        if found:
            return found
        time.sleep(0.005)
    raise AssertionError("nothing came")


def test_questions_are_heard_and_answered_over_sockets():
    listens, asks = ZmqChannel("127.0.0.1"), ZmqChannel(None)
    try:
        assert listens.address.startswith("tcp://127.0.0.1:") and asks.address == ""
        assert asks.ask(listens.address, b"question")
        ((who, question),) = wait_for_one(listens.take_questions)
        assert question == b"question"
        listens.answer(who, b"answer")
        assert wait_for_one(asks.take_answers) == [(listens.address, b"answer")]
        listens.answer(b"nobody", b"lost")
        assert not asks.ask("tcp://no address", b"x")
    finally:
        asks.close()
        listens.close()


def test_a_frozen_process_is_not_gone_and_a_dead_one_is():
    code = (
        "import sys, time\n"
        "from vllm.distributed.kv_transfer.transport.channel import ZmqChannel\n"
        "channel = ZmqChannel('127.0.0.1')\n"
        "print(channel.address, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    channel = ZmqChannel(None)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        channel.ask(address, b"hello")
        os.kill(process.pid, signal.SIGSTOP)
        for _ in range(8):
            assert not channel.is_gone(address)
            time.sleep(0.2)
        process.kill()
        process.wait()
        assert wait_for_one(lambda: channel.is_gone(address))
    finally:
        process.kill()
        process.wait()
        channel.close()


def test_a_host_that_is_not_ours_is_refused():
    with pytest.raises(ConfigError, match=r"VLLM_HOST_IP 192\.0\.2\.1 cannot be listened on"):
        ZmqChannel("192.0.2.1")


def test_layouts_say_what_a_writer_must_know():
    """The decoder's half of the handshake survives the wire."""
    stranger = Stranger()
    assert isinstance(stranger.d, PushEngine)
    encoded = msgspec.msgpack.encode(stranger.layout)
    assert msgspec.msgpack.decode(encoded, type=PeerLayout) == stranger.layout
