"""The push protocol over the in-memory port and channel while things go wrong, by seed.

As ``test_faults``: every request ends with the right token or an error, no block is lost, and both
engines serve on.
"""

from __future__ import annotations

import random

import pytest

from tests.core.helpers import make_request, make_vllm_config
from tests.kv_cache.helpers import full, placed
from tests.kv_transfer.test_faults import BLOCK, NUM_BLOCKS, Campaign, Engine, expected_tokens
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.assembly import make_worker
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.directory import EngineEntry
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.messages import MooncakeTimes
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector import (
    MooncakeConnector,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.peers import LocalSide
from vllm.distributed.kv_transfer.transport.memory import MemoryChannel, MemoryPort
from vllm.errors import KVTransferError
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.descriptors import describe
from vllm.v1.kv_cache.rearrange import Shard
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.request import RequestStatus

EXTRA = {"kv_lease_duration": 3.0, "transfer_timeout": 1.0, "mooncake_protocol": "tcp"}
TIMES = MooncakeTimes(unclaimed=4.0, silence=1.0)
FAULTS = ("delay", "hang", "fail", "lose", "duplicate", "reorder", "garbage")


class PushEngine(Engine):
    """One side of a Mooncake pair."""

    def __init__(self, fabric, clock, name, role, policy, layout, block_size=BLOCK, tokens=None):
        self.fabric, self.name, self.block_size = fabric, name, block_size
        vllm_config = make_vllm_config()
        transfer = KVTransferConfig(
            kv_connector="MooncakeConnector",
            engine_id=name,
            kv_role=role,
            kv_load_failure_policy=policy,
            kv_connector_extra_config=EXTRA,
        )
        object.__setattr__(vllm_config, "kv_transfer_config", transfer)
        object.__setattr__(vllm_config, "instance_id", f"{name} since {clock.now}")
        spec = full(2, 4, block_size)
        self.config = placed([{"l.0": spec, "l.1": spec}], KVCacheLayout(layout), NUM_BLOCKS)
        self.cache = allocate_kv_cache(self.config)
        self.connector = MooncakeConnector(vllm_config, KVConnectorRole.SCHEDULER, self.config)
        self.scheduler = Scheduler(
            vllm_config, self.config, None, block_size, True, connector=self.connector
        )
        base = self.cache.backing.data_ptr()
        self.port = MemoryPort(fabric, f"{name}-agent-{random.Random(clock.now).random()}")
        self.port.register([(base, self.cache.backing.numel())], "cpu")
        local = LocalSide(
            engine_id=name,
            session=vllm_config.instance_id,
            shard=Shard(),
            descriptor=describe(self.config, base),
            total_heads={"l.0": 2, "l.1": 2},
            factors={"model": "m"},
        )
        self.channel = MemoryChannel(fabric, self.port.name)
        self.worker = make_worker(
            local,
            self.connector._settings,
            TIMES,
            self.port,
            self.channel,
            sends=transfer.is_kv_producer,
            receives=transfer.is_kv_consumer,
            ask=self.look_up,
            clock=clock,
            threaded=False,
        )
        self.tables, self.tokens = {}, {}
        self.others = {}
        self.ended = {}

    def look_up(self, address):
        other = self.others.get(address)
        if other is None or other.port.name in self.fabric.dead:
            raise KVTransferError(f"no bootstrap server at {address}")
        return {0: EngineEntry(engine_id=other.name, worker_addr={0: {0: other.channel.address}})}


class PushCampaign(Campaign):
    """Requests go to both engines at once."""

    def engine(self, name, role, layout, block_size=BLOCK):
        return PushEngine(self.fabric, self.clock, name, role, self.policy, layout, block_size)

    def __init__(self, seed, corrupt=0.0):
        super().__init__(seed, corrupt)
        self.d.others["http://p:8998"] = self.p

    def restart_prefill(self):
        self.faults.count += 1
        self.clock.now += 0.02
        self.fabric.kill(self.p.port.name)
        self.p = self.engine("p", "kv_producer", "BHLNC")
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
        self.until(lambda: f"{name}-d" in d.ended and d.ended[f"{name}-d"][1] is not None)
        tokens, reason, _ = d.ended[f"{name}-d"]
        if reason is FinishReason.ERROR:
            assert self.policy == "fail"
            self.num_failed += 1
        elif tokens == expected_tokens(prompt, 3):
            self.num_right += 1
        else:
            self.wrong.append(name)

    def turns(self, count):
        for _ in range(count):
            self.turn()

    def settle(self):
        """What hung ends at last; then every block must be back."""
        for name in FAULTS:
            setattr(self.faults, name, 0.0)
        for port in list(self.fabric.ports.values()):
            port.release_hung()
        self.turns(700)
        for engine in (self.p, self.d):
            assert engine.free_blocks() == NUM_BLOCKS - 1
            assert not engine.worker.sender or not engine.worker.sender._prefills
            assert not engine.worker.receiver or not engine.worker.receiver._loads
            engine.scheduler.check_integrity()


def run_until(num_faults, first_seed):
    made = num_right = num_failed = 0
    seed = first_seed
    while made < num_faults:
        campaign = PushCampaign(seed)
        campaign.run()
        assert not campaign.wrong, f"seed {seed}: wrong tokens for {campaign.wrong}"
        made += campaign.faults.count
        num_right += campaign.num_right
        num_failed += campaign.num_failed
        seed += 1
    return made, num_right, num_failed


def test_requests_end_right_or_with_an_error_whatever_fails():
    made, num_right, num_failed = run_until(150, 0)
    assert made >= 150 and num_right > 0 and num_failed > 0


@pytest.mark.slow
def test_two_thousand_faults():
    made, num_right, num_failed = run_until(2000, 1000)
    assert made >= 2000 and num_right > 100 and num_failed > 30


def test_a_corruption_on_the_way_would_be_noticed():
    """The campaign can fail: with bytes changed in the transfer it does."""
    wrong = 0
    for seed in range(4):
        campaign = PushCampaign(seed, corrupt=1.0)
        campaign.run()
        wrong += len(campaign.wrong)
    assert wrong


def calm(policy):
    """A pair without faults."""
    campaign = PushCampaign(3)
    for name in FAULTS:
        setattr(campaign.faults, name, 0.0)
    campaign.policy = policy
    campaign.rng = random.Random(99)
    campaign.clock.now += 1
    campaign.p = campaign.engine("p", "kv_producer", "BHLNC")
    campaign.d = campaign.engine("d", "kv_consumer", "LBHNC")
    campaign.d.others["http://p:8998"] = campaign.p
    return campaign


def test_blocks_of_a_hanging_write_are_kept_back_until_it_ends():
    """The request fails in time; what is written later hits nobody's blocks."""
    campaign = calm("fail")
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
    campaign = calm("recompute")
    campaign.faults.hang = 1.0
    campaign.request("stuck", list(range(10, 60)))
    assert campaign.num_right == 1
    assert campaign.d.free_blocks() == NUM_BLOCKS - 1 - 4
    campaign.settle()


def test_a_frozen_prefill_keeps_the_blocks_until_it_wakes_or_dies():
    """Silence is no proof that nothing will be written."""
    for wakes in (True, False):
        campaign = calm("fail")
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
