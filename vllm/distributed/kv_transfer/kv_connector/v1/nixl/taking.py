"""The consumer's side of staging and pushing: asks, takes chunks in, and says how far it has come.

Owns takes: one per load and rank of the peer. Whatever is lost on the way is asked for again. A
take that is given up is *over* only when nothing more will be written here for it: reads are this
side's own, and of writes the owner says so. Runs in the transfer thread; every call returns at
once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.letters import (
    PULL_STAGED,
    PUSH,
    PUSH_STAGED,
    STRANGER,
    Ask,
    Told,
    UnitLists,
    encode,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import RemoteParams
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.peers import PeerRank
from vllm.distributed.kv_transfer.plan import UnitBlocks
from vllm.distributed.kv_transfer.staging import Chunk, Done, StagingRing, chunks_of
from vllm.distributed.kv_transfer.transport.port import PeerLostError, PortError, TransferPort
from vllm.errors import KVTransferError

__all__ = ["Take", "Taker"]

_ASK_AGAIN = 0.5
"""Seconds of silence after which a message is thought lost."""


@dataclass(slots=True)
class Take:
    """What one load gets of one rank."""

    number: int
    rank: PeerRank
    params: RemoteParams
    way: int
    units: list[UnitBlocks]
    lists: list[UnitLists]
    chunks: list[Chunk]
    asked: float
    told: dict[int, int] = field(default_factory=dict)
    """Chunks that lie in a slot, theirs or (written by them) ours."""
    reading: dict[int, tuple[int, Any]] = field(default_factory=dict)
    scattering: dict[int, tuple[int, Done]] = field(default_factory=dict)
    granted: dict[int, int] = field(default_factory=dict)
    arrived: set[int] = field(default_factory=set)
    num_done: int = 0
    num_descriptors: int = 0
    error: str | None = None
    over: bool = False
    owner_is_over: bool = False

    @property
    def num_bytes(self) -> int:
        plan = self.rank.plan
        assert plan is not None
        return plan.num_bytes(self.units)


class Taker:
    """
    Args:
        hello: what an owner gets that does not know this worker.
    """

    def __init__(
        self,
        port: TransferPort,
        ring: StagingRing | None,
        hello: bytes,
        clock: Callable[[], float],
    ) -> None:
        self._port = port
        self._ring = ring
        self._hello = hello
        self._clock = clock
        self._numbers = itertools.count()
        self._takes: dict[int, Take] = {}
        self.progress = 0
        """Counts chunks: while it moves, the next turn should come at once."""

    @property
    def is_busy(self) -> bool:
        return bool(self._takes)

    def start(
        self, rank: PeerRank, params: RemoteParams, way: int, units: list[UnitBlocks]
    ) -> Take:
        """Ask for these units.

        Raises:
            KVTransferError: they cannot be staged.
            PortError: the peer cannot be asked.
        """
        plan = rank.plan
        assert plan is not None
        writes = way == PUSH
        chunks = [Chunk(table=0, first=0, count=0, num_bytes=0)]
        if not writes:
            assert rank.pair is not None
            cut = chunks_of(plan, [len(own) for own in units], rank.pair.slot_bytes)
            if cut is None:
                raise KVTransferError(
                    "a block is larger than a slot of the staging ring: raise staging_slot_bytes "
                    "in kv_connector_extra_config on both sides"
                )
            chunks = cut
        take = Take(
            next(self._numbers),
            rank,
            params,
            way,
            units,
            [_lists(own, writes) for own in units],
            chunks,
            self._clock(),
        )
        if way == PUSH_STAGED:
            self._grant(take)
        try:
            self._ask(take)
        except PortError:
            self._give_back(take)
            raise
        self._takes[take.number] = take
        return take

    def abandon(self, take: Take, why: str) -> None:
        """Start nothing more; ``over`` follows when nothing more can be written."""
        if take.error is None and not take.over:
            take.error = why
            if not take.owner_is_over:
                self._try_asking(take)

    def _ask(self, take: Take) -> None:
        take.asked = self._clock()
        if not take.rank.introduced:
            self._port.notify(take.rank.agent, b"HELLO:" + self._hello)
        grants = [] if take.error else list(take.granted.items())
        letter = Ask(
            take.number,
            str(take.params.remote_request_id),
            take.params.remote_lease_generation,
            take.way,
            take.num_done,
            grants,
            take.error is not None,
            take.lists if take.num_done == 0 else [],
        )
        self._port.notify(take.rank.agent, encode(letter))

    def _try_asking(self, take: Take) -> None:
        try:
            self._ask(take)
        except PeerLostError as error:
            take.error = take.error or str(error)
            take.owner_is_over = True
        except PortError as error:
            take.error = take.error or str(error)

    def take_in(self, sender: str, told: Told) -> bool:
        """An answer of an owner; False where it is to nothing that was asked."""
        take = self._takes.get(told.job)
        if take is None or take.rank.agent != sender:
            return False
        if told.over and told.error == STRANGER:
            if take.num_done or take.error:
                # It has forgotten us in the middle, so it has stopped writing.
                take.error = take.error or "the peer has forgotten this transfer"
                take.owner_is_over = True
                return True
            take.rank.introduced = False
            self._try_asking(take)
            return True
        take.rank.introduced = True
        if told.over:
            take.owner_is_over = True
            if take.num_done < len(take.chunks):
                take.error = take.error or f"the peer: {told.error[:200]}"
            return True
        known = (take.told, take.reading, take.scattering, take.arrived)
        if told.chunk >= len(take.chunks) or any(told.chunk in place for place in known):
            return True
        if take.way == PULL_STAGED:
            assert take.rank.pair is not None
            if told.slot >= take.rank.pair.source.num_slots:
                return False
        elif take.way == PUSH_STAGED and take.granted.get(told.chunk) != told.slot:
            return False
        take.told[told.chunk] = told.slot
        return True

    def turn(self) -> None:
        """Go on with every take as far as can be now."""
        for take in list(self._takes.values()):
            before = take.num_done
            self._advance(take)
            if take.error is not None:
                self._wind_up(take)
            elif take.num_done == len(take.chunks):
                self._give_back(take)
                take.over = True
                self._try_asking(take)
            elif take.num_done > before or self._clock() - take.asked > _ASK_AGAIN:
                self._try_asking(take)
            if take.over:
                del self._takes[take.number]

    def _wind_up(self, take: Take) -> None:
        take.told.clear()
        if take.reading or take.scattering:
            return
        if take.way == PULL_STAGED or take.owner_is_over:
            self._give_back(take)
            take.over = True
        elif self._clock() - take.asked > _ASK_AGAIN:
            self._try_asking(take)

    def _give_back(self, take: Take) -> None:
        for slot in take.granted.values():
            assert self._ring is not None
            self._ring.give(slot)
        take.granted.clear()

    def _advance(self, take: Take) -> None:
        self._finish_reads(take)
        for chunk, (slot, done) in list(take.scattering.items()):
            if done.poll():
                del take.scattering[chunk]
                self._has_arrived(take, chunk, slot)
        if take.error is None:
            try:
                self._take_told(take)
            except PortError as error:
                take.error = str(error)
                take.owner_is_over |= isinstance(error, PeerLostError)

    def _finish_reads(self, take: Take) -> None:
        for chunk, (slot, transfer) in list(take.reading.items()):
            try:
                if not self._port.poll(transfer):
                    continue
            except PortError as error:
                take.error = take.error or str(error)
            del take.reading[chunk]
            if take.error is None:
                self._scatter(take, chunk, slot)
            else:
                assert self._ring is not None
                self._ring.give(slot)

    def _scatter(self, take: Take, chunk: int, slot: int) -> None:
        assert self._ring is not None
        own = take.chunks[chunk]
        done = self._ring.scatter(take.rank.movers[own.table], own, take.units[own.table], slot)
        if done.poll():
            self._has_arrived(take, chunk, slot)
        else:
            take.scattering[chunk] = slot, done

    def _has_arrived(self, take: Take, chunk: int, slot: int) -> None:
        self.progress += 1
        take.arrived.add(chunk)
        take.num_descriptors += 1
        while take.num_done in take.arrived:
            take.num_done += 1
        assert self._ring is not None
        if take.way == PULL_STAGED:
            self._ring.give(slot)
            return
        del take.granted[chunk]
        self._ring.give(slot)
        self._grant(take)

    def _grant(self, take: Take) -> None:
        """Give the owner slots for the next chunks."""
        assert self._ring is not None
        most = max(2, self._ring.shape.num_slots // 2)
        for chunk in range(take.num_done, len(take.chunks)):
            if len(take.granted) >= most:
                return
            if chunk in take.granted or chunk in take.arrived:
                continue
            slot = self._ring.take()
            if slot is None:
                return
            take.granted[chunk] = slot

    def _take_told(self, take: Take) -> None:
        if take.way == PUSH:
            if take.told.pop(0, None) is not None:
                take.num_done = 1
                plan = take.rank.plan
                assert plan is not None
                take.num_descriptors = plan.num_descriptors(take.units)
            return
        if take.way == PUSH_STAGED:
            self._grant(take)
            for chunk in sorted(take.told):
                before = len(take.arrived)
                self._scatter(take, chunk, take.told.pop(chunk))
                if len(take.arrived) > before:
                    return
            return
        pair = take.rank.pair
        assert pair is not None
        assert self._ring is not None
        for chunk in sorted(take.told):
            slot = self._ring.take()
            if slot is None:
                return
            size = take.chunks[chunk].num_bytes
            try:
                transfer = self._port.read(
                    take.rank.local_ring,
                    pair.granules("target", slot, size),
                    take.rank.remote_ring,
                    pair.granules("source", take.told.pop(chunk), size),
                )
            except PortError:
                self._ring.give(slot)
                raise
            take.reading[chunk] = slot, transfer
            before = len(take.arrived)
            self._finish_reads(take)
            if len(take.arrived) > before:
                # This thread did it: say so, so that the owner goes on beside the next one.
                return


def _lists(units: UnitBlocks, writes: bool) -> UnitLists:
    def packed(numbers: np.ndarray) -> bytes:
        return numbers.astype(np.int32).tobytes()

    lists = UnitLists(packed(units.source_blocks), packed(units.source_parts))
    if writes:
        lists.target_blocks = packed(units.target_blocks)
        lists.target_parts = packed(units.target_parts)
    return lists
