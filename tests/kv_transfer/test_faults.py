"""Prefill and decode over the in-memory port while things go wrong, by seed.

Two schedulers and two transfer workers as in two engines; the model is a function of what lies in
the cache, so that a wrong byte is a wrong token. Every request ends with the right token or an
error, no block is lost, and both engines serve on.
"""

from __future__ import annotations

import random
import zlib

import pytest
import torch

from tests.core.helpers import make_request, make_vllm_config
from tests.kv_cache.helpers import full, placed
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.assembly import make_ring, make_worker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.peers import LocalSide
from vllm.distributed.kv_transfer.transport.memory import Faults, MemoryFabric, MemoryPort
from vllm.errors import KVTransferError
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.descriptors import describe
from vllm.v1.kv_cache.rearrange import Shard
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

BLOCK = 16
NUM_BLOCKS = 40
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


class Clock:
    """Time goes by with the turns, so that nothing depends on the machine's speed."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Engine:
    """Scheduler, connector halves, a cache in memory, and a model that reads it."""

    def __init__(self, fabric, clock, name, role, policy, layout, block_size=BLOCK, way="pull"):
        self.fabric, self.name, self.block_size = fabric, name, block_size
        vllm_config = make_vllm_config()
        transfer = KVTransferConfig(
            kv_connector="NixlConnector",
            engine_id=name,
            kv_role=role,
            kv_load_failure_policy=policy,
            kv_connector_extra_config={
                **EXTRA,
                "transfer_path": "staging" if "staged" in way else "descriptors",
            },
        )
        object.__setattr__(vllm_config, "kv_transfer_config", transfer)
        object.__setattr__(vllm_config, "instance_id", f"{name} since {clock.now}")
        spec = full(2, 4, block_size)
        self.config = placed([{"l.0": spec, "l.1": spec}], KVCacheLayout(layout), NUM_BLOCKS)
        self.cache = allocate_kv_cache(self.config)
        self.connector = NixlConnector(vllm_config, KVConnectorRole.SCHEDULER, self.config)
        self.scheduler = Scheduler(
            vllm_config, self.config, None, block_size, True, connector=self.connector
        )
        on_host = "host" in way
        settings = self.connector._settings
        ring = make_ring(self.cache.backing, settings) if way != "pull" else None
        base = self.cache.backing.data_ptr()
        self.port = MemoryPort(fabric, f"{name}-agent-{random.Random(clock.now).random()}")
        if not on_host:
            self.port.register([(base, self.cache.backing.numel())], "cpu")
        if ring is not None:
            self.port.register([ring.region], "cpu")
        local = LocalSide(
            engine_id=name,
            session=vllm_config.instance_id,
            shard=Shard(),
            descriptor=describe(self.config, base),
            total_heads={"l.0": 2, "l.1": 2},
            factors={"model": "m"},
            ring=None if ring is None else ring.shape,
            registers_blocks=not on_host,
        )
        self.ring = ring
        self.worker, self.payload = make_worker(
            local,
            settings,
            self.port,
            self.ask,
            ring=ring,
            pushes="push" in way,
            threaded=False,
        )
        self.worker._clock = clock
        self.tables, self.tokens = {}, {}
        self.others = {}
        self.ended = {}

    def ask(self, host, port, rank, timeout):
        other = self.others.get(host)
        if other is None or other.port.name in self.fabric.dead:
            raise KVTransferError(f"no handshake from {host}")
        return other.payload

    def slots(self, request_id, count):
        token = torch.arange(count)
        row = torch.tensor(self.tables[request_id])
        return row[token // self.block_size], token % self.block_size

    def store(self, request_id, start, end):
        """KV of a token says which tokens come before it."""
        block, inside = self.slots(request_id, end)
        for position in range(start, end):
            text = repr(self.tokens[request_id][: position + 1])
            for layer, view in self.cache.items():
                value = zlib.crc32(f"{layer}{text}".encode()) % 9973
                numbers = value + torch.arange(16).reshape(2, 8)
                view[block[position], :, inside[position]] = numbers.float()

    def next_token(self, request_id):
        """Depends on every byte of the request's cache."""
        count = len(self.tokens[request_id])
        block, inside = self.slots(request_id, count)
        total = 0
        for view in self.cache.values():
            seen = view[block, :, inside].contiguous()
            total = zlib.crc32(seen.numpy().tobytes(), total)
        return 3 + total % 900

    def step(self):
        output = self.scheduler.schedule()
        self.scheduler.check_integrity()
        for request_id in output.finished_req_ids:
            self.tables.pop(request_id, None)
            self.tokens.pop(request_id, None)
        computed = {}
        for new in output.scheduled_new_reqs:
            self.tokens[new.req_id] = list(new.prompt_token_ids)
            self.tables[new.req_id] = list(new.block_ids[0])
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            computed[request_id] = cached.num_computed_tokens[i]
            ids = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                self.tokens[request_id] = list(cached.all_token_ids[request_id])
                self.tables[request_id] = list(ids[0])
            elif ids is not None:
                self.tables[request_id] += ids[0]
        self.worker.submit(output.kv_connector_metadata)
        sampled = []
        for request_id, start in computed.items():
            end = start + output.num_scheduled_tokens[request_id]
            self.store(request_id, start, end)
            if end < len(self.tokens[request_id]):
                sampled.append([])
                continue
            token = self.next_token(request_id)
            self.tokens[request_id].append(token)
            sampled.append([token])
        self.worker.turn()
        results = self.worker.take_results()
        report = KVConnectorOutput(
            finished_sending=results.finished_sending,
            finished_recving=results.finished_recving,
            failed_recving=results.failed_recving,
            stuck_recving=results.stuck_recving,
        )
        names = list(computed)
        outputs = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                names, {n: i for i, n in enumerate(names)}, sampled, kv_connector_output=report
            ),
        )
        self.scheduler.check_integrity()
        for client in outputs.values():
            for item in client.outputs:
                tokens, _, _ = self.ended.get(item.request_id, ([], None, None))
                params = item.kv_transfer_params
                self.ended[item.request_id] = (
                    [*tokens, *item.new_token_ids],
                    item.finish_reason,
                    params,
                )

    def free_blocks(self):
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def expected_tokens(prompt, count, memo={}):  # noqa: B006 - one for all tests
    key = (tuple(prompt), count)
    if key not in memo:
        engine = Engine(MemoryFabric(), Clock(), "plain", "kv_both", "fail", "LBHNC")
        engine.scheduler.add_request(make_request("r", list(prompt), max_tokens=count))
        while engine.scheduler.requests:
            engine.step()
        memo[key] = engine.ended["r"][0]
    return memo[key]


class Campaign:
    """One seed: a pair of engines, some requests, and faults while they run."""

    def __init__(self, seed, corrupt=0.0, way=None):
        self.rng = random.Random(seed)
        self.way = way or WAYS[seed % len(WAYS)]
        rng = self.rng
        rates = {
            name: rng.choice((0.0, 0.15, 0.4))
            for name in ("delay", "hang", "fail", "lose", "duplicate", "reorder", "garbage")
        }
        self.faults = Faults(rng=random.Random(seed + 1), corrupt=corrupt, **rates)
        self.fabric, self.clock = MemoryFabric(self.faults), Clock()
        self.policy = rng.choice(("fail", "recompute"))
        layouts = ("LBHNC", "LBNHC", "BHLNC")
        self.p = self.engine("p", "kv_producer", rng.choice(layouts))
        self.d = self.engine("d", "kv_consumer", rng.choice(layouts), rng.choice((8, 16, 32)))
        self.d.others["p-host"] = self.p
        self.wrong = []
        self.num_right = self.num_failed = 0

    def engine(self, name, role, layout, block_size=BLOCK):
        return Engine(
            self.fabric, self.clock, name, role, self.policy, layout, block_size, self.way
        )

    def turn(self):
        self.clock.now += 0.02
        self.p.step()
        self.d.step()

    def run(self, num_requests=6):
        for index in range(num_requests):
            length = self.rng.randint(3, 70)
            prompt = [self.rng.randrange(3, 900) for _ in range(length)]
            self.request(f"r{index}", prompt)
        self.settle()

    def request(self, name, prompt):
        p, d = self.p, self.d
        ask = {"do_remote_decode": True}
        first = make_request(f"{name}-p", prompt, max_tokens=1)
        first.kv_transfer_params = ask
        p.scheduler.add_request(first)
        self.until(lambda: f"{name}-p" in p.ended and p.ended[f"{name}-p"][1] is not None)
        params = p.ended[f"{name}-p"][2]
        second = make_request(f"{name}-d", prompt, max_tokens=3)
        second.kv_transfer_params = {**params, "remote_host": "p-host"} if params else None
        if self.rng.random() < 0.1:
            # The client takes longer than the lease.
            self.faults.count += 1
            for _ in range(170):
                self.turn()
        d.scheduler.add_request(second)
        if self.rng.random() < 0.1:
            self.restart_prefill()
        self.until(lambda: f"{name}-d" in d.ended and d.ended[f"{name}-d"][1] is not None)
        tokens, reason, _ = d.ended[f"{name}-d"]
        if reason is FinishReason.ERROR:
            assert self.policy == "fail"
            self.num_failed += 1
        elif tokens == expected_tokens(prompt, 3):
            self.num_right += 1
        else:
            self.wrong.append(name)

    def restart_prefill(self):
        """P dies and comes back under its name, elsewhere."""
        self.faults.count += 1
        self.fabric.kill(self.p.port.name)
        self.p = self.engine("p", "kv_producer", "BHLNC")
        self.d.others["p-host"] = self.p

    def until(self, condition):
        for _ in range(600):
            if condition():
                return
            self.turn()
        raise AssertionError("a request hangs")

    def settle(self):
        """What hung ends at last; then every block must be back."""
        self.faults.lose = self.faults.hang = self.faults.fail = 0.0
        for port in list(self.fabric.ports.values()):
            port.release_hung()
        for _ in range(400):
            self.turn()
        for engine in (self.p, self.d):
            assert engine.free_blocks() == NUM_BLOCKS - 1
            assert engine.worker.is_idle
            assert engine.ring is None or engine.ring.num_free == engine.ring.shape.num_slots
            engine.scheduler.check_integrity()


def run_until(num_faults, first_seed):
    made = num_right = num_failed = 0
    seed = first_seed
    while made < num_faults:
        campaign = Campaign(seed)
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
    assert made >= 2000 and num_right > 100 and num_failed > 100


def test_a_corruption_on_the_way_would_be_noticed():
    """The campaign can fail: with bytes changed in the transfer it does."""
    wrong = 0
    for seed in range(5):
        campaign = Campaign(seed, corrupt=1.0)
        campaign.run()
        wrong += len(campaign.wrong)
    assert wrong


@pytest.mark.parametrize("way", WAYS)
def test_blocks_of_a_hanging_load_are_kept_back_until_it_ends(way):
    """The request fails in time; what is written later hits nobody's blocks."""
    campaign = Campaign(3, way=way)
    for name in ("delay", "hang", "fail", "lose", "duplicate", "reorder", "garbage"):
        setattr(campaign.faults, name, 0.0)
    campaign.faults.hang = 1.0
    campaign.policy = "fail"
    campaign.rng = random.Random(99)
    campaign.p = campaign.engine("p2", "kv_producer", "BHLNC")
    campaign.d = campaign.engine("d2", "kv_consumer", "LBHNC")
    campaign.d.others["p-host"] = campaign.p
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
    campaign = Campaign(3, way=way)
    for name in ("delay", "hang", "fail", "lose", "duplicate", "reorder", "garbage"):
        setattr(campaign.faults, name, 0.0)
    campaign.faults.hang = 1.0
    campaign.policy = "recompute"
    campaign.rng = random.Random(99)
    campaign.p = campaign.engine("p2", "kv_producer", "BHLNC")
    campaign.d = campaign.engine("d2", "kv_consumer", "LBHNC")
    campaign.d.others["p-host"] = campaign.p
    campaign.request("stuck", list(range(10, 60)))
    assert campaign.num_right == 1
    assert campaign.d.free_blocks() == NUM_BLOCKS - 1 - 4
    campaign.settle()
