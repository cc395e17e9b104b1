"""The longest prefix that all groups can start after, against its definition."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kv_cache.helpers import full, mamba, sliding
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import get_kv_cache_coordinator
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
)

sizes = st.sampled_from([2, 4, 6, 8])


def chunked(block_size, chunk):
    return ChunkedLocalAttentionSpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=4,
        dtype="int8",
        attention_chunk_size=chunk,
    )


specs = st.one_of(
    sizes.map(lambda size: full(1, 1, size, "int8")),
    st.builds(
        lambda size, window: sliding(1, 4, window, size, dtype="int8"),
        sizes,
        st.sampled_from([2, 3, 5, 8, 9, 17]),
    ),
    # Chunks that end inside blocks, and blocks that are larger than chunks.
    st.builds(chunked, sizes, st.sampled_from([2, 3, 4, 8, 12, 20])),
    st.builds(
        lambda size, mode: mamba(block_size=size, mamba_cache_mode=mode),
        sizes,
        st.sampled_from(["align", "all"]),
    ),
)


def needed(spec, num_tokens):
    """Blocks that whoever starts after ``num_tokens`` tokens reads."""
    end = num_tokens // spec.block_size
    if isinstance(spec, MambaSpec):
        return range(end - 1, end)
    return range(spec.num_skipped_tokens(num_tokens) // spec.block_size, end)


@settings(max_examples=400, deadline=None)
@given(
    specs=st.lists(specs, min_size=1, max_size=4),
    num_tokens=st.integers(1, 60),
    limit=st.integers(0, 60),
    data=st.data(),
)
def test_no_shorter_no_longer_and_every_block_that_is_read_is_there(specs, num_tokens, limit, data):
    hashed = math.gcd(*(spec.block_size for spec in specs))
    pool = BlockPool(400, enable_caching=True, hash_block_size=hashed)
    groups = [KVCacheGroupSpec([f"l.{i}"], spec) for i, spec in enumerate(specs)]
    coordinator = get_kv_cache_coordinator(KVCacheConfig(400, [], groups), pool)
    hashes = [bytes([i]) for i in range(num_tokens // hashed)]
    cached = []
    for group, spec in enumerate(specs):
        ratio = spec.block_size // hashed
        count = len(hashes) // ratio
        lost = data.draw(st.sets(st.integers(0, 30), max_size=3))
        cached.append(set(range(count)) - lost)
        for index in cached[-1]:
            (block,) = pool.get_new_blocks(1)
            block.block_hash, block.group_id = hashes[(index + 1) * ratio - 1], group
            pool.get_group_cache(group)[block.block_hash] = block

    step = math.lcm(*(spec.block_size for spec in specs))
    longest = min(limit, len(hashes) * hashed) // step * step
    hits = [
        length
        for length in range(0, longest + 1, step)
        if length == 0
        or all(set(needed(spec, length)) <= own for spec, own in zip(specs, cached, strict=True))
    ]
    rows, found = coordinator.find_longest_cache_hit(hashes, limit)
    assert found == max(hits)
    for spec, row in zip(specs, rows, strict=True):
        assert len(row) == found // spec.block_size
        assert not found or all(not row[index].is_null for index in needed(spec, found))
