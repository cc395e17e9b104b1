"""What moving blocks costs by each way there is: figures per transport, and their sums.

Pure arithmetic. Ways:

* ``descriptors``: the transport copies every run straight to its place.
* ``staging``: one kernel gathers blocks into a ring there, a few large runs cross, one kernel
  scatters them here; in chunks, so that the three go on at the same time.
* ``mapped``: a kernel here reads the peer's memory itself, where it is mapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = [
    "HOST_COPIES",
    "NVLINK",
    "TRANSPORTS",
    "Experience",
    "Route",
    "TransportCosts",
    "Way",
    "route",
]

Way = str
"""``descriptors``, ``staging`` or ``mapped``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportCosts:
    """Measured once; a transfer's path is chosen by them, so ratios count more than figures."""

    name: str
    source: str
    """Where the figures were taken."""
    seconds_per_descriptor: float
    bytes_per_second: float
    """Of large runs."""
    copy_bytes_per_second: float
    """Gathering or scattering, bytes counted once."""
    copies_run_beside: bool
    """Scattering goes on while the transport copies; else one thread does both in turn."""
    seconds_per_chunk: float
    """Messages and launches of a chunk."""
    seconds_to_start: float
    """Asking the peer to gather, and its answer."""
    num_slots: int
    """Of the staging ring where nobody says."""
    slot_bytes: int
    """Of the staging ring where nobody says: hides a chunk's messages, or stays in the caches."""
    mapped_bytes_per_second: float = 0.0
    """Of a kernel that reads the peer's memory; 0 where that cannot be."""
    mapped_seconds: float = 0.0
    """Its launch."""

    def by_descriptors(self, num_descriptors: int, num_bytes: int) -> float:
        """Seconds."""
        return num_descriptors * self.seconds_per_descriptor + num_bytes / self.bytes_per_second

    def by_staging(self, num_bytes: int, chunk_bytes: int) -> float:
        """Seconds; the first chunk's gathering and the last one's scattering overlap nothing."""
        chunks = -(-num_bytes // chunk_bytes)
        wire, copy = num_bytes / self.bytes_per_second, num_bytes / self.copy_bytes_per_second
        ends = min(num_bytes, chunk_bytes) / self.copy_bytes_per_second
        busy = max(wire, copy) + ends if self.copies_run_beside else wire + copy
        return self.seconds_to_start + ends + busy + chunks * self.seconds_per_chunk

    def by_mapping(self, num_bytes: int) -> float:
        """Seconds."""
        return self.mapped_seconds + num_bytes / self.mapped_bytes_per_second


NVLINK = TransportCosts(
    name="nvlink",
    source="two H200 of one host, NIXL 1.5.1 over UCX cuda_ipc",
    seconds_per_descriptor=4.2e-6,
    bytes_per_second=385e9,
    copy_bytes_per_second=1.5e12,
    copies_run_beside=True,
    seconds_per_chunk=350e-6,
    seconds_to_start=400e-6,
    num_slots=4,
    slot_bytes=64 << 20,
    mapped_bytes_per_second=365e9,
    mapped_seconds=0.5e-3,
)
HOST_COPIES = TransportCosts(
    name="host",
    source="two processes of one host, 2 cores, NIXL 1.5.1 over UCX cma, 4 threads, huge pages",
    seconds_per_descriptor=2.0e-6,
    bytes_per_second=11e9,
    copy_bytes_per_second=6e9,
    copies_run_beside=False,
    seconds_per_chunk=60e-6,
    seconds_to_start=1e-3,
    num_slots=8,
    slot_bytes=1 << 21,
)
TRANSPORTS: Mapping[str, TransportCosts] = MappingProxyType(
    {costs.name: costs for costs in (NVLINK, HOST_COPIES)}
)


class Experience:
    """Measured over predicted seconds of each way, as it has been of late with one peer.

    The figures above are of two machines; on others, and on busy ones, ways differ by more than
    their predictions do. A way that was slow is tried again after a while: what is known of it
    fades with every transfer that goes another way.
    """

    _NEW = 0.5
    _FADES = 0.97
    _MOST = 20.0
    LEAST_BYTES = 4 << 20
    """Below this, chance decides how long a transfer takes."""

    def __init__(self) -> None:
        self._factors: dict[Way, float] = {}
        self._tried: set[Way] = set()

    def factor(self, way: Way) -> float:
        return self._factors.get(way, 1.0)

    def learn(self, way: Way, predicted: float, measured: float) -> None:
        """What a transfer took. A way's first one tells nothing: it also builds kernels."""
        for other in self._factors.keys() - {way}:
            self._factors[other] **= self._FADES
        if way not in self._tried:
            self._tried.add(way)
            return
        ratio = min(max(measured / predicted, 1 / self._MOST), self._MOST)
        self._factors[way] = self.factor(way) ** (1 - self._NEW) * ratio**self._NEW


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The way that was chosen, and what each would take."""

    way: Way
    seconds: Mapping[Way, float]


def route(
    costs: TransportCosts,
    num_descriptors: int,
    num_bytes: int,
    chunk_bytes: int | None,
    *,
    mapped: bool = False,
    seen: Experience | None = None,
) -> Route:
    """The quickest way of a request; ties go to the one with the fewest parts.

    Args:
        num_descriptors, num_bytes: of the runs that go straight to their place.
        chunk_bytes: of a slot of the ring; None where there is none, or a unit does not fit.
        mapped: the peer's memory is mapped here.
        seen: how earlier transfers compared with what was predicted of them.
    """
    seconds = {"descriptors": costs.by_descriptors(num_descriptors, num_bytes)}
    if chunk_bytes is not None:
        seconds["staging"] = costs.by_staging(num_bytes, chunk_bytes)
    if mapped and costs.mapped_bytes_per_second:
        seconds["mapped"] = costs.by_mapping(num_bytes)
    if seen is not None:
        seconds = {way: value * seen.factor(way) for way, value in seconds.items()}
    return Route(way=min(seconds, key=lambda way: seconds[way]), seconds=seconds)
