"""Debug mode: any byte written by somebody who may not is found after the step."""

import pytest
import torch

from tests.kv_cache.helpers import full, mamba, placed, sliding
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.debug import (
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


def test_what_was_never_written_reads_as_nan(cache):
    KVCacheDebugger(cache)
    assert torch.isnan(cache["l.1"]).all()


def test_null_unless_asked_for(cache, monkeypatch):
    assert type(make_kv_cache_debugger(cache)) is NullKVCacheDebugger
    monkeypatch.setenv("VLLM_KV_CACHE_DEBUG", "1")
    assert type(make_kv_cache_debugger(cache)) is KVCacheDebugger
