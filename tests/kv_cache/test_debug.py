"""Debug mode: any byte written by somebody who may not is found after the step."""

import itertools

import pytest
import torch

from tests.kv_cache.helpers import full, mamba, placed, sliding
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.debug import (
    WINDOW_BYTES,
    KVCacheDebugger,
    NullKVCacheDebugger,
    make_kv_cache_debugger,
)
from vllm.v1.kv_cache_layout import KVCacheLayout


@pytest.fixture(params=["LBHNC", "LHBNC", "BLHNC", "BHLNC"])
def cache(request):
    groups = [{"l.0": full(), "l.1": full()}, {"l.2": sliding(), "l.3": sliding()}]
    return allocate_kv_cache(placed(groups, KVCacheLayout(request.param), 4))


def test_a_correct_step_passes(cache):
    debugger = KVCacheDebugger(cache)
    for step in range(2):
        debugger.begin_step({0: [1], 1: [2, 3]})
        cache["l.0"][1] = float(step)
        cache["l.3"][2] = float(step)
        debugger.end_step()


@pytest.mark.parametrize(("layer", "block"), [("l.0", 0), ("l.1", 2), ("l.2", 1), ("l.3", 3)])
def test_a_block_that_was_not_announced_is_found(cache, layer, block):
    debugger = KVCacheDebugger(cache)
    debugger.begin_step({0: [1], 1: [2]})
    if (layer, block) in (("l.1", 2), ("l.2", 1)):
        # Overlaid groups: in this very block the bytes are the other group's.
        debugger = KVCacheDebugger(cache)
        debugger.begin_step({0: [1]} if block == 2 else {1: [2]})
    cache[layer][block, 0, 0, 0] = 1.0
    with pytest.raises(AssertionError, match=f"block {block}"):
        debugger.end_step()


def test_padding_belongs_to_nobody():
    groups = [{"l.0": mamba(block_size=16)}, {"l.1": full(1, 1, 4, "int8")}]
    cache = allocate_kv_cache(placed(groups, KVCacheLayout.BLHNC, 4))
    debugger = KVCacheDebugger(cache)
    debugger.begin_step({1: [1]})
    cache["l.1"][1] = 5
    cache.backing[80 + 8] = 7  # block 1, past the 8 bytes of l.1, inside what l.0 would own
    with pytest.raises(AssertionError, match=r"1 bytes.*layer l.0 of group 0, block 1"):
        debugger.end_step()


def test_a_page_padding_is_watched():
    cache = allocate_kv_cache(
        placed([{"l.0": full(page_size_padded=2048)}], KVCacheLayout.LBHNC, 2)
    )
    debugger = KVCacheDebugger(cache)
    debugger.begin_step({0: [0, 1]})
    cache.backing[1500] = 3
    with pytest.raises(AssertionError, match="padding of no layer"):
        debugger.end_step()


def test_two_groups_cannot_claim_one_block(cache):
    with pytest.raises(AssertionError, match="groups 0 and 1"):
        KVCacheDebugger(cache).begin_step({0: [1], 1: [1]})


def test_writes_between_steps_are_found(cache):
    debugger = KVCacheDebugger(cache)
    debugger.begin_step({0: [1]})
    debugger.end_step()
    cache["l.0"][1] = 0.0
    with pytest.raises(AssertionError, match="between two steps"):
        debugger.begin_step({0: [1]})


def test_blocks_written_from_outside_are_accepted_by_name(cache):
    debugger = KVCacheDebugger(cache)
    cache["l.0"][1] = 0.0
    debugger.accept_blocks([1])
    debugger.begin_step({})
    cache["l.0"][2] = 0.0
    with pytest.raises(AssertionError, match="block 2"):
        debugger.end_step()


def test_a_transfer_may_write_its_blocks_whenever_it_likes_and_no_others(large):
    debugger = KVCacheDebugger(large)
    debugger.expect_outside_writes({300, 301})
    large["l.0"][300] = 1.0
    debugger.begin_step({0: [302]})
    large["l.1"][301] = 2.0
    debugger.end_step()
    large["l.1"][300] = 3.0
    debugger.check_everything()
    debugger.expect_outside_writes({300})
    large["l.1"][301] = 4.0
    with pytest.raises(AssertionError, match="block 301 "):
        debugger.begin_step({0: [302]})
        debugger.end_step()


def test_a_transfer_that_goes_on_while_bytes_are_compared_is_no_foreign_write(large, monkeypatch):
    """Also just after its blocks have been accepted: their next bytes are its own, too."""
    debugger = KVCacheDebugger(large)
    debugger.expect_outside_writes({300})
    take = debugger._take_arrived
    values = itertools.count(1)

    def take_and_write_on():
        take()
        large["l.0"][300] = float(next(values))

    monkeypatch.setattr(debugger, "_take_arrived", take_and_write_on)
    for _ in range(12):
        debugger.begin_step({0: [302]})
        debugger.end_step()
    debugger.check_everything()
    large["l.0"][301] = 1.0
    with pytest.raises(AssertionError, match="block 301 "):
        debugger.check_everything()


def test_a_transfer_may_fill_the_gaps_between_pages():
    groups = [{"l.0": full(1, 1, 4, "int8"), "l.1": full(3, 1, 4, "int8")}]
    cache = allocate_kv_cache(placed(groups, KVCacheLayout.BLHNC, 4))
    debugger = KVCacheDebugger(cache)
    debugger.expect_outside_writes([2])
    block = cache.backing.numel() // 4
    cache.backing[2 * block : 3 * block] = 9
    debugger.check_everything()


def test_what_was_never_written_reads_as_nan(cache):
    KVCacheDebugger(cache)
    assert torch.isnan(cache["l.1"]).all()


@pytest.fixture(params=["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"])
def large(request):
    """17 MiB in 1,100 blocks: nine windows."""
    layers = [{f"l.{i}": full(head_size=32) for i in range(2)}]
    return allocate_kv_cache(placed(layers, KVCacheLayout(request.param), 1100))


def test_a_step_costs_what_it_touches_not_the_pool(large):
    debugger = KVCacheDebugger(large)
    for _ in range(4):
        debugger.begin_step({0: [500]})
        large["l.1"][500] = 1.0
        debugger.end_step()
    # Block 500 before; 0, 499, 500 and 501 after; a window before and after.
    bytes_per_block = large.config.bytes_per_block
    assert debugger.bytes_compared <= 4 * (5 * bytes_per_block + 2 * WINDOW_BYTES)
    assert debugger.bytes_compared < 4 * large.backing.numel()


@pytest.mark.parametrize("block", [0, 499, 501])
def test_beside_the_steps_blocks_a_write_is_found_at_once(large, block):
    debugger = KVCacheDebugger(large)
    for _ in range(2):
        debugger.begin_step({0: [500]})
        debugger.end_step()
    debugger.begin_step({0: [500]})
    large["l.0"][block, 1, 15, 63] = 0.0
    with pytest.raises(AssertionError, match=f"in the step by .*layer l.0 .*block {block} "):
        debugger.end_step()


@pytest.mark.parametrize("block", [2, 300, 1099])
def test_far_away_a_write_is_found_before_the_window_comes_round_twice(large, block):
    debugger = KVCacheDebugger(large)
    large["l.1"][block, 0, 3, 1] = 0.0
    steps = -(-large.backing.numel() // (2 * WINDOW_BYTES))
    with pytest.raises(AssertionError, match=rf"layer l.1 of group 0, block {block} "):
        for _ in range(steps + 1):
            debugger.begin_step({0: [700]})
            debugger.end_step()


def test_a_block_that_was_changed_before_its_step_is_found_at_its_beginning(large):
    debugger = KVCacheDebugger(large)
    debugger.begin_step({0: [1000]})
    debugger.end_step()
    large["l.1"][900, 0, 3, 1] = 0.0
    with pytest.raises(AssertionError, match="block 900"):
        debugger.begin_step({0: [900]})


def test_everything_is_compared_on_demand_until_something_was_found(large):
    debugger = KVCacheDebugger(large)
    debugger.check_everything()
    large["l.1"][900, 0, 3, 1] = 0.0
    with pytest.raises(AssertionError, match=r"4 bytes .* by now .*block 900"):
        debugger.check_everything()
    debugger.check_everything()


def test_null_unless_asked_for(cache, monkeypatch):
    assert type(make_kv_cache_debugger(cache)) is NullKVCacheDebugger
    monkeypatch.setenv("VLLM_KV_CACHE_DEBUG", "1")
    assert type(make_kv_cache_debugger(cache)) is KVCacheDebugger
