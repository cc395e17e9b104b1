"""A block's bytes as runs: exactly the payload, disjoint, and few."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kv_cache.helpers import Oracle, full, mamba, placed, sliding
from vllm.v1.kv_cache.placement import place_layers
from vllm.v1.kv_cache.runs import (
    ByteRun,
    block_extents,
    block_runs,
    merge_runs,
    regions,
    runs_by_layer,
    subtract_runs,
)
from vllm.v1.kv_cache_interface import KVQuantMode
from vllm.v1.kv_cache_layout import KVCacheLayout

L = KVCacheLayout
COMPACT = [layout for layout in L if layout.is_block_compact]


def bytes_of(runs, block):
    """Every byte of the runs of one block; a byte that two runs have is an error."""
    found = [byte for run in runs for span in run.intervals(block) for byte in range(*span)]
    assert len(found) == len(set(found))
    return set(found)


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(L),
    sizes=st.fixed_dictionaries({axis: st.integers(1, 3) for axis in "LBHN"}),
)
def test_runs_are_the_bytes_of_the_boxes(layout, sizes):
    # 16 bytes a (head, state), so that pages need no alignment gaps.
    spec = full(sizes["H"], 8, sizes["N"], dtype="int8")
    config = placed([{f"l.{i}": spec for i in range(sizes["L"])}], layout, sizes["B"])
    oracle = Oracle(layout.value, {**sizes, "C": 16})
    by_layer = runs_by_layer(config)
    for layer in range(sizes["L"]):
        for block in range(sizes["B"]):
            expected = {
                oracle.address(layer, block, head, state, byte)
                for head in range(sizes["H"])
                for state in range(sizes["N"])
                for byte in range(16)
            }
            assert bytes_of(by_layer[f"l.{layer}"], block) == expected


attention = st.builds(
    full,
    heads=st.integers(1, 3),
    head_size=st.integers(1, 3),
    block_size=st.just(2),
    dtype=st.sampled_from(["int8", "bfloat16", "float32"]),
)
states = st.builds(
    mamba,
    shapes=st.tuples(
        st.tuples(st.integers(1, 5), st.just(2)), st.tuples(st.sampled_from([2, 4, 6]))
    ),
    dtypes=st.just(("float32", "bfloat16")),
    block_size=st.just(2),
    page_size_padded=st.sampled_from([None, 128]),
)


@settings(max_examples=80, deadline=None)
@given(
    layout=st.sampled_from([L.BLHNC, L.BLNHC]),
    groups=st.lists(
        st.one_of(
            st.lists(attention, min_size=1, max_size=3),
            st.lists(states, min_size=1, max_size=3),
        ),
        min_size=1,
        max_size=3,
    ),
    num_blocks=st.integers(1, 3),
)
def test_two_blocks_never_share_a_byte_whoever_owns_them(layout, groups, num_blocks):
    named = [{f"g{g}.{i}": spec for i, spec in enumerate(group)} for g, group in enumerate(groups)]
    config = placed(named, layout, num_blocks)
    by_layer = runs_by_layer(config)
    owned = {}
    for group_id, group in enumerate(config.kv_cache_groups):
        for block in range(num_blocks):
            layers = [bytes_of(by_layer[name], block) for name in group.layer_names]
            for a, b in combinations(layers, 2):
                assert not a & b
            sizes = [group.spec_of(name).unpadded_page_size_bytes for name in group.layer_names]
            assert [len(layer) for layer in layers] == sizes
            owned[group_id, block] = set().union(*layers)
            assert owned[group_id, block] == bytes_of(block_runs(config, group_id), block)
            assert max(owned[group_id, block]) < config.backing_size_bytes
    for one, two in combinations(owned, 2):
        if one[1] != two[1]:
            assert not owned[one] & owned[two]


def test_equal_pages_overlay_in_a_layer_compact_pool():
    groups = [{"a.0": full(), "a.1": full()}, {"b.0": sliding(), "b.1": sliding()}]
    for layout in (L.LBHNC, L.LBNHC, L.LHBNC):
        config = placed(groups, layout, 3)
        for block in range(3):
            mine = bytes_of(block_runs(config, 0), block)
            assert mine == bytes_of(block_runs(config, 1), block)
            assert not mine & bytes_of(block_runs(config, 1), (block + 1) % 3)


@pytest.mark.parametrize(
    ("layout", "intervals"),
    [("LBHNC", 4), ("LBNHC", 4), ("LHBNC", 8), ("BLHNC", 1), ("BLNHC", 1), ("BHLNC", 1)],
)
def test_intervals_of_a_block_over_all_layers(layout, intervals):
    """4 layers of 2 heads: what one block costs a transfer."""
    config = placed([{f"l.{i}": full() for i in range(4)}], L(layout), 5)
    runs = block_runs(config)
    assert len(runs) == 1  # one strided description, whatever the layout
    assert sum(run.count for run in runs) == intervals
    assert sum(run.count * run.length for run in runs) == config.bytes_per_block


def test_a_head_is_one_run_over_all_layers_in_bhlnc():
    config = placed([{f"l.{i}": full() for i in range(4)}], L.BHLNC, 5)
    tensor = config.kv_cache_tensors[0]
    content = 16 * 8 * 4
    assert tensor.layer_stride == content
    runs = runs_by_layer(config)["l.1"]
    assert [(r.offset, r.count, r.step, r.length) for r in runs] == [
        (content, 2, 4 * content, content)
    ]


def test_gaps_are_bridged_only_where_the_block_is_one_stretch():
    odd = full(1, 1, 3, dtype="int8")  # 6 bytes in 16
    packed = placed([{"l.0": odd, "l.1": odd}], L.BLHNC, 2)
    assert [(run.length, run.count) for run in block_runs(packed, 0)] == [(6, 2)]
    assert [(r.length, r.count) for r in block_runs(packed, 0, bridge_gaps=True)] == [(22, 1)]
    apart = placed([{"l.0": odd, "l.1": odd}], L.LBHNC, 2)
    assert block_runs(apart, 0, bridge_gaps=True) == block_runs(apart, 0)


def test_padding_is_not_payload():
    spec = full(page_size_padded=2048)
    config = placed([{"l.0": spec}], L.LBHNC, 3)
    assert [(run.block_stride, run.length) for run in block_runs(config)] == [(2048, 1024)]


def test_a_split_block_is_still_one_run():
    spec = full(block_size=64)
    config = placed([{"l.0": spec}], L.LBHNC, 3, (16,))
    assert [(run.block_stride, run.length) for run in block_runs(config)] == [(4096, 4096)]


def test_nvfp4_page_is_one_run():
    spec = full(4, 128, 16, "uint8", kv_quant_mode=KVQuantMode.NVFP4)
    config = placed([{"l.0": spec}], L.LBHNC, 3)
    assert [(run.count, run.length) for run in block_runs(config)] == [(1, 8 * 16 * 72)]


def test_overlapping_runs_of_groups_are_joined():
    runs = [
        ByteRun(offset=0, block_stride=64, length=10),
        ByteRun(offset=4, block_stride=64, length=20),
    ]
    assert merge_runs(runs) == (ByteRun(offset=0, block_stride=64, length=24),)


@pytest.mark.parametrize("layout", list(L))
def test_regions_cover_the_payload_exactly(layout):
    """Dense pages: every byte of every region belongs to a block, and all of them are covered."""
    config = placed([{f"l.{i}": full() for i in range(3)}], layout, 4)
    found = regions(config)
    assert len(found) == (1 if layout.is_block_outermost else 3)
    covered = [byte for r in found for byte in range(r.offset, r.offset + r.size_bytes)]
    assert len(covered) == len(set(covered))
    payload = set().union(*(bytes_of(block_runs(config), block) for block in range(4)))
    assert set(covered) == payload


def test_overlaid_layers_share_a_region_and_all_are_members():
    groups = [{"a.0": full(), "a.1": full()}, {"b.0": sliding()}]
    config = placed(groups, L.LBHNC, 4)
    assert [region.members for region in regions(config)] == [
        ((0, "a.0"), (1, "b.0")),
        ((0, "a.1"),),
    ]


def test_like_layers_lie_together_though_named_in_turn():
    specs = {"l.0": full(2), "l.1": full(4), "l.2": full(2), "l.3": full(4)}
    tensors = place_layers([list(specs)], specs, L.LBHNC, 2)
    assert [tensor.layers for tensor in tensors] == [("l.0", "l.2"), ("l.1", "l.3")]
    assert [tensor.offset for tensor in tensors] == [0, 2 * 2 * 1024]


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=6)


@given(whole=spans, parts=spans)
def test_what_parts_leave_of_a_whole(whole, parts):
    def runs(pieces):
        return [ByteRun(offset=at, block_stride=100, length=size) for at, size in pieces]

    def addresses(found):
        return {at for run in found for span in run.intervals(0) for at in range(*span)}

    left = subtract_runs(runs(whole), runs(parts))
    assert addresses(left) == addresses(runs(whole)) - addresses(runs(parts))
    assert {run.block_stride for run in left} <= {100}


@pytest.mark.parametrize("layout", KVCacheLayout)
def test_extents_of_all_blocks_are_the_whole_pool_and_each_byte_is_one_blocks(layout):
    groups = [{"l.0": full(2, 4, 4), "l.1": full(2, 4, 4)}, {"l.2": sliding(2, 4, 8, 4)}]
    config = placed(groups, layout, 3)
    owner = {}
    for run in block_extents(config):
        for block in range(3):
            for span in run.intervals(block):
                for at in range(*span):
                    assert owner.setdefault(at, block) == block
    assert owner.keys() == set(range(config.backing_size_bytes))
    for run in block_runs(config):
        for block in range(3):
            assert all(owner[at] == block for s in run.intervals(block) for at in range(*s))
