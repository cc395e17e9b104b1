import pytest

from tests.core.helpers import make_request
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.errors import CapacityError
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher

HASHER = get_request_block_hasher(16, "sha256")


def hashed_request(name, num_blocks, **kwargs):
    return make_request(name, num_blocks * 16, block_hasher=HASHER, **kwargs)


@pytest.fixture
def pool():
    return BlockPool(11, enable_caching=True, hash_block_size=16, enable_kv_cache_events=True)


def test_the_null_block_is_never_given_out(pool):
    blocks = pool.get_new_blocks(10)
    assert sorted(block.block_id for block in blocks) == list(range(1, 11))
    assert pool.null_block.block_id == 0
    pool.check_integrity()


def test_usage_counts_what_is_held(pool):
    assert pool.get_usage() == 0
    blocks = pool.get_new_blocks(5)
    assert pool.get_usage() == 0.5
    pool.free_blocks(blocks)
    assert pool.get_usage() == 0
    assert BlockPool(1, enable_caching=True).get_usage() == 0


def test_asking_for_more_than_is_free_names_both_numbers(pool):
    pool.get_new_blocks(4)
    with pytest.raises(CapacityError, match="7 KV cache blocks asked for, 6 of 10 are free"):
        pool.get_new_blocks(7)
    assert pool.get_num_free_blocks() == 6


def test_cached_blocks_are_found_by_hash_and_group(pool):
    request = hashed_request("r", 3)
    blocks = pool.get_new_blocks(3)
    pool.cache_full_blocks(request, blocks, 0, 3, 16, 1)
    for block, block_hash in zip(blocks, request.block_hashes, strict=True):
        assert pool.get_cached_block(block_hash, [1]) == [block]
        assert pool.get_cached_block(block_hash, [0]) is None
        assert pool.get_cached_block(block_hash, [1, 0]) is None
    pool.check_integrity()


def test_freed_blocks_stay_findable_until_they_are_taken_oldest_first(pool):
    request = hashed_request("r", 4)
    blocks = pool.get_new_blocks(4)
    pool.cache_full_blocks(request, blocks, 0, 4, 16, 0)
    # The end of a sequence goes first: its start may be others' prefix.
    pool.free_blocks(reversed(blocks))
    pool.get_new_blocks(6)
    found = [pool.get_cached_block(h, [0]) is not None for h in request.block_hashes]
    assert found == [True] * 4
    for left in (3, 2, 1, 0):
        taken = pool.get_new_blocks(1)[0]
        assert taken is blocks[left]
        found = [pool.get_cached_block(h, [0]) is not None for h in request.block_hashes]
        assert found == [True] * left + [False] * (4 - left)
        pool.check_integrity()


def test_a_touched_block_is_used_most_recently(pool):
    request = hashed_request("r", 3)
    blocks = pool.get_new_blocks(3)
    pool.cache_full_blocks(request, blocks, 0, 3, 16, 0)
    pool.free_blocks(blocks)
    pool.touch([blocks[0]])
    assert blocks[0].ref_cnt == 1
    pool.check_integrity()
    pool.free_blocks([blocks[0]])
    pool.get_new_blocks(7)
    assert pool.get_new_blocks(3) == [blocks[1], blocks[2], blocks[0]]


def test_blocks_that_nobody_can_find_are_taken_before_those_that_can_be_found(pool):
    findable = pool.get_new_blocks(2)
    pool.cache_full_blocks(hashed_request("r", 2), findable, 0, 2, 16, 0)
    others = pool.get_new_blocks(8)
    pool.free_blocks(findable)
    pool.free_blocks(others[:3])
    assert set(pool.get_new_blocks(3)) == set(others[:3])


def test_a_second_block_of_the_same_content_is_left_out(pool):
    first, second = pool.get_new_blocks(2)
    request = hashed_request("r", 1)
    pool.cache_full_blocks(request, [first], 0, 1, 16, 0)
    pool.cache_full_blocks(request, [second], 0, 1, 16, 0)
    assert pool.get_cached_block(request.block_hashes[0], [0]) == [first]
    assert second.block_hash is None
    pool.check_integrity()


def test_shared_blocks_are_free_once_all_let_go(pool):
    blocks = pool.get_new_blocks(2)
    pool.touch(blocks)
    pool.free_blocks(blocks)
    assert pool.get_num_free_blocks() == 8
    pool.free_blocks(blocks)
    assert pool.get_num_free_blocks() == 10
    pool.check_integrity({})


def test_evicted_blocks_are_not_found_though_held(pool):
    request = hashed_request("r", 2)
    blocks = pool.get_new_blocks(2)
    pool.cache_full_blocks(request, blocks, 0, 2, 16, 0)
    pool.evict_blocks([blocks[1].block_id, blocks[1].block_id, 9])
    assert pool.get_cached_block(request.block_hashes[0], [0]) == [blocks[0]]
    assert pool.get_cached_block(request.block_hashes[1], [0]) is None
    pool.check_integrity({block.block_id: 1 for block in blocks})


def test_reset_forgets_all_and_is_refused_while_blocks_are_held(pool):
    request = hashed_request("r", 2)
    blocks = pool.get_new_blocks(2)
    pool.cache_full_blocks(request, blocks, 0, 2, 16, 0)
    assert not pool.reset_prefix_cache()
    assert pool.get_cached_block(request.block_hashes[0], [0])
    pool.free_blocks(blocks)
    assert pool.reset_prefix_cache()
    assert pool.get_cached_block(request.block_hashes[0], [0]) is None
    pool.check_integrity()


def test_blocks_larger_than_the_hashed_ones_are_found_by_their_last_hash(pool):
    request = hashed_request("r", 6)
    blocks = pool.get_new_blocks(2)
    pool.cache_full_blocks(request, blocks, 0, 2, 48, 0)
    assert pool.get_cached_block(request.block_hashes[2], [0]) == [blocks[0]]
    assert pool.get_cached_block(request.block_hashes[5], [0]) == [blocks[1]]


def test_events_say_what_can_be_found(pool):
    request = hashed_request("r", 4, cache_salt="s")
    blocks = pool.get_new_blocks(4)
    pool.cache_full_blocks(request, blocks, 0, 1, 16, 0)
    pool.cache_full_blocks(request, [*blocks[:2], pool.null_block, blocks[3]], 1, 4, 16, 0)
    hashes, tokens = request.block_hashes, request.all_token_ids
    first, second, last = pool.take_events()
    assert first == BlockStored(
        [hashes[0]], None, tokens[:16], 16, medium="GPU", extra_keys=[("s",)], group_idx=0
    )
    assert second == BlockStored(
        [hashes[1]], hashes[0], tokens[16:32], 16, medium="GPU", group_idx=0
    )
    assert last == BlockStored([hashes[3]], hashes[2], tokens[48:], 16, medium="GPU", group_idx=0)
    pool.free_blocks(blocks)
    pool.get_new_blocks(10)
    removed = pool.take_events()
    assert all(isinstance(event, BlockRemoved) and event.medium == "GPU" for event in removed)
    assert {event.block_hashes[0] for event in removed} == {hashes[0], hashes[1], hashes[3]}
    assert pool.take_events() == []


def test_reset_is_an_event(pool):
    pool.reset_prefix_cache()
    assert pool.take_events() == [AllBlocksCleared()]


def test_no_events_are_kept_unless_wanted():
    pool = BlockPool(4, enable_caching=True)
    blocks = pool.get_new_blocks(2)
    pool.cache_full_blocks(hashed_request("r", 2), blocks, 0, 2, 16, 0)
    pool.evict_blocks([1, 2])
    assert pool.take_events() == []


def _free_twice(pool, held, spare):
    held[0].ref_cnt = 0
    pool.free_block_queue.append(held[0])
    pool.free_block_queue.append(held[0])


def _lose_a_block(pool, held, spare):
    held[0].ref_cnt = 0


def _take_without_counting(pool, held, spare):
    pool.free_block_queue.popleft()


def _hold_a_free_block(pool, held, spare):
    spare.ref_cnt = 1


def _free_too_often(pool, held, spare):
    spare.ref_cnt = -1


def _forget_half(pool, held, spare):
    held[0].block_hash = None


def _find_the_wrong_block(pool, held, spare):
    pool.get_group_cache(0)[held[0].block_hash] = spare


def _find_in_the_wrong_group(pool, held, spare):
    held[0].group_id = 3


def _hash_the_null_block(pool, held, spare):
    pool.null_block.block_hash = b"x"


def _give_out_the_null_block(pool, held, spare):
    pool.free_block_queue.append(pool.null_block)


def _count_a_holder_too_many(pool, held, spare):
    held[0].ref_cnt += 1


@pytest.mark.parametrize(
    "bug",
    [
        _free_twice,
        _lose_a_block,
        _take_without_counting,
        _hold_a_free_block,
        _free_too_often,
        _forget_half,
        _find_the_wrong_block,
        _find_in_the_wrong_group,
        _hash_the_null_block,
        _give_out_the_null_block,
        _count_a_holder_too_many,
    ],
)
def test_the_integrity_check_notices(pool, bug):
    held = pool.get_new_blocks(3)
    pool.cache_full_blocks(hashed_request("r", 3), held, 0, 3, 16, 0)
    tables = {block.block_id: 1 for block in held}
    pool.check_integrity(tables)
    bug(pool, held, pool.blocks[10])
    with pytest.raises(AssertionError):
        pool.check_integrity(tables)
