"""Which heads a rank holds and where it finds them at a peer of another size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.errors import ConfigError
from vllm.v1.kv_cache.shards import heads_of_rank, shard_sources, source_ranks

SIZES = (1, 2, 4, 8)


def test_conformance_more_consumers_than_producers():
    """8 heads, P of 2 ranks, D of 4: D's ranks read 0, 0, 1, 1 at factors 0, 1, 0, 1."""
    found = [shard_sources(8, 4, rank, 2) for rank in range(4)]
    assert [[s.rank for s in sources] for sources in found] == [[0], [0], [1], [1]]
    assert [sources[0].first // sources[0].count for sources in found] == [0, 1, 0, 1]


def test_conformance_more_producers_than_consumers():
    assert [source_ranks([8], 2, rank, 4) for rank in range(2)] == [(0, 1), (2, 3)]


def test_conformance_replicated_heads():
    """2 heads, P of 4 ranks, D alone: attention reads two ranks, states read all four."""
    assert [list(heads_of_rank(2, 4, rank)) for rank in range(4)] == [[0], [0], [1], [1]]
    assert source_ranks([2], 1, 0, 4) == (0, 2)
    assert source_ranks([2, 16], 1, 0, 4) == (0, 1, 2, 3)


@given(
    total=st.sampled_from([1, 2, 4, 8, 16]),
    here=st.sampled_from(SIZES),
    there=st.sampled_from(SIZES),
)
def test_every_rank_gets_each_of_its_heads_once(total, here, there):
    for rank in range(here):
        own = heads_of_rank(total, here, rank)
        got = {}
        for source in shard_sources(total, here, rank, there):
            theirs = heads_of_rank(total, there, source.rank)
            for i in range(source.count):
                assert source.target + i not in got
                got[source.target + i] = theirs[source.first + i]
        assert got == dict(enumerate(own))


def test_heads_that_ranks_cannot_share_are_refused():
    with pytest.raises(ConfigError, match="8 heads cannot be shared out to 3 ranks"):
        heads_of_rank(8, 3, 0)
