"""What hostile peers and clients may send: any structure, at every door.

Whatever comes is taken for what it is or refused and counted; no thread ends, no byte of a cache
changes, no block is lost, and honest requests are served after it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from tests.core.helpers import make_request
from tests.effort import by_effort
from tests.kv_transfer.campaigns import NUM_BLOCKS
from tests.kv_transfer.test_faults import PullCampaign
from tests.kv_transfer.test_mooncake_faults import PushCampaign
from tests.kv_transfer.test_mooncake_messages import worker
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake import messages as mooncake
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.bootstrap import make_bootstrap_app
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.directory import (
    engines_of,
    read_entries,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import letters
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import messages as nixl
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.side_channel import HandshakeServer
from vllm.distributed.kv_transfer.transport.memory import MemoryChannel, MemoryPort
from vllm.errors import KVTransferError, VLLMValidationError

MANY = settings(max_examples=by_effort(60, 300), suppress_health_check=[HealthCheck.too_slow])
FEW = settings(max_examples=by_effort(15, 100), suppress_health_check=[HealthCheck.too_slow])
PROMPT = list(range(10, 60))

numbers = st.integers(-(1 << 63), (1 << 64) - 1) | st.sampled_from(
    [-1, 0, 1, 2, 7, 1 << 20, 1 << 31, 1 << 40, (1 << 62) + 1]
)
leaves = st.none() | st.booleans() | numbers | st.floats(allow_nan=False) | st.text(max_size=8)
texts = st.text(max_size=6)


def nested(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaf,
        lambda part: st.lists(part, max_size=4) | st.dictionaries(texts, part, max_size=4),
        max_leaves=12,
    )


packable = nested(leaves | st.binary(max_size=12))
jsonable = nested(leaves.filter(lambda leaf: not isinstance(leaf, int) or abs(leaf) < 1 << 63))


@st.composite
def bent(draw: st.DrawFn, good: Any, parts: st.SearchStrategy[Any] = packable) -> Any:
    """``good``, built of dicts and lists, with something in it that is something else."""
    if isinstance(good, dict) and good and draw(st.integers(0, 5)):
        name = draw(st.sampled_from(sorted(good)))
        return {**good, name: draw(bent(good[name], parts))}
    if isinstance(good, list) and good and draw(st.integers(0, 5)):
        place = draw(st.integers(0, len(good) - 1))
        return [*good[:place], draw(bent(good[place], parts)), *good[place + 1 :]]
    return draw(parts)


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Some bytes are others: text that is no text, lengths that are none."""
    spoilt = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        spoilt[draw(st.integers(0, len(good) - 1))] = draw(st.integers(0, 255))
    return bytes(spoilt)


# What clients say

PULL = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "p",
    "remote_request_id": "r",
    "remote_host": "p-host",
    "remote_port": 1,
    "remote_block_ids": [[1, 2, 3, 4]],
    "remote_num_tokens": 50,
    "tp_size": 1,
    "pp_size": 1,
    "remote_session": "s",
    "remote_lease_slot": 0,
    "remote_lease_generation": 0,
    "remote_seal": "0",
    "num_readers": 1,
    "digest": "",
}
PUSH = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "transfer_id": "r",
    "remote_bootstrap_addr": "http://p:8998",
    "remote_engine_id": "p",
    "num_readers": 1,
}


def submit(engine, name, params):
    """False where the engine refuses them at once."""
    request = make_request(name, PROMPT, max_tokens=1)
    request.kv_transfer_params = params
    try:
        engine.scheduler.add_request(request)
    except VLLMValidationError as error:
        assert "kv_transfer_params" in str(error)
        return False
    return True


@pytest.mark.parametrize(("campaign_class", "good"), [(PullCampaign, PULL), (PushCampaign, PUSH)])
def test_parameters_are_refused_or_fetch_nothing(campaign_class, good):
    campaign = campaign_class.calm("fail")
    engine = campaign.d
    before = engine.cache.backing.clone()
    count = [0]

    @MANY
    @given(bent(good, jsonable))
    def check(params):
        if not isinstance(params, dict):
            return
        count[0] += 1
        name = f"r{count[0]}"
        params = json.loads(json.dumps(params))
        if not submit(engine, name, params):
            return
        campaign.until(lambda: campaign.has_ended(engine, name))
        if params.get("do_remote_prefill"):
            assert (engine.cache.backing == before).all()
        else:
            before.copy_(engine.cache.backing)

    check()
    campaign.settle()


# What NIXL's peers say


class Stranger:
    """A prefill engine with a lease, and an agent that knows it and says what it likes."""

    def __init__(self):
        self.campaign = PullCampaign.calm("fail", way="push staged")
        self.p = self.campaign.p
        assert submit(self.p, "r", {"do_remote_decode": True})
        self.campaign.until(lambda: self.campaign.has_ended(self.p, "r"))
        self.campaign.turn()
        self.port = MemoryPort(self.p.fabric, "stranger")
        self.port.connect(self.p.port.metadata())
        self.before = self.p.cache.backing.clone()

    def says(self, *messages):
        for message in messages:
            self.port.notify(self.p.port.name, message)
        for _ in range(2):
            self.p.step()
        assert (self.p.cache.backing == self.before).all()
        assert self.p.worker.leases.held == {"r"}
        return (self.p.worker.take_stats() or {}).get("refused_notifications", 0)

    def ends(self):
        """The engine serves on."""
        self.campaign.request("honest", list(range(100, 150)))
        assert self.campaign.num_right == 1
        self.campaign.settle()


def test_noise_among_notifications_is_refused_and_counted():
    stranger = Stranger()

    @MANY
    @given(st.binary(max_size=60), st.sampled_from([b"", b"ASK:", b"TOLD:", b"HELLO:"]), packable)
    def check(noise, prefix, structure):
        refused = stranger.says(prefix + noise, prefix + msgspec.msgpack.encode(structure))
        assert refused == 2

    check()
    stranger.ends()


UNITS = [b"\1\0\0\0", b"\0\0\0\0", b"\1\0\0\0", b"\0\0\0\0"]


@pytest.mark.parametrize("is_known", [True, False])
def test_questions_of_a_peer_reach_nothing_that_it_has_no_lease_of(is_known):
    stranger = Stranger()
    if is_known:
        hello = msgspec.msgpack.decode(stranger.campaign.d.payload)
        metadata = msgspec.msgpack.decode(hello["agent_metadata_bytes"])
        metadata["agent"] = stranger.port.metadata()
        assert stranger.says(b"HELLO:" + payload_of(hello, metadata)) == 0
    target = stranger.campaign.d.cache.backing
    before = target.clone()

    good = [5, "another", 0, letters.PUSH, 0, [[0, 0]], False, [UNITS]]
    told = msgspec.msgpack.encode([5, 0, 0, False, "why"])

    @MANY
    @given(bent(good), damaged(msgspec.msgpack.encode(good)), damaged(told))
    def check(question, broken, answer):
        stranger.says(b"ASK:" + msgspec.msgpack.encode(question))
        stranger.says(b"ASK:" + broken, b"TOLD:" + answer)
        assert (target == before).all()

    check()
    # Right in everything, but with blocks of nobody's or of somebody else's.
    for blocks in ([0], [30], [39], [-1], [1 << 20]):
        source = b"".join(block.to_bytes(4, "little", signed=True) for block in blocks)
        question = [900 + blocks[0], "r", 0, letters.PUSH, 0, [], False, [[source, *UNITS[1:]]]]
        stranger.says(b"ASK:" + msgspec.msgpack.encode(question))
        assert (target == before).all()
    stranger.port.take_notifications()
    stranger.ends()


def payload_of(outer, metadata):
    encoded = msgspec.msgpack.encode(metadata)
    digest = hashlib.sha256(encoded).digest()
    return msgspec.msgpack.encode({**outer, "agent_metadata_bytes": encoded, "digest": digest})


def test_introductions_are_refused_or_harmless():
    stranger = Stranger()
    outer = msgspec.msgpack.decode(stranger.campaign.d.payload)
    metadata = msgspec.msgpack.decode(outer["agent_metadata_bytes"])
    metadata["agent"] = stranger.port.metadata()

    @MANY
    @given(bent(metadata))
    def check(lie):
        stranger.says(b"HELLO:" + payload_of(outer, lie))

    check()
    stranger.ends()


def test_handshakes_that_are_none_are_refused():
    """By whoever asks and by whoever is asked."""
    payload = PullCampaign.calm("fail").p.payload
    server = HandshakeServer.__new__(HandshakeServer)
    server._payloads, server.num_refused = {(0, 0): payload}, 0
    good = msgspec.msgpack.decode(payload)

    @MANY
    @given(bent(good), bent(["get_meta_msg", 0, 0]), st.binary(max_size=40))
    def check(answer, question, noise):
        for encoded in (msgspec.msgpack.encode(answer), noise):
            try:
                found = nixl.decode_payload(encoded, {"model": "m"})
            except KVTransferError:
                continue
            assert found == nixl.decode_payload(payload, {"model": "m"})
        for asked in (msgspec.msgpack.encode(question), noise):
            before = server.num_refused
            assert server._answer(asked).payload in (None, payload)
            if asked != msgspec.msgpack.encode(["get_meta_msg", 0, 0]):
                assert server.num_refused == before + 1

    check()


# What Mooncake's peers say


class Asker:
    """Both engines of Mooncake, P with a prefill that waits, D with a load that does."""

    def __init__(self):
        self.campaign = PushCampaign.calm("fail")
        self.p, self.d = self.campaign.p, self.campaign.d
        ask = {"do_remote_decode": True, "transfer_id": "r"}
        assert submit(self.p, "r-p", ask)
        for _ in range(6):
            self.p.step()
        self.channel = MemoryChannel(self.p.fabric, "stranger")
        self.before = [engine.cache.backing.clone() for engine in (self.p, self.d)]

    def nothing_has_changed(self):
        caches = [engine.cache.backing for engine in (self.p, self.d)]
        return all((a == b).all() for a, b in zip(caches, self.before, strict=True))

    def asks(self, message):
        self.channel.ask(self.p.channel.address, message)
        self.p.step()
        assert self.nothing_has_changed()
        return self.channel.take_answers()

    def ends(self):
        self.campaign.request("honest", list(range(100, 150)))
        assert self.campaign.num_right == 1
        self.campaign.settle()


def questions_of(layout):
    encoded = msgspec.msgpack.encode(layout)
    wanted = {
        "transfer_id": "r",
        "block_ids": [[5, 6, 7, 8]],
        "first_token": 0,
        "num_tokens": 50,
        # Of another prompt than the one that waits: nothing of it may ever be written.
        "digest": b"0" * 32,
        "num_readers": 1,
    }
    about = {
        "remote_session": layout.session,
        "remote_tp_rank": 0,
        "remote_tp_size": 1,
    }
    layout_id = hashlib.sha256(encoded).hexdigest()
    return (
        {
            **about,
            "type": "xfer",
            "req_blocks": {"a": wanted},
            "layout_id": layout_id,
            "layout": encoded,
        },
        {**about, "type": "withdraw", "requests": {"a": "another"}, "num_readers": 1},
        {"type": "heartbeat", "remote_session": "s", "remote_tp_size": 1, "transfer_ids": ["r"]},
        {"type": "discard", "transfer_ids": ["x"]},
    )


@pytest.mark.parametrize("kind", range(4))
def test_questions_to_a_prefill_worker_are_answered_or_refused(kind):
    asker = Asker()
    good = questions_of(asker.d.worker.receiver._layout)[kind]

    @FEW
    @given(bent(good), damaged(msgspec.msgpack.encode(good)), packable, st.binary(max_size=40))
    def check(question, broken, structure, noise):
        asker.asks(mooncake.sealed(question))
        asker.asks(hashlib.blake2b(broken, digest_size=16).digest() + broken)
        for message in (mooncake.sealed(structure), noise):
            asker.p.worker.take_stats()
            assert asker.asks(message)
            assert asker.p.worker.take_stats()["refused_notifications"] == 1

    check()
    asker.ends()


def test_layouts_of_hostile_decoders_are_refused_or_harmless():
    asker = Asker()
    layout = msgspec.to_builtins(asker.d.worker.receiver._layout, builtin_types=(bytes,))
    (good, *_) = questions_of(asker.d.worker.receiver._layout)

    @MANY
    @given(bent(layout))
    def check(lie):
        encoded = msgspec.msgpack.encode(lie)
        layout_id = hashlib.sha256(encoded).hexdigest()
        question = {**good, "layout": encoded, "layout_id": layout_id}
        if isinstance(lie, dict) and isinstance(lie.get("session"), str):
            question["remote_session"] = lie["session"]
        asker.asks(mooncake.sealed(question))

    check()
    asker.ends()


def test_answers_to_a_decoder_end_no_load_that_they_are_not_for():
    asker = Asker()
    load = {**PUSH, "transfer_id": "never"}
    assert submit(asker.d, "d", load)
    for _ in range(3):
        asker.campaign.turn()
    asker.before = [engine.cache.backing.clone() for engine in (asker.p, asker.d)]
    good = {"status": 0, "ok_reqs": {"d": [1, 1]}, "err_reqs": ["d"], "err_msg": "no"}

    @FEW
    @given(bent(good), packable)
    def check(answer, structure):
        for message in (mooncake.sealed(answer), mooncake.sealed(structure), b"x"):
            asker.channel.answer(asker.d.channel.address, message)
        asker.d.step()
        assert "d" in asker.d.worker.receiver._loads
        assert asker.nothing_has_changed()

    check()
    asker.campaign.until(lambda: asker.campaign.has_ended(asker.d, "d"))
    asker.campaign.turns(100)
    assert asker.d.free_blocks() == NUM_BLOCKS - 1
    asker.ends()


# Bootstrap servers

WORKER = worker()


def test_requests_to_a_bootstrap_server_register_nobody():
    told: list[tuple[str, bytes]] = []
    app = make_bootstrap_app("e", 2, "secret", lambda *said: told.append(said))
    client = TestClient(app)
    assert client.post("/register", json=WORKER).status_code == 200
    known = client.get("/query").json()

    @FEW
    @given(bent({**WORKER, "session": "guess"}, jsonable), jsonable, st.binary(max_size=40))
    def check(worker, structure, noise):
        for path in ("/register", "/discard"):
            for body in (json.dumps(worker).encode(), json.dumps(structure).encode(), noise):
                for headers in ({"content-type": "application/json"}, {}):
                    response = client.post(path, content=body, headers=headers)
                    assert response.status_code in (400, 403, 422), response.text
        assert client.get("/query").json() == known

    check()
    assert not told


def test_answers_of_bootstrap_servers_name_engines_or_are_refused():
    good = {"0": {"engine_id": "e", "worker_addr": {"0": {"0": "tcp://h:5"}}, "tp_size": 1}}
    crowd = {"0": {**good["0"], "tp_size": 1 << 60}}
    with pytest.raises(KVTransferError, match="ranks"):
        engines_of("http://h", read_entries("http://h", json.dumps(crowd).encode()))

    @MANY
    @given(bent(good, jsonable), st.binary(max_size=60))
    def check(answer, noise):
        for body in (json.dumps(answer).encode(), noise):
            try:
                found = engines_of("http://h", read_entries("http://h", body))
            except KVTransferError:
                continue
            for engine in found.values():
                assert all(address.startswith("tcp://") for address in engine.addresses)

    check()
