"""NIXL's connector over the in-memory port while things go wrong, by seed."""

from __future__ import annotations

from concurrent.futures import wait

import pytest

from tests.core.helpers import make_request
from tests.kv_transfer.campaigns import (
    BLOCK,
    NUM_BLOCKS,
    Campaign,
    MemoryEngine,
    num_wrong,
    run_until,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.assembly import make_ring, make_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlConnector
from vllm.errors import KVTransferError

EXTRA = {
    "kv_lease_duration": 3.0,
    "push_registration_timeout": 3.0,
    "transfer_timeout": 1.0,
    "handshake_timeout": 0.5,
    # One or two units a chunk.
    "staging_slot_bytes": 4096,
    "staging_slots": 3,
}
WAYS = ("pull", "pull staged", "push", "push staged", "pull through the host buffer")


class PullEngine(MemoryEngine):
    """One side of a NIXL pair; with some ways the other side pushes."""

    connector_class = NixlConnector

    def __init__(self, fabric, clock, name, role, policy, layout, block_size=BLOCK, way="pull"):
        path = "staging" if "staged" in way else "descriptors"
        extra = {**EXTRA, "transfer_path": path}
        super().__init__(fabric, clock, name, role, policy, layout, block_size, extra)
        on_host = "host" in way
        settings = self.connector._settings
        self.ring = make_ring(self.cache.backing, settings) if way != "pull" else None
        if not on_host:
            self.register_cache()
        if self.ring is not None:
            self.port.register([self.ring.region], "cpu")
        self.worker, self.payload = make_worker(
            self.local_side(
                ring=None if self.ring is None else self.ring.shape, registers_blocks=not on_host
            ),
            settings,
            self.port,
            self.ask,
            ring=self.ring,
            pushes="push" in way,
            threaded=False,
        )
        self.worker._clock = clock

    def ask(self, host, port, rank, timeout):
        other = self.others.get(host)
        if other is None or other.port.name in self.fabric.dead:
            raise KVTransferError(f"no handshake from {host}")
        return other.payload

    def step(self):
        # Handshakes have threads of their own, which know nothing of the test's clock.
        wait([future for future, _ in self.worker._book._asking.values()])
        super().step()

    def is_quiet(self):
        ring_is_free = self.ring is None or self.ring.num_free == self.ring.shape.num_slots
        return self.worker.is_idle and ring_is_free


class PullCampaign(Campaign):
    """Prefill, then decode with what P has answered."""

    def __init__(self, seed, corrupt=0.0, way=None):
        self.way = way or WAYS[seed % len(WAYS)]
        super().__init__(seed, corrupt)

    def engine(self, name, role, layout, block_size=BLOCK):
        return PullEngine(
            self.fabric, self.clock, name, role, self.policy, layout, block_size, self.way
        )

    def meet(self):
        self.d.others["p-host"] = self.p

    def request(self, name, prompt):
        p, d = self.p, self.d
        first = make_request(f"{name}-p", prompt, max_tokens=1)
        first.kv_transfer_params = {"do_remote_decode": True}
        p.scheduler.add_request(first)
        self.until(lambda: self.has_ended(p, f"{name}-p"))
        params = p.ended[f"{name}-p"][2]
        second = make_request(f"{name}-d", prompt, max_tokens=3)
        second.kv_transfer_params = {**params, "remote_host": "p-host"} if params else None
        if self.rng.random() < 0.1:
            # The client takes longer than the lease.
            self.faults.count += 1
            self.turns(170)
        d.scheduler.add_request(second)
        if self.rng.random() < 0.1:
            self.restart_prefill()
        self.judge(f"{name}-d", prompt)


def test_requests_end_right_or_with_an_error_whatever_fails():
    made, num_right, num_failed, _ = run_until(PullCampaign, 150, 0)
    assert made >= 150 and num_right > 0 and num_failed > 0


@pytest.mark.slow
def test_two_thousand_faults():
    made, num_right, num_failed, seeds = run_until(PullCampaign, 2000, 1000)
    print(f"{made} faults, {seeds} seeds: {num_right} right, {num_failed} failed")
    assert made >= 2000 and num_right > 100 and num_failed > 100


def test_a_corruption_on_the_way_would_be_noticed():
    """The campaign can fail: with bytes changed in the transfer it does."""
    assert num_wrong(PullCampaign, range(5))


@pytest.mark.parametrize("way", WAYS)
def test_blocks_of_a_hanging_load_are_kept_back_until_it_ends(way):
    """The request fails in time; what is written later hits nobody's blocks."""
    campaign = PullCampaign.calm("fail", way=way)
    campaign.faults.hang = 1.0
    prompt = list(range(10, 60))
    campaign.request("stuck", prompt)
    assert campaign.num_failed == 1
    assert campaign.d.free_blocks() == NUM_BLOCKS - 1 - 4
    assert campaign.d.worker.take_stats()["quarantined_blocks"] == 4
    campaign.faults.hang = 0.0
    campaign.request("next", list(range(100, 150)))
    assert campaign.num_right == 1
    campaign.settle()


@pytest.mark.parametrize("way", WAYS)
def test_a_given_up_load_is_computed_into_other_blocks(way):
    campaign = PullCampaign.calm("recompute", way=way)
    campaign.faults.hang = 1.0
    campaign.request("stuck", list(range(10, 60)))
    assert campaign.num_right == 1
    assert campaign.d.free_blocks() == NUM_BLOCKS - 1 - 4
    campaign.settle()
