"""Leases between hosts whose clocks have nothing in common."""

from __future__ import annotations

import pytest

from tests.core.helpers import make_request
from tests.kv_transfer.campaigns import Clock, expected_tokens
from tests.kv_transfer.test_faults import PullEngine
from vllm.distributed.kv_transfer.transport.memory import MemoryFabric
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

LEASE = 3.0
PROMPT = list(range(5, 60))


class Hosts:
    """A prefill and a decode engine; the decoder's clock is off by ``offset`` seconds."""

    def __init__(self, offset):
        fabric = MemoryFabric()
        self.clocks = Clock(), Clock()
        self.clocks[1].now += offset
        self.p = PullEngine(fabric, self.clocks[0], "p", "kv_producer", "fail", "BHLNC")
        self.d = PullEngine(fabric, self.clocks[1], "d", "kv_consumer", "fail", "LBHNC", 32)
        self.d.others["p-host"] = self.p

    def turn(self, seconds=0.02, *engines):
        for clock in self.clocks:
            clock.now += seconds
        for engine in engines or (self.p, self.d):
            engine.step()

    def prefill(self, name):
        request = make_request(name, PROMPT, max_tokens=1)
        request.kv_transfer_params = {"do_remote_decode": True}
        self.p.scheduler.add_request(request)
        while self.p.ended.get(name, ([], None))[1] is None:
            self.turn()
        return {**self.p.ended[name][2], "remote_host": "p-host"}

    def decode(self, name, params):
        request = make_request(name, PROMPT, max_tokens=3)
        request.kv_transfer_params = params
        self.d.scheduler.add_request(request)
        for _ in range(400):
            self.turn()
            if self.d.ended.get(name, ([], None))[1] is not None:
                return self.d.ended[name]
        raise AssertionError("the request hangs")

    @property
    def num_free(self):
        return self.p.free_blocks(), self.d.free_blocks()


@pytest.mark.parametrize("offset", [-990.0, 0.0, 5e8])
def test_clocks_of_two_hosts_are_never_compared(offset):
    """A lease ends by the clock of who gave it, whatever the other's says."""
    hosts = Hosts(offset)
    free = hosts.num_free
    params = hosts.prefill("early")
    # Nothing that is sent is a time; what is, is a duration.
    times = [value for value in params.values() if isinstance(value, float)]
    assert times == [LEASE]
    for _ in range(int(LEASE / 0.02) - 20):
        hosts.turn()
    tokens, reason, _ = hosts.decode("early-d", params)
    assert reason is FinishReason.LENGTH and tokens == expected_tokens(PROMPT, 3)
    params = hosts.prefill("late")
    for _ in range(int(LEASE / 0.02) + 20):
        hosts.turn()
    assert hosts.p.worker.take_stats()["expired_leases"] == 1
    assert hosts.decode("late-d", params)[1] is FinishReason.ERROR
    assert hosts.d.worker.take_stats()["late_reads"] == 1
    for _ in range(60):
        hosts.turn()
    assert hosts.num_free == free


@pytest.mark.parametrize("offset", [-990.0, 5e8])
def test_a_waiting_request_keeps_its_lease_whatever_the_clocks_say(offset):
    """Heartbeats say "longer", not "until"."""
    hosts = Hosts(offset)
    params = hosts.prefill("r")
    waiting = make_request("r-d", PROMPT, max_tokens=3)
    waiting.kv_transfer_params = params
    # It is known, but not admitted: others have 38 of the 39 blocks, and want more.
    for name in ("first", "second"):
        tokens = [3 + (ord(name[0]) + i) % 900 for i in range(600)]
        hosts.d.scheduler.add_request(make_request(name, tokens, max_tokens=600))
    for _ in range(5):
        hosts.turn()
    hosts.d.scheduler.add_request(waiting)
    for _ in range(int(3 * LEASE / 0.1)):
        hosts.turn(0.1)
    assert hosts.p.worker.leases and "r-d" not in hosts.d.ended
    assert "expired_leases" not in (hosts.p.worker.take_stats() or {})
    hosts.d.scheduler.finish_requests(["first", "second"], RequestStatus.FINISHED_ABORTED)
    for _ in range(200):
        hosts.turn()
    tokens, reason, _ = hosts.d.ended["r-d"]
    assert reason is FinishReason.LENGTH and tokens == expected_tokens(PROMPT, 3)
    assert not hosts.p.worker.leases
