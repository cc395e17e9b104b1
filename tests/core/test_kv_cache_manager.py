import pytest

from tests.core.helpers import (
    chunked_spec,
    cross_spec,
    full_spec,
    make_kv_cache_config,
    make_request,
    mamba_spec,
    window_spec,
)
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher

HASHER = get_request_block_hasher(16, "sha256")


def make_manager(num_blocks, *specs, max_model_len=4096, hash_block_size=16, **kwargs):
    return KVCacheManager(
        make_kv_cache_config(num_blocks, *specs),
        max_model_len,
        hash_block_size=hash_block_size,
        **kwargs,
    )


def prompt(length, first=100):
    return [first + i for i in range(length)]


def request_of(name, tokens, **kwargs):
    return make_request(name, tokens, block_hasher=HASHER, **kwargs)


def admit(manager, request, num_new=None):
    """What the scheduler does with a waiting request; the tokens it found."""
    blocks, found = manager.get_computed_blocks(request)
    if num_new is None:
        num_new = request.num_tokens - found
    if manager.allocate_slots(request, num_new, found, blocks) is None:
        return None
    request.num_computed_tokens = found + num_new
    manager.check_integrity()
    return found


def extend(manager, request, num_new):
    """One more step of a running request."""
    manager.publish_blocks()
    blocks = manager.allocate_slots(request, num_new)
    assert blocks is not None
    request.num_computed_tokens += num_new
    manager.check_integrity()
    return blocks


def run_to(manager, request, length, chunk=16):
    while request.num_computed_tokens < length:
        extend(manager, request, min(chunk, length - request.num_computed_tokens))


# Full attention


def test_blocks_cover_the_tokens_and_come_back():
    manager = make_manager(11)
    request = request_of("r", prompt(50))
    assert admit(manager, request) == 0
    assert len(manager.get_block_ids("r")[0]) == 4
    assert request.kv_capacity == 64
    manager.free(request)
    manager.check_integrity()
    assert manager.usage == 0 and manager.get_block_ids("r") == ([],)


def test_a_step_that_does_not_fit_takes_nothing():
    manager = make_manager(4)
    request = request_of("r", prompt(49))
    assert admit(manager, request) is None
    assert manager.usage == 0
    manager.check_integrity()


def test_a_hit_is_the_whole_cached_prefix_but_for_the_last_token():
    manager = make_manager(30)
    first = request_of("a", prompt(64))
    admit(manager, first)
    for length, found in ((64, 48), (65, 64), (100, 64), (63, 48), (16, 0), (17, 16)):
        request = request_of(f"r{length}", prompt(length))
        blocks, hit = manager.get_computed_blocks(request)
        assert hit == found
        assert blocks.get_block_ids()[0] == manager.get_block_ids("a")[0][: found // 16]


def test_hits_are_exact():
    manager = make_manager(30)
    admit(manager, request_of("a", prompt(64), cache_salt="x"))
    changed = prompt(80)
    changed[20] = 7
    assert manager.get_computed_blocks(request_of("b", changed, cache_salt="x"))[1] == 16
    assert manager.get_computed_blocks(request_of("c", prompt(80), cache_salt="x"))[1] == 64
    assert manager.get_computed_blocks(request_of("d", prompt(80), cache_salt="y"))[1] == 0
    assert manager.get_computed_blocks(request_of("e", prompt(80)))[1] == 0


def test_prompt_logprobs_need_every_position_and_read_no_cache():
    manager = make_manager(30)
    admit(manager, request_of("a", prompt(64)))
    assert manager.get_computed_blocks(request_of("b", prompt(80), prompt_logprobs=1))[1] == 0
    skipping = request_of("c", prompt(80), skip_reading_prefix_cache=True)
    assert manager.get_computed_blocks(skipping)[1] == 0
    # What they compute can be found by others.
    manager.free(request_of("a", []))
    admit(manager, request_of("d", prompt(64, first=500), prompt_logprobs=1))
    assert manager.get_computed_blocks(request_of("e", prompt(80, first=500)))[1] == 64


def test_running_requests_share_the_blocks_of_a_prefix():
    manager = make_manager(9)
    admit(manager, request_of("a", prompt(64)))
    second = request_of("b", prompt(70))
    assert admit(manager, second) == 64
    assert manager.block_pool.get_num_free_blocks() == 3
    assert manager.get_block_ids("a")[0] == manager.get_block_ids("b")[0][:4]
    assert manager.get_num_common_prefix_blocks("a") == [4]
    manager.free(second)
    manager.check_integrity()


def test_free_hits_count_against_what_is_free():
    manager = make_manager(6)
    first = request_of("a", prompt(64))
    admit(manager, first)
    manager.free(first)
    # Four hits leave the free queue, and one block is left for two new ones.
    assert admit(manager, request_of("b", prompt(90))) is None
    assert manager.usage == 0
    assert admit(manager, request_of("c", prompt(75))) == 64


def test_decoding_takes_a_block_when_the_last_is_full():
    manager = make_manager(9)
    request = request_of("r", prompt(31))
    admit(manager, request)
    request.append_output_token_ids(5)
    assert extend(manager, request, 1).is_empty()
    request.append_output_token_ids(6)
    assert len(extend(manager, request, 1).blocks[0]) == 1
    # Now both full blocks can be found, with the generated token in the second.
    assert manager.get_computed_blocks(request_of("s", [*prompt(31), 5, 9]))[1] == 32
    assert manager.get_computed_blocks(request_of("t", [*prompt(31), 6, 9]))[1] == 16


def test_lookahead_reserves_room_up_to_the_longest_request():
    manager = make_manager(9, max_model_len=60)
    request = request_of("r", prompt(30))
    assert manager.allocate_slots(request, 30, num_lookahead_tokens=20) is not None
    assert request.kv_capacity == 64
    longest = request_of("s", prompt(58))
    assert manager.allocate_slots(longest, 58, num_lookahead_tokens=100) is not None
    assert len(manager.get_block_ids("s")[0]) == 4


def test_external_tokens_get_blocks_that_nobody_finds_before_they_arrive():
    manager = make_manager(20)
    admit(manager, request_of("a", prompt(32)))
    request = request_of("r", prompt(100))
    blocks, found = manager.get_computed_blocks(request)
    assert found == 32
    assert manager.allocate_slots(
        request, 0, found, blocks, num_external_computed_tokens=64, delay_cache_blocks=True
    )
    assert len(manager.get_block_ids("r")[0]) == 6
    assert manager.get_computed_blocks(request_of("s", prompt(100)))[1] == 32
    assert len(manager.get_blocks("r").get_unhashed_block_ids()) == 4
    request.num_computed_tokens = 96
    manager.cache_blocks(request, 96)
    assert manager.get_computed_blocks(request_of("s", prompt(100)))[1] == 96
    manager.check_integrity()


def test_reserved_blocks_are_left_free():
    manager = make_manager(11)
    request = request_of("r", prompt(128))
    assert manager.allocate_slots(request, 128, num_reserved_blocks=3) is None
    assert manager.allocate_slots(request, 128, num_reserved_blocks=2) is not None


def test_uncached_blocks_are_not_found_again():
    manager = make_manager(20)
    request = request_of("r", prompt(96))
    admit(manager, request, 32)
    extend(manager, request, 64)
    manager.uncache_blocks(request, 32)
    manager.free(request)
    manager.check_integrity()
    assert manager.get_computed_blocks(request_of("s", prompt(96)))[1] == 32


def test_without_caching_nothing_is_found_or_hashed():
    manager = make_manager(20, enable_caching=False)
    admit(manager, request_of("a", prompt(64)))
    assert manager.get_computed_blocks(request_of("b", prompt(64)))[1] == 0


def test_the_longest_request_is_what_the_pool_holds():
    assert make_manager(11, max_model_len=4096).get_max_request_tokens() == 160
    assert make_manager(11, max_model_len=100).get_max_request_tokens() == 100
    windowed = make_manager(11, window_spec(33), max_tokens_per_step=16)
    assert windowed.get_max_request_tokens() == 4096
    both = make_manager(11, full_spec(), window_spec(33), max_tokens_per_step=16)
    assert both.get_max_request_tokens() == 6 * 16


def test_prefix_statistics_start_anew_when_taken():
    manager = make_manager(4)
    manager.prefix_cache_stats.record(100, 48)
    manager.prefix_cache_stats.record(10, 0)
    stats = manager.make_prefix_cache_stats()
    assert (stats.requests, stats.queries, stats.hits) == (2, 110, 48)
    assert manager.make_prefix_cache_stats().queries == 0


# Sliding window


def test_blocks_outside_the_window_are_freed():
    manager = make_manager(11, window_spec(32))
    request = request_of("r", prompt(200))
    admit(manager, request, 16)
    held = []
    while request.num_computed_tokens < 200:
        extend(manager, request, min(16, 200 - request.num_computed_tokens))
        held.append(sum(block != 0 for block in manager.get_block_ids("r")[0]))
    # A window of 32 tokens, unaligned, and 16 more: at most four blocks.
    assert max(held) <= 4
    row = manager.get_block_ids("r")[0]
    assert len(row) == 13
    # Token 192 reads from 161 on: block 10.
    assert row[:10] == [0] * 10 and 0 not in row[10:]
    manager.free(request)
    manager.check_integrity()
    assert manager.usage == 0


def test_a_window_hit_needs_only_the_last_window():
    manager = make_manager(40, window_spec(33))
    request = request_of("r", prompt(160))
    admit(manager, request, 16)
    run_to(manager, request, 160)
    manager.free(request)
    # Forget the first half: it is not read by what comes after 160 tokens.
    manager.evict_blocks(
        block.block_id
        for h in request.block_hashes[:5]
        for block in manager.block_pool.get_cached_block(h, [0])
    )
    blocks, found = manager.get_computed_blocks(request_of("s", prompt(170)))
    assert found == 160
    row = blocks.get_block_ids()[0]
    assert row[:8] == [0] * 8 and 0 not in row[8:]
    # A hole inside the last window: the hit ends before it, with a window of its own.
    manager.evict_blocks(
        [manager.block_pool.get_cached_block(request.block_hashes[8], [0])[0].block_id]
    )
    blocks, found = manager.get_computed_blocks(request_of("t", prompt(170)))
    assert found == 128
    assert [i for i, block in enumerate(blocks.get_block_ids()[0]) if block] == [6, 7]


def test_a_short_window_hit_needs_all_blocks_from_the_start():
    manager = make_manager(40, window_spec(100))
    admit(manager, request_of("r", prompt(64)))
    assert manager.get_computed_blocks(request_of("s", prompt(80)))[1] == 64
    manager.evict_blocks([manager.get_block_ids("r")[0][0]])
    assert manager.get_computed_blocks(request_of("t", prompt(80)))[1] == 0


def test_a_window_hit_is_held_without_the_blocks_before_it():
    manager = make_manager(20, window_spec(17))
    first = request_of("r", prompt(160))
    admit(manager, first, 16)
    run_to(manager, first, 160)
    manager.free(first)
    second = request_of("s", prompt(170))
    assert admit(manager, second) == 160
    assert sum(block != 0 for block in manager.get_block_ids("s")[0]) == 2


# Chunked local attention


def test_a_finished_chunk_needs_no_blocks_at_all():
    manager = make_manager(20, chunked_spec(64))
    request = request_of("r", prompt(150))
    # Nothing is cached, yet the last chunk can start by itself.
    assert admit(manager, request) == 128
    row = manager.get_block_ids("r")[0]
    assert row[:8] == [0] * 8 and 0 not in row[8:]
    assert manager.get_computed_blocks(request_of("s", prompt(170)))[1] == 144


def test_blocks_of_earlier_chunks_are_freed():
    manager = make_manager(20, chunked_spec(32), enable_caching=False)
    request = request_of("r", prompt(100))
    admit(manager, request, 20)
    run_to(manager, request, 100, chunk=20)
    assert [i for i, b in enumerate(manager.get_block_ids("r")[0]) if b] == [4, 5, 6]


# State caches


def test_a_state_without_caching_is_one_block_for_life():
    manager = make_manager(20, mamba_spec("none", block_size=4096, num_speculative_blocks=1))
    request = request_of("r", prompt(1000))
    assert admit(manager, request) == 0
    assert len(manager.get_block_ids("r")[0]) == 2
    for _ in range(40):
        request.append_output_token_ids(1)
    extend(manager, request, 40)
    assert len(manager.get_block_ids("r")[0]) == 2
    assert manager.take_new_block_ids_to_zero() == (manager.get_block_ids("r")[0],)
    assert manager.take_new_block_ids_to_zero() is None


def test_aligned_states_hold_the_last_one_and_the_one_being_written():
    manager = make_manager(20, mamba_spec("align"))
    request = request_of("r", prompt(200))
    admit(manager, request, 64)
    assert [i for i, b in enumerate(manager.get_block_ids("r")[0]) if b] == [3]
    extend(manager, request, 64)
    assert [i for i, b in enumerate(manager.get_block_ids("r")[0]) if b] == [3, 7]
    extend(manager, request, 72)
    assert [i for i, b in enumerate(manager.get_block_ids("r")[0]) if b] == [7, 12]
    manager.publish_blocks()
    manager.free(request)
    manager.check_integrity()
    assert manager.usage == 0
    # Where a step ended with a block, the state can be found again.
    for length, found in ((201, 128), (128, 64), (129, 128), (64, 0)):
        assert manager.get_computed_blocks(request_of("s", prompt(length)))[1] == found


def test_a_state_is_not_found_in_the_step_that_writes_it():
    manager = make_manager(20, mamba_spec("align"))
    admit(manager, request_of("r", prompt(64)), 64)
    assert manager.get_computed_blocks(request_of("s", prompt(80)))[1] == 0
    manager.publish_blocks()
    assert manager.get_computed_blocks(request_of("s", prompt(80)))[1] == 64


def test_a_found_state_is_continued_in_a_block_of_its_own():
    manager = make_manager(20, mamba_spec("align"))
    admit(manager, request_of("r", prompt(64)), 64)
    manager.publish_blocks()
    second = request_of("s", prompt(70))
    assert admit(manager, second) == 64
    row = manager.get_block_ids("s")[0]
    assert row[:3] == [0, 0, 0] and row[3] == manager.get_block_ids("r")[0][3]
    assert row[4] not in (0, row[3])


def test_rows_of_states_only_grow_at_their_end_with_speculation():
    manager = make_manager(30, mamba_spec("align", num_speculative_blocks=2))
    request = request_of("r", prompt(16))
    admit(manager, request)
    row = manager.get_block_ids("r")[0]
    assert len(row) == 3 and 0 not in row
    for _ in range(100):
        request.append_output_token_ids(3)
        added = extend(manager, request, 1).get_block_ids()[0]
        grown = manager.get_block_ids("r")[0]
        assert len(grown) == len(row) + len(added) and grown[len(row) :] == added
        assert all(new in (0, old) for old, new in zip(row, grown, strict=False))
        assert sum(block != 0 for block in grown) <= 4
        row = grown


# Cross attention


def test_cross_attention_is_sized_once_by_the_encoder():
    manager = make_manager(30, full_spec(), cross_spec())
    request = request_of("r", prompt(20))
    assert manager.allocate_slots(request, 20, num_encoder_tokens=100) is not None
    assert [len(row) for row in manager.get_block_ids("r")] == [2, 7]
    request.num_computed_tokens = 20
    request.append_output_token_ids(list(range(30)))
    extend(manager, request, 30)
    assert [len(row) for row in manager.get_block_ids("r")] == [4, 7]
    assert request.kv_capacity == 64
    # Its content does not follow from the tokens, so nothing may be found.
    assert manager.get_computed_blocks(request_of("s", prompt(20)))[1] == 0


# Several groups


def test_groups_agree_on_a_hit():
    manager = make_manager(60, full_spec(), window_spec(32))
    first = request_of("a", prompt(160))
    admit(manager, first, 32)
    run_to(manager, first, 160, 32)
    blocks, found = manager.get_computed_blocks(request_of("b", prompt(170)))
    assert found == 160
    assert [len(row) for row in blocks.blocks] == [10, 10]
    # Full attention's prefix is now shorter; the window has to agree at that length.
    manager.evict_blocks([manager.get_block_ids("a")[0][7]])
    blocks, found = manager.get_computed_blocks(request_of("c", prompt(170)))
    assert found == 112
    assert [i for i, block in enumerate(blocks.get_block_ids()[1]) if block] == [5, 6]


def test_agreement_goes_round_until_nobody_objects():
    manager = make_manager(80, full_spec(), window_spec(17), chunked_spec(64))
    first = request_of("a", prompt(192))
    admit(manager, first, 16)
    run_to(manager, first, 192)
    manager.free(first)
    cached = [manager.block_pool.get_group_cache(group) for group in range(3)]

    def forget(group, *positions):
        manager.evict_blocks(cached[group][first.block_hashes[p]].block_id for p in positions)

    # The window objects to 192 and to 176; chunks to what is not at a chunk's end.
    forget(1, 11, 10)
    forget(2, 8, 9)
    blocks, found = manager.get_computed_blocks(request_of("b", prompt(200)))
    assert found == 128
    full, window, chunked = blocks.get_block_ids()
    assert 0 not in full and len(full) == 8
    assert [i for i, block in enumerate(window) if block] == [7]
    assert chunked == [0] * 8
    second = request_of("c", prompt(200))
    assert admit(manager, second) == 128


def test_groups_with_blocks_of_different_sizes_agree_on_a_common_multiple():
    manager = make_manager(60, full_spec(48), window_spec(40, block_size=32))
    first = request_of("a", prompt(300))
    admit(manager, first)
    _, found = manager.get_computed_blocks(request_of("b", prompt(299)))
    assert found == 288
    _, found = manager.get_computed_blocks(request_of("c", prompt(288)))
    assert found == 192


def test_one_group_that_cannot_be_found_disables_hits():
    manager = make_manager(60, full_spec(), mamba_spec("none", block_size=4096))
    admit(manager, request_of("a", prompt(64)))
    assert manager.get_computed_blocks(request_of("b", prompt(80)))[1] == 0


def test_full_attention_and_aligned_states_agree():
    manager = make_manager(60, full_spec(), mamba_spec("align"))
    first = request_of("a", prompt(150))
    admit(manager, first, 64)
    extend(manager, first, 80)
    extend(manager, first, 6)
    manager.publish_blocks()
    assert manager.get_computed_blocks(request_of("b", prompt(150)))[1] == 144
    assert manager.get_computed_blocks(request_of("c", prompt(144)))[1] == 64
    assert manager.get_computed_blocks(request_of("d", prompt(64)))[1] == 0


@pytest.mark.parametrize("group", [0, 1])
def test_a_block_in_two_groups_is_noticed(group):
    manager = make_manager(60, full_spec(), window_spec(32))
    request = request_of("r", prompt(40))
    admit(manager, request)
    rows = [m.req_to_blocks["r"] for m in manager.managers]
    rows[group][1] = rows[1 - group][0]
    with pytest.raises(AssertionError):
        manager.check_integrity()


def test_a_block_table_that_disagrees_with_the_counts_is_noticed():
    manager = make_manager(20)
    request = request_of("r", prompt(40))
    admit(manager, request)
    manager.managers[0].req_to_blocks["r"].pop()
    with pytest.raises(AssertionError, match="block tables"):
        manager.check_integrity()
