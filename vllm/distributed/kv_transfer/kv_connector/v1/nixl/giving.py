"""The owner's side of staging and pushing: gathers leased blocks, and writes them where asked.

Owns consumers that have introduced themselves and their jobs. A job only ever touches blocks of a
lease that is alive; a slot of the ring is used again once the consumer has said that its chunk has
arrived, or once the lease's generation has gone on, which the consumer looks at last. Runs in the
transfer thread; every call returns at once.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.letters import (
    PULL_STAGED,
    PUSH,
    STRANGER,
    Ask,
    Told,
    encode,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import AgentMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.peers import (
    LocalSide,
    plan_between,
    read_ring,
)
from vllm.distributed.kv_transfer.plan import TransferPlan, UnitBlocks
from vllm.distributed.kv_transfer.staging import (
    Chunk,
    Done,
    RingPair,
    StagingRing,
    TableMovers,
    chunks_of,
)
from vllm.distributed.kv_transfer.transport.port import PeerLostError, PortError, TransferPort
from vllm.errors import KVTransferError

__all__ = ["Giver", "LeaseView"]

_MOST_CONSUMERS = 1024
_MOST_JOBS = 4096
_MOST_EARLY_ASKS = 1024
"""Of one request: a rank of a consumer asks once for each of its answers."""
_MOST_REMEMBERED = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseView:
    """What a job may touch."""

    generation: int
    block_ids: tuple[frozenset[int], ...]


@dataclass(slots=True)
class _Consumer:
    agent: str
    plan: TransferPlan
    base: int
    """Address of its cache."""
    movers: list[TableMovers]
    pair: RingPair | None
    lists: dict[str, Any] = field(default_factory=dict)
    """Prepared lists, made when they are first written through."""


@dataclass(slots=True)
class _Job:
    consumer: _Consumer
    number: int
    request_id: str
    way: int
    units: list[UnitBlocks]
    chunks: list[Chunk]
    next: int = 0
    num_done: int = 0
    slots: dict[int, int] = field(default_factory=dict)
    grants: dict[int, int] = field(default_factory=dict)
    gathering: dict[int, Done] = field(default_factory=dict)
    writing: dict[int, Any] = field(default_factory=dict)
    announced: dict[int, int] = field(default_factory=dict)
    """Chunk -> slot, as the consumer was told."""
    error: str | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.consumer.agent, self.number

    @property
    def is_quiet(self) -> bool:
        return not self.gathering and not self.writing


class Giver:
    """
    Args:
        ring: None where nothing is staged.
        lease_of: a request's lease; None where it has none yet. Raises KeyError once it has ended.
    """

    def __init__(
        self,
        port: TransferPort,
        local: LocalSide,
        ring: StagingRing | None,
        lease_of: Callable[[str], LeaseView | None],
    ) -> None:
        self._port = port
        self._local = local
        self._ring = ring
        self._lease_of = lease_of
        self._consumers: OrderedDict[str, _Consumer] = OrderedDict()
        self._jobs: dict[tuple[str, int], _Job] = {}
        self._ended: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._early: OrderedDict[str, list[tuple[str, Ask]]] = OrderedDict()
        self.progress = 0
        """Counts what has been done: while it moves, the next turn should come at once."""

    @property
    def is_busy(self) -> bool:
        return bool(self._jobs)

    # Consumers

    def introduce(self, sender: str, metadata: AgentMetadata) -> None:
        """Know a consumer by what it says of itself.

        Raises:
            KVTransferError: its cache cannot take what this one has.
            PortError: it cannot be reached.
        """
        if sender in self._consumers:
            return
        plan, descriptor = plan_between(self._local, metadata, receiving=False)
        name = self._port.connect(metadata.agent)
        if name != sender:
            raise KVTransferError(f"{sender} has introduced itself as {name}")
        pair = None
        if self._ring is not None and metadata.ring is not None:
            pair = RingPair(source=self._ring.shape, target=read_ring(metadata.ring))
        device = torch.device(self._local.device)
        movers = [TableMovers(table, device) for table in plan.tables]
        self._consumers[sender] = _Consumer(sender, plan, descriptor.base, movers, pair)
        while len(self._consumers) > _MOST_CONSUMERS:
            self._forget(next(iter(self._consumers)))

    def _forget(self, agent: str) -> None:
        consumer = self._consumers.pop(agent, None)
        if consumer is not None:
            for job in [job for job in self._jobs.values() if job.consumer is consumer]:
                job.error = job.error or "the consumer is gone"
            for prepared in consumer.lists.values():
                self._port.forget(prepared)
            consumer.lists.clear()

    def _tell(self, agent: str, told: Told) -> None:
        try:
            self._port.notify(agent, encode(told))
        except PortError:
            self._forget(agent)

    # Jobs

    def ask(self, sender: str, ask: Ask) -> bool:
        """Begin a job, or take in how far the consumer has come; False where it makes no sense."""
        key = sender, ask.job
        job = self._jobs.get(key)
        if job is None and key in self._ended:
            self._tell(sender, Told(ask.job, 0, 0, over=True, error=self._ended[key]))
            return True
        if job is None:
            return self._begin(sender, ask)
        before = job.num_done, len(job.grants)
        job.num_done = max(job.num_done, min(ask.num_done, len(job.chunks)))
        self._take_grants(job, ask)
        if ask.cancelled:
            job.error = job.error or "cancelled"
        elif before == (job.num_done, len(job.grants)):
            for chunk, slot in job.announced.items():
                if chunk >= job.num_done:
                    self._tell(sender, Told(job.number, chunk, slot))
        return True

    def _begin(self, sender: str, ask: Ask) -> bool:
        consumer = self._consumers.get(sender)
        if consumer is None:
            with contextlib.suppress(PortError):
                self._port.notify(sender, encode(Told(ask.job, 0, 0, over=True, error=STRANGER)))
            return True
        if ask.cancelled:
            early = self._early.get(ask.request_id, [])
            early[:] = [pair for pair in early if (pair[0], pair[1].job) != (sender, ask.job)]
            self._refuse(sender, ask, "cancelled")
            return True
        try:
            lease = self._lease_of(ask.request_id)
        except KeyError:
            self._refuse(sender, ask, "the blocks were given back before they were asked for")
            return True
        if lease is None:
            # The step that tells us of the lease may be on its way.
            waiting = self._early.setdefault(ask.request_id, [])
            waiting[:] = [pair for pair in waiting if (pair[0], pair[1].job) != (sender, ask.job)]
            if len(waiting) >= _MOST_EARLY_ASKS:
                self._refuse(sender, ask, "too many wait for this request")
                return False
            waiting.append((sender, ask))
            while len(self._early) > _MOST_REMEMBERED:
                self._early.popitem(last=False)
            return True
        if len(self._jobs) >= _MOST_JOBS:
            self._refuse(sender, ask, f"{_MOST_JOBS} transfers are under way")
            return False
        try:
            if lease.generation != ask.generation:
                raise KVTransferError("the lease is of another generation")
            job = self._make_job(consumer, ask, lease)
        except (KVTransferError, ValueError) as error:
            self._refuse(sender, ask, str(error))
            return False
        self._jobs[job.key] = job
        return True

    def _refuse(self, sender: str, ask: Ask, error: str) -> None:
        self._end((sender, ask.job), error)
        self._tell(sender, Told(ask.job, 0, 0, over=True, error=error))

    def _end(self, key: tuple[str, int], error: str) -> None:
        self._ended[key] = error
        while len(self._ended) > _MOST_REMEMBERED:
            self._ended.popitem(last=False)

    def _make_job(self, consumer: _Consumer, ask: Ask, lease: LeaseView) -> _Job:
        plan = consumer.plan
        if len(ask.units) != len(plan.tables):
            raise KVTransferError(f"{len(ask.units)} lists of units for {len(plan.tables)} tables")
        units = []
        for table, lists in zip(plan.tables, ask.units, strict=True):
            source = lists.read("source_blocks"), lists.read("source_parts")
            writes = ask.way == PUSH
            target = (lists.read("target_blocks"), lists.read("target_parts")) if writes else source
            if len({len(numbers) for numbers in (*source, *target)}) != 1:
                raise KVTransferError("lists of units of different lengths")
            if not set(source[0].tolist()) <= lease.block_ids[table.source_group]:
                raise KVTransferError("blocks that the request does not have")
            _check_range(source[1], 0, table.source.parts_per_block)
            if writes:
                _check_range(target[0], 1, plan.target_blocks)
                _check_range(target[1], 0, table.target.parts_per_block)
            units.append(table.place(*source, *target))
        chunks = [Chunk(table=0, first=0, count=0, num_bytes=0)]
        if ask.way == PUSH:
            if plan.converts:
                raise KVTransferError("numbers that are converted pass through the staging ring")
        else:
            if consumer.pair is None:
                raise KVTransferError("there is no staging ring")
            cut = chunks_of(plan, [len(own) for own in units], consumer.pair.slot_bytes)
            if cut is None:
                raise KVTransferError("a unit is larger than a slot of the staging ring")
            chunks = cut
        job = _Job(consumer, ask.job, ask.request_id, ask.way, units, chunks)
        self._take_grants(job, ask)
        return job

    def _take_grants(self, job: _Job, ask: Ask) -> None:
        pair = job.consumer.pair
        if pair is not None:
            job.grants.update(
                (chunk, slot)
                for chunk, slot in ask.grants
                if chunk < len(job.chunks) and slot < pair.target.num_slots
            )

    def lease_is_there(self, request_id: str) -> None:
        """Take up what was asked for too early."""
        for sender, ask in self._early.pop(request_id, ()):
            self._begin(sender, ask)

    def lease_has_ended(self, request_id: str) -> None:
        """Nothing more is gathered for this request."""
        for sender, ask in self._early.pop(request_id, ()):
            self._refuse(sender, ask, "the blocks were given back before they were asked for")
        for job in self._jobs.values():
            if job.request_id == request_id and job.num_done < len(job.chunks):
                job.error = job.error or "the blocks were given back"

    def turn(self) -> None:
        """Go on with every job as far as can be now."""
        for job in list(self._jobs.values()):
            try:
                self._advance(job)
            except PeerLostError as error:
                job.error = str(error)
                self._forget(job.consumer.agent)
            except PortError as error:
                job.error = job.error or str(error)
            self._settle(job)

    def _settle(self, job: _Job) -> None:
        """Give slots back that nobody needs, and end what is complete or has failed."""
        for chunk in list(job.slots):
            free = chunk < job.num_done or job.error is not None
            if free and chunk not in job.gathering and chunk not in job.writing:
                assert self._ring is not None
                self._ring.give(job.slots.pop(chunk))
        if not job.is_quiet:
            return
        if job.error is not None:
            del self._jobs[job.key]
            self._end(job.key, job.error)
            self._tell(job.consumer.agent, Told(job.number, 0, 0, over=True, error=job.error))
        elif job.num_done == len(job.chunks):
            del self._jobs[job.key]
            self._end(job.key, "complete")

    def _advance(self, job: _Job) -> None:
        for chunk, done in list(job.gathering.items()):
            if not done.poll():
                continue
            del job.gathering[chunk]
            if job.error is None:
                self._is_gathered(job, chunk)
        for chunk, transfer in list(job.writing.items()):
            try:
                over = self._port.poll(transfer)
            except PortError:
                del job.writing[chunk]
                raise
            if over:
                del job.writing[chunk]
                self._announce(job, chunk, job.grants.get(chunk, 0))
                if chunk in job.slots:
                    # It lies in the consumer's ring now.
                    assert self._ring is not None
                    self._ring.give(job.slots.pop(chunk))
        if job.error is None:
            self._start(job)

    def _is_gathered(self, job: _Job, chunk: int) -> None:
        if job.way == PULL_STAGED:
            self._announce(job, chunk, job.slots[chunk])
        else:
            self._write_slot(job, chunk)

    def _announce(self, job: _Job, chunk: int, slot: int) -> None:
        job.announced[chunk] = slot
        self._tell(job.consumer.agent, Told(job.number, chunk, slot))

    def _start(self, job: _Job) -> None:
        if job.way == PUSH:
            if job.next == 0:
                job.next = 1
                job.writing[0] = self._write_blocks(job)
            return
        ring = self._ring
        assert ring is not None
        # Messages take longer than a chunk's bytes: the more are under way, the better. Half of
        # the ring is left to others, if there are any.
        most = ring.shape.num_slots if len(self._jobs) == 1 else max(2, ring.shape.num_slots // 2)
        while job.next < len(job.chunks) and len(job.slots) < most:
            if job.way != PULL_STAGED and job.next not in job.grants:
                return
            slot = ring.take()
            if slot is None:
                return
            chunk = job.chunks[job.next]
            job.slots[job.next] = slot
            movers = job.consumer.movers[chunk.table]
            done = ring.gather(movers, chunk, job.units[chunk.table], slot)
            self.progress += 1
            job.next += 1
            if done.poll():
                # This thread did it: say so before the next one, and hear what has come.
                self._is_gathered(job, job.next - 1)
                return
            job.gathering[job.next - 1] = done

    # Writes

    def _list(self, consumer: _Consumer, name: str) -> Any:
        if name not in consumer.lists:
            plan, pair = consumer.plan, consumer.pair
            if name in ("ring", "peer ring"):
                assert pair is not None
                own = name == "ring"
                side = pair.source if own else pair.target
                consumer.lists[name] = self._port.prepare(
                    None if own else consumer.agent,
                    pair.rows("source" if own else "target"),
                    on_host=side.on_host,
                )
            else:
                own = name == "blocks"
                rows = plan.rows("source" if own else "target")
                rows[:, 0] += self._local.descriptor.base if own else consumer.base
                consumer.lists[name] = self._port.prepare(None if own else consumer.agent, rows)
        return consumer.lists[name]

    def _write_slot(self, job: _Job, chunk: int) -> None:
        pair = job.consumer.pair
        assert pair is not None
        size = job.chunks[chunk].num_bytes
        job.writing[chunk] = self._port.write(
            self._list(job.consumer, "ring"),
            pair.granules("source", job.slots[chunk], size),
            self._list(job.consumer, "peer ring"),
            pair.granules("target", job.grants[chunk], size),
        )

    def _write_blocks(self, job: _Job) -> Any:
        plan: TransferPlan = job.consumer.plan
        units: Sequence[UnitBlocks] = job.units
        return self._port.write(
            self._list(job.consumer, "blocks"),
            plan.indices(units, "source"),
            self._list(job.consumer, "peer blocks"),
            plan.indices(units, "target"),
        )


def _check_range(numbers: np.ndarray, low: int, high: int) -> None:
    if len(numbers) and not (numbers.min() >= low and numbers.max() < high):
        raise KVTransferError(f"numbers that are not {low} to {high - 1}")
