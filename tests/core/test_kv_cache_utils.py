import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.helpers import full_spec, make_kv_cache_config
from vllm.v1.core.kv_cache_utils import (
    FreeKVCacheBlockQueue,
    KVCacheBlock,
    resolve_hash_block_size,
)


def ids(queue):
    return [block.block_id for block in queue.get_all_free_blocks()]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_queue_behaves_like_a_list(data):
    blocks = [KVCacheBlock(i) for i in range(12)]
    queue, model = FreeKVCacheBlockQueue(blocks[:6]), list(range(6))
    for _ in range(data.draw(st.integers(0, 25))):
        outside = [i for i in range(12) if i not in model]
        action = data.draw(st.sampled_from(["pop", "remove", "append", "prepend"]))
        if action == "pop":
            n = data.draw(st.integers(0, len(model)))
            assert [b.block_id for b in queue.popleft_n(n)] == model[:n]
            del model[:n]
        elif action == "remove" and model:
            which = data.draw(st.sampled_from(model))
            queue.remove(blocks[which])
            model.remove(which)
        elif action in ("append", "prepend"):
            some = data.draw(st.permutations(outside))[: data.draw(st.integers(0, 4))]
            chosen = [blocks[i] for i in some]
            if action == "append":
                queue.append_n(chosen)
                model += some
            else:
                queue.prepend_n(chosen)
                model[:0] = some
        assert ids(queue) == model
        assert queue.num_free_blocks == len(model)


def test_taking_more_than_there_are_takes_nothing():
    queue = FreeKVCacheBlockQueue([KVCacheBlock(i) for i in range(3)])
    with pytest.raises(ValueError, match="4 blocks asked for, 3 are free"):
        queue.popleft_n(4)
    assert ids(queue) == [0, 1, 2]


def test_a_block_that_is_not_queued_cannot_be_removed():
    queue = FreeKVCacheBlockQueue([KVCacheBlock(0)])
    with pytest.raises(AssertionError, match="not in the free queue"):
        queue.remove(KVCacheBlock(5))


@pytest.mark.parametrize("damage", ["count", "link", "back"])
def test_a_broken_queue_is_noticed(damage):
    blocks = [KVCacheBlock(i) for i in range(4)]
    queue = FreeKVCacheBlockQueue(blocks)
    if damage == "count":
        queue.num_free_blocks += 1
    elif damage == "link":
        blocks[1].next_free_block = None
    else:
        blocks[2].prev_free_block = blocks[0]
    with pytest.raises(AssertionError):
        queue.get_all_free_blocks()


def test_one_hash_covers_the_common_divisor_of_the_groups():
    config = make_kv_cache_config(4, full_spec(64), full_spec(48))
    assert resolve_hash_block_size(config, 16) == 16
    assert resolve_hash_block_size(make_kv_cache_config(4, full_spec(32)), 16) == 32
    planned = make_kv_cache_config(4, full_spec(64), hash_block_size=8)
    assert resolve_hash_block_size(planned, 16) == 8
