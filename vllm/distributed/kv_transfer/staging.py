"""The staging ring: registered memory that blocks are gathered into and scattered out of.

Owns slots, the cut of a request into chunks (both sides cut alike, from numbers that both know)
and the moves between cache and slots. A slot holds whole units of one table, packed. Knows no
peer, no message and no transport beyond prepared lists.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from vllm.distributed.kv_transfer.conversion import convert
from vllm.distributed.kv_transfer.plan import TransferPlan, TransferTable, UnitBlocks
from vllm.errors import KVTransferError
from vllm.utils.huge_pages import HugePageArena
from vllm.v1.kv_cache.pieces import PieceMover, make_mover

__all__ = ["Chunk", "Done", "RingPair", "RingShape", "StagingRing", "TableMovers", "chunks_of"]

_GRANULE = 64 << 10
_MOST_SLOTS = 4096
_LARGEST_SLOT = 1 << 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RingShape:
    """What a peer needs to know of a ring.

    Raises:
        KVTransferError: no ring is like that.
    """

    address: int
    slot_bytes: int
    """A power of two."""
    num_slots: int
    on_host: bool
    """The ring lies in host memory, wherever the cache is."""

    def __post_init__(self) -> None:
        size = self.slot_bytes
        if not (0 < size <= _LARGEST_SLOT and not size & (size - 1)) or not (
            0 < self.num_slots <= _MOST_SLOTS and 0 <= self.address < 1 << 63
        ):
            raise KVTransferError(f"{self.num_slots} slots of {size} bytes are no staging ring")


@dataclass(frozen=True, slots=True, kw_only=True)
class RingPair:
    """The rings of two peers: chunks are as large as fit into a slot of both."""

    source: RingShape
    target: RingShape

    @property
    def slot_bytes(self) -> int:
        return min(self.source.slot_bytes, self.target.slot_bytes)

    @property
    def granule(self) -> int:
        return min(_GRANULE, self.slot_bytes)

    def rows(self, side: str) -> np.ndarray:
        """The strided row of a ring's granules, for ``TransferPort.prepare``."""
        ring: RingShape = getattr(self, side)
        count = ring.num_slots * ring.slot_bytes // self.granule
        return np.array([[ring.address, self.granule, self.granule, count]], dtype=np.int64)

    def granules(self, side: str, slot: int, num_bytes: int) -> np.ndarray:
        """Descriptors of the first ``num_bytes`` of a slot: neighbours, which cross as one."""
        ring: RingShape = getattr(self, side)
        return slot * (ring.slot_bytes // self.granule) + np.arange(-(-num_bytes // self.granule))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Some units of one table."""

    table: int
    first: int
    count: int
    num_bytes: int


def chunks_of(plan: TransferPlan, counts: Sequence[int], slot_bytes: int) -> list[Chunk] | None:
    """A request of ``counts`` units a table, cut to slots; None where a unit does not fit."""
    chunks = []
    for number, (table, count) in enumerate(zip(plan.tables, counts, strict=True)):
        size = max(table.bytes_per_unit, table.target_bytes_per_unit)
        if size > slot_bytes:
            return None
        each = slot_bytes // size
        chunks += [
            Chunk(
                table=number,
                first=first,
                count=min(each, count - first),
                num_bytes=min(each, count - first) * table.bytes_per_unit,
            )
            for first in range(0, count, each)
        ]
    return chunks


class Done:
    """Work that is queued on a device, or was done at once."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def poll(self) -> bool:
        return self._event is None or self._event.query()


class StagingRing:
    """Slots in memory of ``device``, or in the host's, pinned.

    Args:
        backing: 1-D int8, the cache whose blocks come and go.
        slot_bytes: a power of two.
        device: of the ring: the cache's, or the host.
    """

    def __init__(
        self,
        backing: torch.Tensor,
        num_slots: int,
        slot_bytes: int,
        device: torch.device | str | None = None,
    ) -> None:
        device = backing.device if device is None else torch.device(device)
        self._backing = backing
        self._apart = device.type != backing.device.type
        size = num_slots * slot_bytes
        if device.type == "cpu" and not self._apart:
            self._memory = HugePageArena().empty(size).view(torch.int8)
        else:
            self._memory = torch.empty(
                size, dtype=torch.int8, device=device, pin_memory=self._apart
            )
        # A kernel of the cache's device works in its own memory; the rest is one plain copy.
        self._bounce = (
            torch.empty_like(self._memory, device=backing.device) if self._apart else self._memory
        )
        self.shape = RingShape(
            address=self._memory.data_ptr(),
            slot_bytes=slot_bytes,
            num_slots=num_slots,
            on_host=device.type == "cpu",
        )
        self._free = deque(range(num_slots))

    @property
    def region(self) -> tuple[int, int]:
        """(address, bytes) to register."""
        return self._memory.data_ptr(), self._memory.numel()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        """A slot of one's own until ``give``; None where all are taken."""
        return self._free.popleft() if self._free else None

    def give(self, slot: int) -> None:
        assert slot not in self._free, f"slot {slot} is given back twice"
        self._free.append(slot)

    def _part(self, memory: torch.Tensor, slot: int, num_bytes: int) -> torch.Tensor:
        begin = slot * self.shape.slot_bytes
        return memory[begin : begin + num_bytes]

    def gather(self, movers: TableMovers, chunk: Chunk, units: UnitBlocks, slot: int) -> Done:
        """Pack units of blocks here (as source) into a slot."""
        starts = units.starts[0, chunk.first : chunk.first + chunk.count]
        packed = np.arange(chunk.count) * movers.table.bytes_per_unit
        into = self._part(self._bounce, slot, chunk.num_bytes)
        movers.gather.move(self._backing.data_ptr(), into.data_ptr(), starts, packed)
        if self._apart:
            self._part(self._memory, slot, chunk.num_bytes).copy_(into, non_blocking=True)
        return Done(self._backing.device)

    def scatter(self, movers: TableMovers, chunk: Chunk, units: UnitBlocks, slot: int) -> Done:
        """Put the units of a slot into blocks here (as target), converted where that is planned."""
        table = movers.table
        starts = units.starts[1, chunk.first : chunk.first + chunk.count]
        out_of = self._part(self._bounce, slot, chunk.num_bytes)
        if self._apart:
            out_of.copy_(self._part(self._memory, slot, chunk.num_bytes), non_blocking=True)
        if table.conversion is not None:
            rows = out_of.view(chunk.count, table.bytes_per_unit)
            out_of = convert(table.conversion, rows, movers.scales).view(-1)
        packed = np.arange(chunk.count) * table.target_bytes_per_unit
        movers.scatter.move(
            out_of.data_ptr(), self._backing.data_ptr(), packed, starts, streams=True
        )
        return Done(self._backing.device)


class TableMovers:
    """The moves of one table, made when they are first needed.

    Args:
        scales: of each converted layer, (K, V) of the side that is scaled; 1.0 where left out.
    """

    def __init__(
        self,
        table: TransferTable,
        device: torch.device,
        scales: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self.table = table
        self._device = device
        self._given = scales or {}

    @cached_property
    def gather(self) -> PieceMover:
        """From blocks there to packed units."""
        table = self.table
        grain = math.gcd(table.source.grain, table.bytes_per_unit)
        return make_mover(
            table.gather_pieces(), self._device, grain=grain, apart=table.source.block_stride
        )

    @cached_property
    def scatter(self) -> PieceMover:
        """From packed (and converted) units to blocks here."""
        table = self.table
        grain = math.gcd(table.target_bytes_per_unit, table.target.grain)
        return make_mover(
            table.scatter_pieces(), self._device, grain=grain, apart=table.target_bytes_per_unit
        )

    @cached_property
    def copy(self) -> PieceMover:
        """From blocks there to blocks here."""
        table = self.table
        grain = math.gcd(table.source.grain, table.target.grain)
        apart = table.source.block_stride
        return make_mover(table.copy_pieces(), self._device, grain=grain, apart=apart, of_peer=True)

    @cached_property
    def scales(self) -> torch.Tensor:
        """float32 of every element of a packed unit."""
        sides = [
            np.repeat(self._given.get(name, (1.0, 1.0)), (keys, both - keys))
            for name, keys, both in self.table.converted
        ]
        numbers = np.concatenate(sides).astype(np.float32)
        return torch.from_numpy(numbers).to(self._device)
