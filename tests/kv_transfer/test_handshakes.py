"""Answers to handshakes that are damaged, or lie: refused, whatever is wrong with them."""

from __future__ import annotations

import hashlib
import json
import random

import msgspec
import pytest
import zmq

from tests.core.helpers import make_request
from tests.entrypoints.server import PATIENCE, free_port
from tests.kv_transfer.campaigns import Clock
from tests.kv_transfer.test_faults import PullEngine
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import (
    AgentMetadata,
    HandshakePayload,
    decode_payload,
    encode_payload,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.side_channel import (
    HandshakeServer,
    ask_handshake,
)
from vllm.distributed.kv_transfer.transport.memory import MemoryFabric
from vllm.errors import KVTransferError

FACTORS = {"model": "m"}
NONSENSE = [None, -1, 0, 1, 2, 1 << 31, 1 << 62, "x", "", [], {}, 0.5, 1e308, True]


@pytest.fixture
def engines():
    fabric, clock = MemoryFabric(), Clock()
    p, d = (
        PullEngine(fabric, clock, name, role, "fail", "BHLNC")
        for name, role in (("p", "kv_producer"), ("d", "kv_consumer"))
    )
    d.others["p-host"] = p
    yield p, d
    for engine in (p, d):
        engine.worker.close()


def fetch(p, d, name):
    """One request through both; how it ended."""
    first = make_request(f"{name}-p", list(range(5, 40)), max_tokens=1)
    first.kv_transfer_params = {"do_remote_decode": True}
    p.scheduler.add_request(first)
    second = make_request(f"{name}-d", list(range(5, 40)), max_tokens=2)
    for _ in range(300):
        p.step()
        d.step()
        p.worker._clock.now += 0.02
        done = p.ended.get(f"{name}-p")
        if done is not None and done[1] is not None and second.kv_transfer_params is None:
            second.kv_transfer_params = {**done[2], "remote_host": "p-host"}
            d.scheduler.add_request(second)
        if d.ended.get(f"{name}-d", ([], None, None))[1] is not None:
            return d.ended[f"{name}-d"][1].name
    raise AssertionError("the request hangs")


def lie(payload: bytes, rng: random.Random) -> bytes:
    """A well-formed answer with one thing in it that is not so."""
    outer = msgspec.msgpack.decode(payload, type=HandshakePayload)
    metadata = msgspec.msgpack.decode(outer.agent_metadata_bytes)
    if rng.random() < 0.3:
        metadata[rng.choice(sorted(metadata))] = rng.choice(NONSENSE)
    else:
        descriptor = json.loads(metadata["descriptor"])
        *way, last = rng.choice(list(_ways(descriptor)))
        part = descriptor
        for step in way:
            part = part[step]
        near = isinstance(part[last], int) and rng.random() < 0.5
        part[last] = part[last] + rng.choice([-8, -1, 1, 8]) if near else rng.choice(NONSENSE)
        metadata["descriptor"] = json.dumps(descriptor)
    encoded = msgspec.msgpack.encode(metadata)
    outer.agent_metadata_bytes, outer.digest = encoded, hashlib.sha256(encoded).digest()
    return msgspec.msgpack.encode(outer)


def _ways(value, way=()):
    """The paths to everything inside a JSON value."""
    if way:
        yield way
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _ways(value[key], (*way, key))


def test_whatever_is_damaged_is_refused(engines):
    """Bits anywhere but in what is shown to people."""
    p, _ = engines
    rng = random.Random(5)
    good = decode_payload(p.payload, FACTORS)
    for _ in range(2000):
        spoilt = bytearray(p.payload)
        for _ in range(rng.randint(1, 4)):
            spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
        try:
            found = decode_payload(bytes(spoilt), FACTORS)
        except KVTransferError:
            continue
        assert found == good


def test_short_and_foreign_answers_are_refused(engines):
    p, _ = engines
    for answer in (b"", b"\xc1", p.payload[:-1], p.payload[: len(p.payload) // 2], b"\xa2\xff\xff"):
        with pytest.raises(KVTransferError, match="malformed"):
            decode_payload(answer, FACTORS)
    metadata = decode_payload(p.payload, FACTORS)
    assert isinstance(metadata, AgentMetadata)
    with pytest.raises(KVTransferError, match="model: other here, m there"):
        decode_payload(p.payload, {"model": "other"})
    assert decode_payload(encode_payload({"model": "other"}, metadata), None) == metadata


def test_a_lying_peer_fails_its_own_requests_only(engines):
    """The transfer thread lives on, and so does every block."""
    p, d = engines
    rng = random.Random(11)
    honest, failed = p.payload, 0
    free = d.free_blocks()
    for index in range(60):
        p.payload = lie(honest, rng)
        d.worker._book.retire("p")
        failed += fetch(p, d, f"r{index}") == "ERROR"
        d.scheduler.reset_prefix_cache()
    assert failed > 20
    p.payload = honest
    d.worker._book.retire("p")
    assert fetch(p, d, "last") != "ERROR"
    for _ in range(20):
        d.step()
    assert d.free_blocks() == free


@pytest.mark.parametrize(
    "noise", [b"", b"\xff", b"\x93\xa3\xff\xfe\xfd\x00\x00", b"\x93\x01\x02\x03"]
)
def test_noise_does_not_end_the_handshake_server(noise):
    port = free_port()
    server = HandshakeServer("127.0.0.1", port, {(0, 0): b"payload"})
    context = zmq.Context()
    try:
        socket = context.socket(zmq.REQ)
        socket.connect(f"tcp://127.0.0.1:{port}")
        socket.send(noise)
        assert socket.poll(1000 * PATIENCE)
        assert msgspec.msgpack.decode(socket.recv())["error"] == "not a handshake request"
        assert ask_handshake("127.0.0.1", port, 0, PATIENCE) == b"payload"
    finally:
        context.destroy(linger=0)
        server.close()
