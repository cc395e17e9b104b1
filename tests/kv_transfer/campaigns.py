"""Two engines in this process over the in-memory port, and requests between them, by seed.

Schedulers and transfer workers are those of two engines; the model is a function of what lies in
the cache, so that a wrong byte is a wrong token. Every request ends with the right token or an
error, no block is lost, and both engines serve on. Which connector, and how a request goes, the
subclasses say.
"""

from __future__ import annotations

import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch

from tests.core.helpers import make_vllm_config
from tests.kv_cache.helpers import full, placed
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.peers import LocalSide
from vllm.distributed.kv_transfer.kv_connector.v1.seals import engine_secret, public_session
from vllm.distributed.kv_transfer.transport.memory import Faults, MemoryFabric, MemoryPort
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.descriptors import describe
from vllm.v1.kv_cache.rearrange import Shard
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

BLOCK = 16
NUM_BLOCKS = 40
KINDS = ("delay", "hang", "fail", "lose", "duplicate", "reorder", "garbage")
"""Of the transport's faults."""
LAYERS = ("l.0", "l.1")
LAYOUTS = ("LBHNC", "LBNHC", "BHLNC")


class Clock:
    """Time goes by with the turns, so that nothing depends on the machine's speed."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class MemoryEngine(ABC):
    """Scheduler, connector halves, a cache in memory, and a model that reads it."""

    connector_class: type

    def __init__(self, fabric, clock, name, role, policy, layout, block_size=BLOCK, extra=None):
        self.fabric, self.name, self.block_size = fabric, name, block_size
        vllm_config = make_vllm_config()
        self.transfer = KVTransferConfig(
            kv_connector=self.connector_class.__name__,
            engine_id=name,
            kv_role=role,
            kv_load_failure_policy=policy,
            kv_connector_extra_config=extra or {},
        )
        object.__setattr__(vllm_config, "kv_transfer_config", self.transfer)
        object.__setattr__(vllm_config, "instance_id", f"{name} since {clock.now}")
        self.vllm_config = vllm_config
        spec = full(2, 4, block_size)
        self.config = placed([dict.fromkeys(LAYERS, spec)], KVCacheLayout(layout), NUM_BLOCKS)
        self.cache = allocate_kv_cache(self.config)
        self.connector = self.connector_class(vllm_config, KVConnectorRole.SCHEDULER, self.config)
        self.scheduler = Scheduler(
            vllm_config, self.config, None, block_size, True, connector=self.connector
        )
        self.port = MemoryPort(fabric, f"{name}-agent-{random.Random(clock.now).random()}")
        self.tables, self.tokens = {}, {}
        self.others = {}
        self.ended = {}

    def local_side(self, **more):
        return LocalSide(
            engine_id=self.name,
            session=public_session(self.vllm_config.instance_id),
            secret=engine_secret(self.vllm_config.instance_id),
            shard=Shard(),
            descriptor=describe(self.config, self.cache.backing.data_ptr()),
            total_heads=dict.fromkeys(LAYERS, 2),
            factors={"model": "m"},
            **more,
        )

    def register_cache(self):
        backing = self.cache.backing
        self.port.register([(backing.data_ptr(), backing.numel())], "cpu")

    def slots(self, request_id, count):
        token = torch.arange(count)
        row = torch.tensor(self.tables[request_id])
        return row[token // self.block_size], token % self.block_size

    def store(self, request_id, start, end):
        block, inside = self.slots(request_id, end)
        for layer, view in self.cache.items():
            for position in range(start, end):
                numbers = kv_of(layer, self.tokens[request_id][: position + 1])
                view[block[position], :, inside[position]] = numbers

    def next_token(self, request_id):
        """Depends on every byte of the request's cache."""
        block, inside = self.slots(request_id, len(self.tokens[request_id]))
        return token_after([view[block, :, inside] for view in self.cache.values()])

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

    @abstractmethod
    def is_quiet(self):
        """Nothing is held for anybody, once all has ended."""


class Campaign(ABC):
    """One seed: a pair of engines, some requests, and faults while they run."""

    def __init__(self, seed, corrupt=0.0):
        self.rng = random.Random(seed)
        rng = self.rng
        rates = {name: rng.choice((0.0, 0.15, 0.4)) for name in KINDS}
        self.faults = Faults(rng=random.Random(seed + 1), corrupt=corrupt, **rates)
        self.fabric, self.clock = MemoryFabric(self.faults), Clock()
        self.policy = rng.choice(("fail", "recompute"))
        self.p = self.engine("p", "kv_producer", rng.choice(LAYOUTS))
        self.d = self.engine("d", "kv_consumer", rng.choice(LAYOUTS), rng.choice((8, 16, 32)))
        self.meet()
        self.wrong = []
        self.num_right = self.num_failed = 0

    @classmethod
    def calm(cls, policy, *args, **kwargs):
        """A pair without faults, until the test makes some."""
        campaign = cls(3, *args, **kwargs)
        campaign.no_faults()
        campaign.policy = policy
        campaign.rng = random.Random(99)
        campaign.clock.now += 1
        campaign.p = campaign.engine("p", "kv_producer", "BHLNC")
        campaign.d = campaign.engine("d", "kv_consumer", "LBHNC")
        campaign.meet()
        return campaign

    @abstractmethod
    def engine(self, name, role, layout, block_size=BLOCK):
        """One of the pair."""

    @abstractmethod
    def meet(self):
        """Let D find P."""

    @abstractmethod
    def request(self, name, prompt):
        """One request through both, with what may befall it, and what became of it."""

    def no_faults(self):
        for name in KINDS:
            setattr(self.faults, name, 0.0)

    def turn(self):
        self.clock.now += 0.02
        self.p.step()
        self.d.step()

    def turns(self, count):
        for _ in range(count):
            self.turn()

    def run(self, num_requests=6):
        for index in range(num_requests):
            length = self.rng.randint(3, 70)
            prompt = [self.rng.randrange(3, 900) for _ in range(length)]
            self.request(f"r{index}", prompt)
        self.settle()

    def has_ended(self, engine, name):
        return engine.ended.get(name, ([], None, None))[1] is not None

    def judge(self, name, prompt):
        """How D's request of this name has ended."""
        self.until(lambda: self.has_ended(self.d, name))
        tokens, reason, _ = self.d.ended[name]
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
        self.clock.now += 0.02
        self.fabric.kill(self.p.port.name)
        self.p = self.engine("p", "kv_producer", "BHLNC")
        self.meet()

    def until(self, condition):
        for _ in range(600):
            if condition():
                return
            self.turn()
        raise AssertionError("a request hangs")

    def settle(self):
        """What hung ends at last; then every block must be back."""
        self.no_faults()
        for port in list(self.fabric.ports.values()):
            port.release_hung()
        self.turns(700)
        for engine in (self.p, self.d):
            assert engine.free_blocks() == NUM_BLOCKS - 1
            assert engine.is_quiet()
            engine.scheduler.check_integrity()


def kv_of(layer, tokens):
    """``(heads, content)`` of the last of these tokens: says which come before it."""
    value = zlib.crc32(f"{layer}{tokens!r}".encode()) % 9973
    return (value + torch.arange(16).reshape(2, 8)).float()


def token_after(layers):
    """The model: a function of KV ``(tokens, heads, content)`` of all layers."""
    total = 0
    for seen in layers:
        total = zlib.crc32(seen.float().contiguous().numpy().tobytes(), total)
    return 3 + total % 900


def expected_tokens(prompt, count):
    """What the model says without any engine."""
    tokens = list(prompt)
    rows = {name: [kv_of(name, tokens[: i + 1]) for i in range(len(tokens))] for name in LAYERS}
    for _ in range(count):
        tokens.append(token_after([torch.stack(own) for own in rows.values()]))
        for name, own in rows.items():
            own.append(kv_of(name, tokens))
    return tokens[len(prompt) :]


def run_until(make: Callable[[int], Campaign], num_faults: int, first_seed: int):
    """Campaigns of one seed after the other until there were so many faults: (faults, right
    requests, failed ones, campaigns)."""
    made = num_right = num_failed = 0
    seed = first_seed
    while made < num_faults:
        campaign = make(seed)
        campaign.run()
        assert not campaign.wrong, f"seed {seed}: wrong tokens for {campaign.wrong}"
        made += campaign.faults.count
        num_right += campaign.num_right
        num_failed += campaign.num_failed
        seed += 1
    return made, num_right, num_failed, seed - first_seed


def num_wrong(make: Callable[..., Campaign], seeds: Iterable[int]) -> int:
    """Requests with wrong tokens where every transfer is corrupted."""
    wrong = 0
    for seed in seeds:
        campaign = make(seed, corrupt=1.0)
        campaign.run()
        wrong += len(campaign.wrong)
    return wrong
