"""Zeroing and copying touch exactly the blocks that were named."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kv_cache.helpers import full, mamba, placed, sliding
from vllm.v1.kv_cache import allocate_kv_cache
from vllm.v1.kv_cache.blocks import KVBlockZeroer, KVCacheBlockCopy, copy_kv_cache_blocks_inplace
from vllm.v1.kv_cache_layout import KVCacheLayout

B = 6


def random_cache(config):
    cache = allocate_kv_cache(config)
    noise = torch.randint(1, 100, cache.backing.shape, dtype=torch.int8)
    cache.backing.copy_(noise)
    return cache


def by_block(cache, name):
    """Bytes of each manager block of a layer."""
    view = cache[name]
    return view.reshape(B, -1).view(torch.int8)


CONFIGS = [
    lambda layout: placed([{f"l.{i}": full() for i in range(3)}], layout, B),
    lambda layout: placed(
        [{"l.0": full(3, 1, 1, "int8"), "l.1": full(3, 1, 1, "int8")}], layout, B
    ),
    lambda layout: placed(
        [{"l.0": full(), "l.1": full()}, {"l.2": sliding(), "l.3": sliding()}], layout, B
    ),
]
ids_of_blocks = st.lists(st.integers(0, B - 1), max_size=B, unique=True)


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from(KVCacheLayout), make=st.sampled_from(CONFIGS), block_ids=ids_of_blocks
)
def test_zeroing(layout, make, block_ids):
    cache = random_cache(make(layout))
    before = {name: by_block(cache, name).clone() for name in cache}
    KVBlockZeroer(cache.backing, cache.config).zero_block_ids(block_ids)
    for name in cache:
        expected = before[name].clone()
        expected[block_ids] = 0
        assert torch.equal(by_block(cache, name), expected)


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from(KVCacheLayout),
    make=st.sampled_from(CONFIGS),
    sources=st.lists(st.integers(0, B - 1), min_size=B, max_size=B),
    targets=ids_of_blocks,
)
def test_copying_reads_all_before_it_writes(layout, make, sources, targets):
    cache = random_cache(make(layout))
    before = {name: by_block(cache, name).clone() for name in cache}
    copies = [KVCacheBlockCopy(src, dst) for src, dst in zip(sources, targets, strict=False)]
    copy_kv_cache_blocks_inplace(cache.backing, cache.config, copies)
    for name in cache:
        expected = before[name].clone()
        for src, dst in copies:
            expected[dst] = before[name][src]
        assert torch.equal(by_block(cache, name), expected)


def test_a_copy_for_one_group_leaves_paddings_of_the_block_alone():
    groups = [{"l.0": mamba(block_size=16)}, {"l.1": full(1, 1, 4, "int8")}]
    cache = random_cache(placed(groups, KVCacheLayout.BLHNC, B))
    before = cache.backing.clone()
    copy_kv_cache_blocks_inplace(cache.backing, cache.config, [KVCacheBlockCopy(1, 2)], group_id=1)
    changed = torch.nonzero(cache.backing != before).flatten()
    stride = cache.config.bytes_per_block
    assert set(changed.tolist()) <= set(range(2 * stride, 2 * stride + 8))


def test_zeroing_covers_the_largest_owner():
    groups = [{"l.0": mamba(block_size=16)}, {"l.1": full(1, 1, 4, "int8")}]
    cache = random_cache(placed(groups, KVCacheLayout.BLHNC, B))
    KVBlockZeroer(cache.backing, cache.config).zero_block_ids([3])
    assert not cache["l.0"][3].any()
    assert cache["l.0"][2].all()
    assert cache["l.0"][4].all()


def test_wrong_orders_are_our_own_bugs():
    cache = random_cache(CONFIGS[0](KVCacheLayout.LBHNC))
    with pytest.raises(AssertionError, match="copied to twice"):
        copy_kv_cache_blocks_inplace(
            cache.backing, cache.config, [KVCacheBlockCopy(0, 1), KVCacheBlockCopy(2, 1)]
        )
    with pytest.raises(AssertionError, match="no such blocks"):
        KVBlockZeroer(cache.backing, cache.config).zero_block_ids([B])
