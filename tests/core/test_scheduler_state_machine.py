"""Any sequence of arrivals, steps, aborts, preemptions and failures keeps the books in order."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.core.helpers import (
    EOS,
    FakeModel,
    chunked_spec,
    full_spec,
    make_request,
    make_scheduler,
    mamba_spec,
    window_spec,
)
from vllm.errors import QueueFullError, VLLMValidationError
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import RequestStatus

CACHES = {
    "full": [full_spec()],
    "window": [window_spec(40)],
    "chunked": [chunked_spec(32)],
    "full and window": [full_spec(), window_spec(24)],
    "blocks of two sizes": [full_spec(32), window_spec(20)],
    "full and states": [full_spec(), mamba_spec("align")],
    "three kinds": [full_spec(), window_spec(17), chunked_spec(48)],
}


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        cache=st.sampled_from(sorted(CACHES)),
        num_blocks=st.integers(14, 40),
        policy=st.sampled_from(["fcfs", "priority"]),
        budget=st.sampled_from([24, 64, 200]),
        max_num_seqs=st.integers(1, 6),
        caching=st.booleans(),
        events=st.booleans(),
        threshold=st.sampled_from([0, 0, 20]),
        watermark=st.sampled_from([0.0, 0.1]),
    )
    def start(
        self, cache, num_blocks, policy, budget, max_num_seqs, caching, events, threshold, watermark
    ):
        self.scheduler = make_scheduler(
            num_blocks,
            *CACHES[cache],
            policy=policy,
            max_num_batched_tokens=budget,
            max_num_seqs=max_num_seqs,
            prefix_caching=caching,
            kv_events=events,
            max_model_len=200,
            max_num_queued_reqs=8,
            long_prefill_token_threshold=threshold,
            watermark=watermark,
            load_failure_policy="recompute",
        )
        self.model = FakeModel(
            self.scheduler, lambda tokens: EOS if hash(tuple(tokens)) % 37 == 0 else 7
        )
        self.added = 0
        self.asked: dict[str, int] = {}
        self.got: dict[str, int] = {}
        self.ended: set[str] = set()
        self.aborted: set[str] = set()
        self.findable: set[tuple] = set()

    @rule(
        shared=st.integers(0, 120),
        own=st.integers(0, 60),
        max_tokens=st.integers(1, 60),
        priority=st.integers(0, 3),
        salt=st.sampled_from([None, None, "x"]),
        prompt_logprobs=st.sampled_from([None, None, None, 1]),
        client=st.integers(0, 1),
    )
    def add(self, shared, own, max_tokens, priority, salt, prompt_logprobs, client):
        name = f"r{self.added}"
        self.added += 1
        request = make_request(
            name,
            [100 + i for i in range(shared)] + [1000 * self.added + i for i in range(own)],
            max_tokens=max_tokens,
            priority=priority,
            arrival_time=float(self.added),
            cache_salt=salt,
            client_index=client,
            prompt_logprobs=prompt_logprobs,
        )
        waiting = self.scheduler.get_request_counts()[1]
        try:
            self.scheduler.add_request(request)
        except QueueFullError:
            assert waiting >= 8
        except VLLMValidationError:
            length = shared + own
            assert length == 0 or length >= self.scheduler.max_request_tokens
        else:
            self.asked[name] = min(
                max_tokens, self.scheduler.max_request_tokens - request.num_prompt_tokens
            )

    @rule(times=st.integers(1, 12))
    def steps(self, times):
        for _ in range(times):
            self.take(self.model.step())

    def take(self, outputs):
        for out in outputs:
            name = out.request_id
            assert name not in self.ended and name not in self.aborted
            self.got[name] = self.got.get(name, 0) + len(out.new_token_ids)
            assert self.got[name] <= self.asked[name]
            if out.finished:
                self.ended.add(name)
                stopped_early = out.new_token_ids[-1] == EOS
                assert stopped_early or self.got[name] == self.asked[name]

    @precondition(lambda self: self.scheduler.requests)
    @rule(choice=st.integers(0, 100), during_step=st.booleans())
    def abort(self, choice, during_step):
        names = sorted(self.scheduler.requests)
        name = names[choice % len(names)]
        output = self.scheduler.schedule() if during_step else None
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.aborted.add(name)
        self.scheduler.check_integrity()
        if output is not None:
            result = self.model.execute(output)
            for client in self.scheduler.update_from_output(output, result).values():
                self.take(client.outputs)

    @precondition(lambda self: self.scheduler.running)
    @rule(choice=st.integers(0, 100))
    def preempt(self, choice):
        running = self.scheduler.running
        self.scheduler.preempt(running[choice % len(running)])

    @precondition(lambda self: self.scheduler.running)
    @rule(choice=st.integers(0, 1000))
    def lose_blocks(self, choice):
        """A block turns out bad after a step: those who read it are computed again."""
        manager = self.scheduler.kv_cache_manager
        held = sorted(
            {
                block.block_id
                for group in manager.managers
                for row in group.req_to_blocks.values()
                for block in row
                if not block.is_null
            }
        )
        if held:
            bad = held[choice % len(held)]
            self.take(self.model.step(KVConnectorOutput(invalid_block_ids={bad})))

    @rule()
    def reset(self):
        held = self.scheduler.kv_cache_manager.usage > 0
        assert self.scheduler.reset_prefix_cache() is not held

    @invariant()
    def books_are_in_order(self):
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        pool = self.scheduler.kv_cache_manager.block_pool
        for event in self.scheduler.take_events():
            kind = type(event).__name__
            if kind == "BlockStored":
                for block_hash in event.block_hashes:
                    assert (event.group_idx, block_hash) not in self.findable
                    self.findable.add((event.group_idx, block_hash))
            elif kind == "BlockRemoved":
                self.findable -= {(event.group_idx, h) for h in event.block_hashes}
            else:
                self.findable.clear()
        if pool.enable_kv_cache_events:
            real = {(group, h) for group, cache in pool.cached_blocks.items() for h in cache}
            assert real == self.findable

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if not self.scheduler.has_requests():
                break
            self.take(self.model.step())
        assert not self.scheduler.has_requests()
        assert self.ended | self.aborted == self.asked.keys()
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_usable_blocks
        assert self.scheduler.reset_prefix_cache()
        assert self.scheduler.get_request_counts() == (0, 0)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def _free_without_counting(self, ordered_blocks):
    """The seeded bug: shared blocks go back as soon as one holder lets go."""
    blocks = [block for block in ordered_blocks if not block.is_null and block.ref_cnt > 0]
    for block in blocks:
        block.ref_cnt = 0
    self.free_block_queue.append_n(blocks)


def _touch_without_taking(self, blocks):
    """The seeded bug: a hit stays in the free queue."""
    for block in blocks:
        block.ref_cnt += 1


def _cache_under_the_wrong_hash(self, request, blocks, num_cached, num_full, size, group):
    """The seeded bug: off by one between blocks and hashes."""
    cache = self.get_group_cache(group)
    for index in range(num_cached, num_full):
        block = blocks[index]
        if not block.is_null and block.block_hash is None:
            block.block_hash = request.block_hashes[max(0, index - 1)]
            block.group_id = group
            cache.setdefault(block.block_hash, block)


@pytest.mark.parametrize(
    ("method", "bug"),
    [
        ("free_blocks", _free_without_counting),
        ("touch", _touch_without_taking),
        ("cache_full_blocks", _cache_under_the_wrong_hash),
    ],
)
def test_a_seeded_bug_is_found(monkeypatch, method, bug):
    monkeypatch.setattr(BlockPool, method, bug)
    scheduler = make_scheduler(20, max_num_batched_tokens=64)
    model = FakeModel(scheduler)
    chance = random.Random(0)
    with pytest.raises(AssertionError):
        for i in range(40):
            scheduler.add_request(make_request(f"r{i}", chance.randrange(20, 90), max_tokens=5))
            model.step()
