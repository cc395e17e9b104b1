"""Which heads a tensor-parallel rank holds, and from whom a rank of another size takes its own.

Arithmetic on ranks and counts only: the same for KV heads, for the heads of a recurrent state, and
for the groups or projections inside a convolution's state. Where ranks are more than heads,
neighbouring ranks hold copies, and the first of them is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.errors import ConfigError

__all__ = ["ShardSource", "heads_of_rank", "shard_sources", "source_ranks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSource:
    """``count`` heads of a peer's rank, and where they belong here."""

    rank: int
    """Of the peer."""
    first: int
    """Among the heads of that rank."""
    target: int
    """Among the heads of the own rank."""
    count: int


def heads_of_rank(total: int, tp_size: int, rank: int) -> range:
    """Global numbers of the heads that ``rank`` of ``tp_size`` holds.

    Raises:
        ConfigError: neither number divides the other.
    """
    assert 0 <= rank < tp_size
    if total % tp_size == 0:
        size = total // tp_size
        return range(rank * size, (rank + 1) * size)
    if tp_size % total == 0:
        head = rank * total // tp_size
        return range(head, head + 1)
    raise ConfigError(
        f"{total} heads cannot be shared out to {tp_size} ranks: --tensor-parallel-size must "
        "divide them or be a multiple of them",
        parameter="tensor_parallel_size",
        value=tp_size,
    )


def shard_sources(
    total: int, tp_size: int, rank: int, remote_tp_size: int
) -> tuple[ShardSource, ...]:
    """Where ``rank`` of ``tp_size`` finds its heads among the ranks of a peer, in order.

    Raises:
        ConfigError: the heads cannot be shared out to one of the two sizes.
    """
    own = heads_of_rank(total, tp_size, rank)
    remote = [heads_of_rank(total, remote_tp_size, r) for r in range(remote_tp_size)]
    sources: list[ShardSource] = []
    for target, head in enumerate(own):
        holder = next(r for r, heads in enumerate(remote) if head in heads)
        first = head - remote[holder].start
        last = sources[-1] if sources else None
        if last is not None and last.rank == holder and last.first + last.count == first:
            sources[-1] = ShardSource(
                rank=holder, first=last.first, target=last.target, count=last.count + 1
            )
        else:
            sources.append(ShardSource(rank=holder, first=first, target=target, count=1))
    return tuple(sources)


def source_ranks(
    totals: Sequence[int], tp_size: int, rank: int, remote_tp_size: int
) -> tuple[int, ...]:
    """Ranks of the peer that hold something of ``rank``'s, over caches with these head counts."""
    ranks = {
        source.rank
        for total in totals
        for source in shard_sources(total, tp_size, rank, remote_tp_size)
    }
    return tuple(sorted(ranks))
