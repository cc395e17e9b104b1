"""Which ranks of a peer a rank talks to: integers only.

Two questions with different answers: whose *bytes* it takes (only ranks that hold its heads, and
of copies the first), and whom it *tells* that it is done (every rank of the peer is told by
somebody, or its blocks would stay for ever).
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.errors import ConfigError
from vllm.v1.kv_cache.shards import source_ranks

__all__ = ["TransferTopology"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferTopology:
    """A rank here and the ranks of one peer.

    Raises:
        ConfigError: neither tensor-parallel size divides the other.
    """

    tp_rank: int
    tp_size: int
    remote_tp_size: int
    total_heads: tuple[int, ...] = ()
    """Head counts of the model's caches that are cut by head; empty where all are replicated."""

    def __post_init__(self) -> None:
        large, small = max(self.sizes), min(self.sizes)
        if small < 1 or large % small:
            raise ConfigError(
                f"--tensor-parallel-size {self.tp_size} here and {self.remote_tp_size} there: one "
                "must divide the other",
                parameter="tensor_parallel_size",
                value=self.tp_size,
            )

    @property
    def sizes(self) -> tuple[int, int]:
        return self.tp_size, self.remote_tp_size

    @property
    def tp_ratio(self) -> int:
        """Ranks here for each of the peer's; negative where the peer has more."""
        if self.tp_size >= self.remote_tp_size:
            return self.tp_size // self.remote_tp_size
        return -(self.remote_tp_size // self.tp_size)

    def aligned_ranks(self) -> tuple[int, ...]:
        """Ranks of the peer that lie where this one lies."""
        if self.tp_ratio > 0:
            return (self.tp_rank // self.tp_ratio,)
        first = self.tp_rank * -self.tp_ratio
        return tuple(range(first, first - self.tp_ratio))

    def source_ranks(self) -> tuple[int, ...]:
        """Ranks of the peer whose bytes this one takes.

        States are cut over all ranks that lie where this one does, so those are sources wherever
        heads alone would not need them.
        """
        by_head = source_ranks(self.total_heads, self.tp_size, self.tp_rank, self.remote_tp_size)
        return tuple(sorted({*by_head, *self.aligned_ranks()}))

    def notified_ranks(self) -> tuple[int, ...]:
        """Ranks of the peer that this one tells when it is done, and asks for handshakes."""
        return self.source_ranks()

    def consumers(self) -> tuple[int, ...]:
        """Ranks of the peer that will tell *this* rank when they are done."""
        return tuple(
            rank
            for rank in range(self.remote_tp_size)
            if self.tp_rank
            in TransferTopology(
                tp_rank=rank,
                tp_size=self.remote_tp_size,
                remote_tp_size=self.tp_size,
                total_heads=self.total_heads,
            ).notified_ranks()
        )
