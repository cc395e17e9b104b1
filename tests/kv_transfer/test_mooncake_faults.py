"""Mooncake's connector over the in-memory port and channel while things go wrong, by seed."""

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
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.assembly import make_worker
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.directory import EngineEntry
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.messages import (
    MooncakeStepMetadata,
    MooncakeTimes,
    parse_params,
)
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector import (
    MooncakeConnector,
)
from vllm.distributed.kv_transfer.transport.memory import MemoryChannel
from vllm.errors import KVTransferError
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

EXTRA = {"kv_lease_duration": 3.0, "transfer_timeout": 1.0, "mooncake_protocol": "tcp"}
TIMES = MooncakeTimes(unclaimed=4.0, silence=1.0)


class PushEngine(MemoryEngine):
    """One side of a Mooncake pair."""

    connector_class = MooncakeConnector

    def __init__(self, fabric, clock, name, role, policy, layout, block_size=BLOCK):
        super().__init__(fabric, clock, name, role, policy, layout, block_size, EXTRA)
        self.register_cache()
        self.channel = MemoryChannel(fabric, self.port.name)
        self.worker = make_worker(
            self.local_side(),
            self.connector._settings,
            TIMES,
            self.port,
            self.channel,
            sends=self.transfer.is_kv_producer,
            receives=self.transfer.is_kv_consumer,
            ask=self.look_up,
            clock=clock,
            threaded=False,
        )

    def look_up(self, address):
        other = self.others.get(address)
        if other is None or other.port.name in self.fabric.dead:
            raise KVTransferError(f"no bootstrap server at {address}")
        return {0: EngineEntry(engine_id=other.name, worker_addr={0: {0: other.channel.address}})}

    def step(self):
        # Bootstrap servers are asked in threads, which know nothing of the test's clock.
        if self.worker.receiver is not None:
            wait(list(self.worker.receiver._directory._asking.values()))
        super().step()

    def is_quiet(self):
        sender, receiver = self.worker.sender, self.worker.receiver
        return not (sender and sender._prefills) and not (receiver and receiver._loads)


class PushCampaign(Campaign):
    """Requests go to both engines at once."""

    def engine(self, name, role, layout, block_size=BLOCK):
        return PushEngine(self.fabric, self.clock, name, role, self.policy, layout, block_size)

    def meet(self):
        self.d.others["http://p:8998"] = self.p

    def request(self, name, prompt):
        p, d = self.p, self.d
        first = make_request(f"{name}-p", prompt, max_tokens=1)
        first.kv_transfer_params = {"do_remote_decode": True, "transfer_id": name}
        second = make_request(f"{name}-d", prompt, max_tokens=3)
        second.kv_transfer_params = {
            "do_remote_prefill": True,
            "remote_bootstrap_addr": "http://p:8998",
            "remote_engine_id": "p",
            "transfer_id": name,
        }
        late = self.rng.choice((0, 0, 0, 1, 7, 60))
        if self.rng.random() < 0.5:
            p.scheduler.add_request(first)
            self.turns(late)
            d.scheduler.add_request(second)
        else:
            d.scheduler.add_request(second)
            self.turns(late)
            p.scheduler.add_request(first)
        what = self.rng.random()
        if what < 0.1:
            self.turns(self.rng.randrange(5))
            self.restart_prefill()
        elif what < 0.2:
            # The client of the prefill goes away.
            self.faults.count += 1
            self.turns(self.rng.randrange(3))
            p.scheduler.finish_requests([f"{name}-p"], RequestStatus.FINISHED_ABORTED)
        elif what < 0.3:
            self.faults.count += 1
            self.turns(self.rng.randrange(6))
            d.scheduler.finish_requests([f"{name}-d"], RequestStatus.FINISHED_ABORTED)
            self.turns(3)
            return
        self.judge(f"{name}-d", prompt)


def test_requests_end_right_or_with_an_error_whatever_fails():
    made, num_right, num_failed, _ = run_until(PushCampaign, 150, 0)
    assert made >= 150 and num_right > 0 and num_failed > 0


@pytest.mark.slow
def test_two_thousand_faults():
    made, num_right, num_failed, seeds = run_until(PushCampaign, 2000, 1000)
    print(f"{made} faults, {seeds} seeds: {num_right} right, {num_failed} failed")
    assert made >= 2000 and num_right > 100 and num_failed > 30


def test_a_corruption_on_the_way_would_be_noticed():
    """The campaign can fail: with bytes changed in the transfer it does."""
    assert num_wrong(PushCampaign, range(4))


def test_blocks_of_a_hanging_write_are_kept_back_until_it_ends():
    """The request fails in time; what is written later hits nobody's blocks."""
    campaign = PushCampaign.calm("fail")
    campaign.faults.hang = 1.0
    campaign.request("stuck", list(range(10, 60)))
    assert campaign.num_failed == 1
    assert campaign.d.free_blocks() == NUM_BLOCKS - 1 - 4
    assert campaign.d.worker.take_stats()["quarantined_blocks"] == 4
    campaign.faults.hang = 0.0
    campaign.request("next", list(range(100, 150)))
    assert campaign.num_right == 1
    campaign.settle()
    assert campaign.p.worker.take_stats()["failed_sends"] == 1


def test_a_given_up_load_is_computed_into_other_blocks():
    campaign = PushCampaign.calm("recompute")
    campaign.faults.hang = 1.0
    campaign.request("stuck", list(range(10, 60)))
    assert campaign.num_right == 1
    assert campaign.d.free_blocks() == NUM_BLOCKS - 1 - 4
    campaign.settle()


def test_a_frozen_prefill_keeps_the_blocks_until_it_wakes_or_dies():
    """Silence is no proof that nothing will be written."""
    for wakes in (True, False):
        campaign = PushCampaign.calm("fail")
        p, d = campaign.p, campaign.d
        second = make_request("r-d", list(range(10, 60)), max_tokens=3)
        second.kv_transfer_params = {
            "do_remote_prefill": True,
            "remote_bootstrap_addr": "http://p:8998",
            "remote_engine_id": "p",
            "transfer_id": "r",
        }
        d.scheduler.add_request(second)
        for _ in range(100):
            campaign.clock.now += 0.02
            d.step()
        assert d.ended["r-d"][1] is FinishReason.ERROR
        assert d.free_blocks() == NUM_BLOCKS - 1 - 4
        if not wakes:
            campaign.fabric.kill(p.port.name)
        for _ in range(100):
            campaign.clock.now += 0.02
            d.step()
            if wakes:
                p.step()
        assert d.free_blocks() == NUM_BLOCKS - 1


def test_a_bootstrap_server_that_has_just_failed_ends_no_thread():
    """Others wait, or are given up, while its failure is still remembered."""
    campaign = PushCampaign.calm("fail")
    d = campaign.d
    d.others.clear()
    given = {
        "do_remote_prefill": True,
        "remote_bootstrap_addr": "http://p:8998",
        "remote_engine_id": "p",
        "transfer_id": "r",
    }
    second = make_request("r", list(range(10, 60)), max_tokens=3)
    second.kv_transfer_params = given
    d.scheduler.add_request(second)
    d.step()
    campaign.until(lambda: campaign.has_ended(d, "r"))
    assert d.ended["r"][1] is FinishReason.ERROR
    params = parse_params(given)
    for late in ({"expected": {"x": params}}, {"declined": {"y": params}}):
        d.worker.submit(MooncakeStepMetadata(**late))
        d.worker.turn()
    d.worker.submit(MooncakeStepMetadata(unexpected=["x"]))
    campaign.meet()
    campaign.turns(60)
    campaign.request("next", list(range(100, 150)))
    assert campaign.num_right == 1
