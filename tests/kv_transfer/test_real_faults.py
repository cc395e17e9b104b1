"""Prefill and decode servers while things go wrong for real: killed, frozen, lied to, too late.

After each fault every request has ended with the right tokens or a clear error, no block is lost,
and whoever is left serves at once.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import time
from typing import Any

import msgspec
import pytest

from tests.entrypoints.server import free_port
from tests.kv_transfer.harness import Engine, Fleet, Setup
from tests.kv_transfer.real_campaign import RealCampaign, campaigns, schedule
from tests.kv_transfer.side_channel_proxy import FAULTS, SideChannelProxy
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import (
    AgentMetadata,
    HandshakePayload,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.side_channel import ask_handshake
from vllm.v1.kv_cache.descriptors import CacheDescriptor

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")),
    reason="needs nixl: pip install 'vllm[nixl]'",
)
LEASE, HANDSHAKE, TRANSFER = 3.0, 1.5, 4.0
EXTRA = {
    "kv_lease_duration": LEASE,
    "handshake_timeout": HANDSHAKE,
    "transfer_timeout": TRANSFER,
}
KINDS = {
    "kill the prefill server before the fetch": 4,
    "kill the prefill server within requests": 4,
    "kill the decode server within requests": 4,
    "restart the prefill server under its name": 3,
    "freeze the prefill server before the fetch": 3,
    "freeze the prefill server within requests": 3,
    "freeze the decode server beyond the lease": 3,
    "expire the lease": 3,
    "replay parameters": 3,
    "garbage in parameters": 4,
    "leave within requests": 3,
    **{f"side channel: {fault}": 2 for fault in FAULTS},
    "side channel: garbage": 6,
}
"""How often each occurs in the campaign: 55 in all."""


class Campaign(RealCampaign):
    """
    Args:
        corrupt: change the prefill server's cache before it is read.
    """

    def __init__(self, fleet: Fleet, seed: int, policy: str, corrupt: bool = False) -> None:
        self.corrupt = corrupt
        side = ("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
        # What changes bytes behind a server's back would be noticed by its debugger.
        debug = (("VLLM_KV_CACHE_DEBUG", "0"),) if corrupt else ()
        common = {"model": "llama", "extra": json.dumps(EXTRA)}
        prefill = Setup(role="kv_producer", name=f"p{seed}", environment=(side, *debug), **common)
        # Its prefix cache is emptied in between.
        dev = ("VLLM_SERVER_DEV_MODE", "1")
        decode = Setup(
            role="kv_consumer", policy=policy, name=f"d{seed}", environment=(dev,), **common
        )
        limit = LEASE + HANDSHAKE + TRANSFER + 10
        super().__init__(fleet, seed, policy, prefill, decode, limit)

    def fetch(self, prompts: list[list[int]], **change: Any) -> list[dict[str, Any]]:
        """Prefill, one after the other; the parameters of each."""
        answers = []
        for prompt in prompts:
            params = self.p.prefill(prompt)
            if self.corrupt:
                spoil_cache(self.p, params)
            answers.append(params | change)
        return answers

    def answered(self, prompts: list[list[int]], answers: list[dict[str, Any]]) -> list[Any]:
        return self.all_answered(self.decode(prompts, answers))

    # Faults

    def kill_the_prefill_server_before_the_fetch(self, prompts):
        answers = self.fetch(prompts)
        self.kill(self.p)
        return self.answered(prompts, answers)

    def kill_the_prefill_server_within_requests(self, prompts):
        answers = self.fetch(prompts)
        futures = self.decode(prompts, answers)
        self.pause()
        self.kill(self.p)
        return self.all_answered(futures)

    def kill_the_decode_server_within_requests(self, prompts):
        answers = self.fetch(prompts)
        futures = self.decode(prompts, answers)
        self.pause()
        self.kill(self.d)
        return [future.result() for future in futures]

    def restart_the_prefill_server_under_its_name(self, prompts):
        answers = self.fetch(prompts)
        self.kill(self.p)
        self.fleet.get(self.prefill_setup)
        late = self.answered(prompts, answers)
        fresh = self.answered(prompts, self.fetch(prompts))
        assert all(status == 200 for status, _ in fresh), fresh
        self.judge("after a restart", prompts, fresh)
        return late

    def freeze_the_prefill_server_before_the_fetch(self, prompts):
        answers = self.fetch(prompts)
        self.p.signal(signal.SIGSTOP)
        try:
            return self.answered(prompts, answers)
        finally:
            self.p.signal(signal.SIGCONT)

    def freeze_the_prefill_server_within_requests(self, prompts):
        answers = self.fetch(prompts)
        futures = self.decode(prompts, answers)
        self.pause()
        self.p.signal(signal.SIGSTOP)
        time.sleep(0.5)
        self.p.signal(signal.SIGCONT)
        return self.all_answered(futures)

    def freeze_the_decode_server_beyond_the_lease(self, prompts):
        answers = self.fetch(prompts)
        futures = self.decode(prompts, answers)
        self.pause()
        self.d.signal(signal.SIGSTOP)
        time.sleep(LEASE + 0.5)
        self.p.wait_until_empty()
        self.d.signal(signal.SIGCONT)
        return [future.result() for future in futures]

    def expire_the_lease(self, prompts):
        answers = self.fetch(prompts)
        time.sleep(LEASE + 0.5)
        self.p.wait_until_empty()
        if self.rng.random() < 0.5:
            self.fetch(self.prompts(2))
        outcomes = self.answered(prompts, answers)
        if self.policy == "fail":
            assert all(status == 500 for status, _ in outcomes), outcomes
        return outcomes

    def replay_parameters(self, prompts):
        answers = self.fetch(prompts)
        first = self.answered(prompts, answers)
        assert all(status == 200 for status, _ in first), first
        self.judge("before a replay", prompts, first)
        self.p.wait_until_empty()
        assert self.d.post("/reset_prefix_cache").json() == {"success": True}
        again = self.answered(prompts, answers)
        if self.policy == "fail":
            assert all(status == 500 for status, _ in again), again
        return again

    def garbage_in_parameters(self, prompts):
        rng = self.rng
        answers = self.fetch(prompts)
        spoilt = []
        for answer in answers:
            names = [name for name in sorted(answer) if name != "remote_lease_seconds"]
            name = rng.choice(names)
            # A name and an address may be anything, and ids that are ids are believed.
            value = rng.choice(
                [None, -1, 1 << 70, "x" * 600, [[1 << 30]], [["a"]], [[]] * 100, {}, 0.5, True]
            )
            spoilt.append(answer | {name: value})
        return self.answered(prompts, spoilt)

    def leave_within_requests(self, prompts):
        answers = self.fetch(prompts)
        futures = self.decode(prompts, answers, timeout=self.rng.choice((0.01, 0.03, 0.1)))
        return [future.result() for future in futures]

    def side_channel(self, prompts, fault):
        # Another address is asked anew, however well the peer is known.
        with SideChannelProxy(self.p.side_port, fault, self.rng, HANDSHAKE + 0.5) as proxy:
            answers = self.fetch(prompts, remote_port=proxy.port)
            outcomes = self.answered(prompts, answers)
            assert proxy.num_spoiled
        if fault in ("delay", "duplicate", "reorder"):
            assert all(status == 200 for status, _ in outcomes), outcomes
        return outcomes


def spoil_cache(p: Engine, params: dict[str, Any]) -> None:
    """Change the sign of everything in a prompt's first block, in the server's own memory."""
    encoded = ask_handshake("127.0.0.1", p.side_port, 0, 5)
    payload = msgspec.msgpack.decode(encoded, type=HandshakePayload)
    metadata = msgspec.msgpack.decode(payload.agent_metadata_bytes, type=AgentMetadata)
    cache = CacheDescriptor.from_json(metadata.descriptor)
    with open(f"/proc/{p.engine().pid}/mem", "r+b", buffering=0) as memory:
        for layer in cache.layers:
            page = cache.base + layer.offset
            page += params["remote_block_ids"][layer.group][0] * layer.block_stride
            for head in range(layer.num_head_slots):
                for state in range(layer.num_states):
                    memory.seek(page + head * layer.head_stride + state * layer.state_stride)
                    content = bytearray(memory.read(layer.content_bytes))
                    content[3::4] = bytes(byte ^ 0x80 for byte in content[3::4])
                    memory.seek(-layer.content_bytes, 1)
                    memory.write(content)


@pytest.fixture
def campaign_of(fleet):
    with campaigns(Campaign, fleet) as make:
        yield make


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_requests_end_right_or_with_an_error_whatever_happens(campaign_of, policy):
    """Half of the faults with either policy; together more than 50."""
    campaign = campaign_of(1 if policy == "fail" else 2, policy)
    half = 0 if policy == "fail" else 1
    campaign.run(schedule(KINDS, 7)[half::2])
    campaign.report()
    assert campaign.outcomes["right"] > 10
    if policy == "fail":
        assert campaign.outcomes["error"] > 5


def test_there_are_at_least_fifty_faults():
    assert len(schedule(KINDS, 7)) >= 50


@pytest.mark.slow
def test_a_corruption_on_the_way_would_be_noticed(campaign_of):
    """The campaign can fail: with bytes changed before they are read it does."""
    campaign = campaign_of(3, "fail", corrupt=True)
    with pytest.raises(AssertionError, match="wrong tokens"):
        campaign.run(["side channel: delay"])
