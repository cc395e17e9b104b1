"""A request fetches what was computed for its own prompt, and nothing else: whatever it says."""

from __future__ import annotations

import pytest

from tests.core.helpers import make_request
from tests.kv_transfer.campaigns import NUM_BLOCKS, expected_tokens
from tests.kv_transfer.test_faults import WAYS, PullCampaign
from tests.kv_transfer.test_mooncake_faults import PushCampaign
from vllm.errors import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.request import RequestStatus

MINE, OTHERS = list(range(10, 60)), list(range(100, 150))


def prefill(campaign, name, prompt):
    request = make_request(name, prompt, max_tokens=1)
    request.kv_transfer_params = {"do_remote_decode": True}
    campaign.p.scheduler.add_request(request)
    campaign.until(lambda: campaign.has_ended(campaign.p, name))
    return {**campaign.p.ended[name][2], "remote_host": "p-host"}


def start(campaign, name, prompt, params, count=3):
    request = make_request(name, prompt, max_tokens=count)
    request.kv_transfer_params = params
    campaign.d.scheduler.add_request(request)


def decode(campaign, name, prompt, params):
    start(campaign, name, prompt, params)
    campaign.until(lambda: campaign.has_ended(campaign.d, name))
    return campaign.d.ended[name]


def lies(mine, others):
    """Parameters of a request of ours, changed so that they reach for what is another's."""
    blocks = others["remote_block_ids"]
    yield {**mine, "remote_block_ids": blocks}
    yield {**mine, "remote_block_ids": [mine["remote_block_ids"][0][:-1] + blocks[0][-1:]]}
    yield {**mine, "remote_block_ids": [mine["remote_block_ids"][0][::-1]]}
    yield {**mine, "remote_request_id": others["remote_request_id"]}
    yield {**mine, "remote_lease_slot": others["remote_lease_slot"]}
    yield {**mine, "remote_num_tokens": mine["remote_num_tokens"] - 1}
    yield {**mine, "remote_seal": others["remote_seal"]}
    yield {**mine, "remote_seal": ""}
    yield {**mine, "remote_seal": "\u00e9" * 64}
    # All that was answered to another, for a prompt that it was not computed of.
    yield others


@pytest.mark.parametrize("way", WAYS)
def test_blocks_of_another_request_are_never_fetched(way):
    campaign = PullCampaign.calm("fail", way=way)
    others = prefill(campaign, "others", OTHERS)
    cache = campaign.d.cache.backing
    before = cache.clone()
    for index, lie in enumerate(lies(prefill(campaign, "mine", MINE), others)):
        _, reason, _ = decode(campaign, f"lie{index}", MINE, lie)
        assert reason is FinishReason.ERROR, lie
        assert (cache == before).all(), lie
    # Nor has it ended the leases of others, or its own.
    assert campaign.p.worker.leases.held == {"others", "mine"}
    tokens, reason, _ = decode(campaign, "others-d", OTHERS, others)
    assert reason is FinishReason.LENGTH and tokens == expected_tokens(OTHERS, 3)
    campaign.settle()


@pytest.mark.parametrize("honest", [True, False])
def test_only_who_has_a_lease_prolongs_it(honest):
    campaign = PullCampaign.calm("fail", way="pull")
    campaign.clock.now += 1
    campaign.d = campaign.engine("d", "kv_consumer", "LBHNC", 32)
    campaign.meet()
    others, mine = prefill(campaign, "others", OTHERS), prefill(campaign, "mine", MINE)
    # The engines know each other, so that heartbeats can go.
    decode(campaign, "acquainted", MINE, {**mine, "remote_seal": "x"})
    # It waits, as nothing is free: these have 38 of the 39 blocks, and want more.
    for shift in (0, 1):
        big = [3 + (i + shift) % 900 for i in range(600)]
        campaign.d.scheduler.add_request(make_request(f"big{shift}", big, max_tokens=600))
    campaign.turns(5)
    start(campaign, "r", OTHERS, others if honest else {**others, "remote_seal": "x"})
    for _ in range(60):
        campaign.clock.now += 0.1
        campaign.turn()
    assert campaign.d.worker.notices.expected == {"r"}
    assert campaign.p.worker.leases.held == ({"others"} if honest else set())


def test_parameters_of_a_longer_prompt_are_refused_at_once():
    campaign = PullCampaign.calm("fail", way="pull")
    others = prefill(campaign, "others", OTHERS)
    with pytest.raises(VLLMValidationError, match="belong to another prompt"):
        start(campaign, "r", OTHERS[:-1], others)


def test_more_tokens_may_follow_what_was_computed():
    campaign = PullCampaign.calm("fail", way="pull")
    mine = prefill(campaign, "mine", MINE)
    longer = [*MINE, 7, 8, 9]
    tokens, reason, _ = decode(campaign, "mine-d", longer, mine)
    assert reason is FinishReason.LENGTH and tokens == expected_tokens(longer, 3)
    campaign.settle()


def test_all_that_fetch_for_one_request_share_its_lease():
    """It ends with the last of them, however each ends."""
    campaign = PullCampaign.calm("fail", way="pull")
    params = {**prefill(campaign, "r", MINE), "num_readers": 3}
    campaign.turns(1)
    for index in range(3):
        assert "r" in campaign.p.worker.leases.held
        if index == 1:
            start(campaign, "r1", MINE, params)
            campaign.d.scheduler.finish_requests(["r1"], RequestStatus.FINISHED_ABORTED)
        else:
            tokens, _, _ = decode(campaign, f"r{index}", MINE, params)
            assert tokens == expected_tokens(MINE, 3)
        campaign.turns(5)
    assert not campaign.p.worker.leases
    campaign.settle()


def test_one_transfer_serves_all_answers_of_a_request():
    campaign = PushCampaign.calm("fail")
    p, d = campaign.p, campaign.d
    fetch = {
        "do_remote_prefill": True,
        "remote_bootstrap_addr": "http://p:8998",
        "remote_engine_id": "p",
        "transfer_id": "r",
        "num_readers": 2,
    }
    first = make_request("r-p", MINE, max_tokens=1)
    first.kv_transfer_params = {"do_remote_decode": True, "transfer_id": "r"}
    p.scheduler.add_request(first)
    start(campaign, "a", MINE, fetch)
    campaign.until(lambda: campaign.has_ended(d, "a"))
    campaign.turns(20)
    assert p.free_blocks() < NUM_BLOCKS - 1, "the second has not been heard of yet"
    start(campaign, "b", MINE, fetch)
    campaign.until(lambda: campaign.has_ended(d, "b"))
    assert d.ended["a"][0] == d.ended["b"][0] == expected_tokens(MINE, 3)
    campaign.turns(20)
    assert p.free_blocks() == NUM_BLOCKS - 1
    campaign.settle()


def test_children_of_a_request_keep_one_prefill_and_fetch_it_all():
    def children(params):
        request = EngineCoreRequest(
            request_id="r",
            prompt_token_ids=MINE,
            sampling_params=SamplingParams(n=3),
            arrival_time=0.0,
            kv_transfer_params=params,
        )
        parent = ParentRequest("r", request.sampling_params)
        return [parent.child_request(request, index).kv_transfer_params for index in range(3)]

    ask = {"do_remote_decode": True}
    assert children(ask) == [ask, None, None]
    fetch = {"do_remote_prefill": True, "num_readers": 77}
    assert children(fetch) == [{**fetch, "num_readers": 3}] * 3
    assert children({"of": "others"}) == [{"of": "others"}] * 3
    assert children(None) == [None] * 3


def test_logprobs_of_a_prompt_come_of_computing_it_here():
    campaign = PullCampaign.calm("fail", way="pull")
    params = prefill(campaign, "r", MINE)
    request = make_request("r-d", MINE, max_tokens=3)
    request.kv_transfer_params = params
    request.sampling_params.prompt_logprobs = 1
    campaign.d.scheduler.add_request(request)
    campaign.until(lambda: campaign.has_ended(campaign.d, "r-d"))
    assert campaign.d.ended["r-d"][0] == expected_tokens(MINE, 3)
    assert "transfers" not in (campaign.d.worker.take_stats() or {})
    campaign.turns(20)
    assert not campaign.p.worker.leases
    campaign.settle()
