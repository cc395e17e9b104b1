"""The worker half of NIXL connectors: one thread that owns the port, fetches, and keeps leases.

A load is: handshake if need be, one copy a source rank, then a look at the lease's generation
number in the owner's memory. Only if that is still the one that was promised were the bytes the
right ones. What cannot be waited for is given up early, but its blocks stay until the transport
says that nothing more will be written. Knows the transport as ``TransferPort`` only.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm.distributed.kv_transfer.costs import HOST_COPIES, NVLINK, Experience, route
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.giving import Giver, LeaseView
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.letters import (
    PULL_STAGED,
    PUSH,
    PUSH_STAGED,
    Ask,
    Told,
    decode,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import (
    NixlSettings,
    NixlStepMetadata,
    Receive,
    RemoteParams,
    decode_payload,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.peers import (
    AskHandshake,
    LocalSide,
    Peer,
    PeerBook,
    PeerRank,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.readers import Readers
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.taking import Take, Taker
from vllm.distributed.kv_transfer.kv_connector.v1.topology import TransferTopology
from vllm.distributed.kv_transfer.plan import TransferPlan, UnitBlocks
from vllm.distributed.kv_transfer.staging import Done, StagingRing
from vllm.distributed.kv_transfer.transport.port import PeerLostError, PortError, TransferPort
from vllm.errors import KVTransferError
from vllm.logger import init_logger

__all__ = ["TransferWorker"]

logger = init_logger(__name__)

_ACTIVE_WAIT = 0.0002
_STAGING_WAIT = 0.00002
_LEASE_WAIT = 0.0003
"""Somebody may read at any time, and the transport answers small reads only when it is turned."""
_IDLE_WAIT = 0.005
_HEARTBEATS_A_LEASE = 6
_PROLONGS_BY = 2 / 3
_LONGEST_MESSAGE = 1 << 20
_MOST_EARLY = 4096
_HELLO = b"HELLO:"


@dataclass(slots=True)
class _Lease:
    slot: int
    deadline: float
    block_ids: tuple[frozenset[int], ...]
    done: set[str] = field(default_factory=set)
    """Agents that have said so."""


@dataclass(slots=True)
class _Load:
    receive: Receive
    deadline: float
    started: float
    copies: list[tuple[int, Any]] = field(default_factory=list)
    """(rank, transfer) still under way."""
    takes: list[Take] = field(default_factory=list)
    """What is staged or pushed, still under way."""
    chosen: list[tuple[PeerRank, str, int, int]] = field(default_factory=list)
    """(rank, way, descriptors, bytes) of what was started."""
    checks: list[tuple[int, int, Any]] = field(default_factory=list)
    """(rank, scratch slot, transfer) of reads of the generation number."""
    checking: bool = False
    error: str | None = None
    given_up: bool = False
    retried: bool = False
    num_bytes: int = 0
    num_descriptors: int = 0

    @property
    def params(self) -> RemoteParams:
        return self.receive.params

    @property
    def engine_id(self) -> str:
        assert self.params.remote_engine_id is not None
        return self.params.remote_engine_id


def _no_results() -> KVConnectorTransferResults:
    return KVConnectorTransferResults(set(), set(), set(), set())


class TransferWorker:
    """Runs until ``close``. ``submit`` and ``take_results`` are for the thread of the steps.

    Args:
        lease_table: int64 ``(max_leases,)`` that peers may read, and ``scratch`` int64 for
            reading those of others; both registered with the port.
        hello: this worker's encoded handshake, for owners that stage or push.
        ring: where blocks are gathered and scattered; None: they go by descriptors only.
        backing: 1-D int8, the cache.
        pushes: the owner writes, after this worker has announced its blocks.
        threaded: False leaves it to the caller to call ``turn``.
    """

    def __init__(
        self,
        port: TransferPort,
        local: LocalSide,
        settings: NixlSettings,
        ask: AskHandshake,
        lease_table: np.ndarray,
        scratch: np.ndarray,
        *,
        hello: bytes = b"",
        ring: StagingRing | None = None,
        backing: torch.Tensor | None = None,
        pushes: bool = False,
        threaded: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._port = port
        self._local = local
        self._settings = settings
        self._clock = clock
        self._book = PeerBook(port, local, settings, ask, lambda: self._clock())
        self._lease_table = lease_table
        self._scratch = scratch
        self._free_scratch = list(range(len(scratch)))
        rows = np.array([[scratch.ctypes.data, 8, 8, len(scratch)]], dtype=np.int64)
        self._scratch_list = port.prepare(None, rows, on_host=True)
        self._inbox: queue.SimpleQueue[NixlStepMetadata | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._results = _no_results()
        self._stats: dict[str, float] = {}
        self._leases: dict[str, _Lease] = {}
        self._early: OrderedDict[str, dict[str, int]] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._waiting: dict[str, list[_Load]] = {}
        self._loads: dict[str, _Load] = {}
        self._held: list[tuple[Any, _Load]] = []
        """Loads whose blocks the device may still write."""
        self._releases: list[tuple[float, RemoteParams]] = []
        self._readers = Readers()
        self._expected: dict[str, RemoteParams] = {}
        self._backing = backing
        self._pushes = pushes
        self._ring = ring
        self._giver = Giver(port, local, ring, self._lease_view)
        self._taker = Taker(port, ring, hello, lambda: self._clock())
        self._costs = NVLINK if torch.device(local.device).type == "cuda" else HOST_COPIES
        self.ways_taken: dict[str, int] = {}
        """How often each way was chosen; for logs and tests."""
        self._broken: Exception | None = None
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._run, name="kv-transfer", daemon=True)
            self._thread.start()

    # For the thread of the steps

    def submit(self, metadata: NixlStepMetadata) -> None:
        """What the scheduler half says of this step."""
        self._inbox.put(metadata)

    def take_results(self) -> KVConnectorTransferResults:
        """What has ended since the last call.

        Raises:
            KVTransferError: the transfer thread has ended by an error of ours.
        """
        if self._broken is not None:
            raise KVTransferError("the KV transfer thread has ended") from self._broken
        with self._lock:
            results, self._results = (
                self._results,
                KVConnectorTransferResults(set(), set(), set(), set()),
            )
        return results

    def set_scales(self, scales: dict[str, tuple[float, float]]) -> None:
        """Of layers with one scale a side: (K, V); before the first load."""
        self._book.scales = scales

    def take_stats(self) -> dict[str, float] | None:
        with self._lock:
            stats, self._stats = self._stats, {}
        return stats or None

    def close(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join(timeout=5)
        self._book.close()
        self._port.close()

    # The thread

    def _run(self) -> None:
        try:
            device = torch.device(self._local.device)
            if device.type == "cuda":
                torch.cuda.set_device(device)
                with torch.cuda.stream(torch.cuda.Stream()):
                    self._loop()
            else:
                self._loop()
        except Exception as error:
            # Raised again in the thread of the steps, which cannot show where it came from.
            logger.exception("the KV transfer thread has ended")
            self._broken = error

    def _loop(self) -> None:
        progress = 0
        while True:
            busy = bool(self._loads or self._waiting or self._releases or self._held)
            wait = _ACTIVE_WAIT if busy else _LEASE_WAIT if self._leases else _IDLE_WAIT
            if self._giver.is_busy or self._taker.is_busy:
                now = self._giver.progress + self._taker.progress
                wait = _STAGING_WAIT if now == progress else 0.0
                progress = now
            try:
                # An idle agent is turned too: what peers read of us goes on only then.
                metadata = self._inbox.get(wait > 0, wait or None)
            except queue.Empty:
                self.turn()
                continue
            if metadata is None:
                return
            self._take(metadata)
            self.turn()

    def turn(self) -> None:
        """Do what can be done now, without waiting."""
        with contextlib.suppress(queue.Empty):
            while True:
                metadata = self._inbox.get_nowait()
                if metadata is None:
                    self._inbox.put(None)
                    break
                self._take(metadata)
        held, self._held = self._held, []
        for after, load in held:
            if after.query():
                self._begin(load)
            else:
                self._held.append((after, load))
        self._settle_handshakes()
        self._hear()
        self._giver.turn()
        self._taker.turn()
        for load in list(self._loads.values()):
            self._advance(load)
        self._give_up_late()
        self._send_releases()
        self._beat()
        self._expire()
        self._book.sweep({load.engine_id for load in self._loads.values()})

    def _count(self, **values: float) -> None:
        with self._lock:
            for name, value in values.items():
                self._stats[name] = self._stats.get(name, 0) + value

    def _take(self, metadata: NixlStepMetadata) -> None:
        now = self._clock()
        lasts = (
            self._settings.push_registration_timeout
            if self._pushes
            else self._settings.kv_lease_duration
        )
        for request_id, start in metadata.leases.items():
            rows = tuple(frozenset(row) - {0} for row in start.block_ids)
            self._leases[request_id] = _Lease(start.slot, now + lasts, rows)
            self._giver.lease_is_there(request_id)
            for sender, size in self._early.pop(request_id, {}).items():
                self._consumer_is_done(sender, request_id, size)
        for request_id in metadata.unexpected:
            self._expected.pop(request_id, None)
        for request_id, params in metadata.expected.items():
            if request_id not in metadata.unexpected:
                self._expected[request_id] = params
                if params.remote_engine_id not in self._book.peers:
                    self._book.ask_for(params)
        for params in metadata.releases:
            self._let_go(params)
        for receive in metadata.receives:
            load = _Load(receive, now + self._settings.transfer_timeout, now)
            if metadata.after is None or metadata.after.query():
                self._begin(load)
            else:
                self._held.append((metadata.after, load))

    # Loads

    def _begin(self, load: _Load) -> None:
        peer = self._book.peers.get(load.engine_id)
        if peer is None or peer.address != (load.params.remote_host, load.params.remote_port):
            self._waiting.setdefault(load.engine_id, []).append(load)
            self._book.ask_for(load.params)
            return
        self._loads[load.receive.request_id] = load
        try:
            if peer.session != load.params.remote_session:
                raise PeerLostError("the engine has restarted since it computed this prompt")
            if not peer.believes(load.params):
                raise KVTransferError(
                    "its kv_transfer_params are not what the prefill engine has answered, or "
                    "belong to another prompt"
                )
            self._post(load, peer)
        except PeerLostError as error:
            self._lost(load.engine_id)
            if load.retried or load.copies or load.takes:
                load.error = str(error)
                return
            # It may have come back under the same name: shake hands once more.
            del self._loads[load.receive.request_id]
            load.retried = True
            self._begin(load)
        except (PortError, KVTransferError) as error:
            load.error = str(error)

    def _post(self, load: _Load, peer: Peer) -> None:
        peer.last_used = self._clock()
        params, receive = load.params, load.receive
        assert params.remote_block_ids is not None
        if len(params.remote_block_ids) != len(receive.block_ids):
            raise KVTransferError(
                f"the peer names blocks of {len(params.remote_block_ids)} cache groups, this "
                f"engine has {len(receive.block_ids)}"
            )
        if params.tp_size != peer.tp_size:
            raise KVTransferError(f"the peer has {peer.tp_size} ranks, not {params.tp_size}")
        for number, rank in peer.ranks.items():
            if params.remote_lease_slot >= rank.num_leases:
                raise KVTransferError(f"the peer has no lease {params.remote_lease_slot}")
            plan = rank.plan
            if plan is None or not plan.tables:
                continue
            units = plan.units(
                params.remote_block_ids, receive.block_ids, receive.num_tokens, receive.first_token
            )
            if not any(len(own) for own in units):
                continue
            load.num_bytes += plan.num_bytes(units)
            self._post_rank(load, number, rank, plan, units)

    def _post_rank(
        self, load: _Load, number: int, rank: PeerRank, plan: TransferPlan, units: list[UnitBlocks]
    ) -> None:
        """Start what one rank has, by the way that costs least."""
        descriptors = plan.num_descriptors(units)
        way = self._way(rank, plan, descriptors, plan.num_bytes(units))
        load.chosen.append((rank, way, descriptors, plan.num_bytes(units)))
        self.ways_taken[way] = self.ways_taken.get(way, 0) + 1
        self._count(**{f"transfers_by_{way}": 1})
        if way == "staging" or self._pushes:
            if way == "staging":
                code = PUSH_STAGED if self._pushes else PULL_STAGED
            else:
                code = PUSH
            load.takes.append(self._taker.start(rank, load.params, code, units))
            return
        load.num_descriptors += descriptors
        if way == "mapped":
            load.copies.append((number, self._copy_mapped(rank, plan, units)))
            return
        into, out_of = plan.indices(units, "target"), plan.indices(units, "source")
        load.copies.append((number, self._port.read(rank.local, into, rank.remote, out_of)))

    def _way(self, rank: PeerRank, plan: TransferPlan, num_descriptors: int, num_bytes: int) -> str:
        """
        Raises:
            KVTransferError: the configuration asks for a way that is not there.
        """
        if rank.local is None:
            return "staging"
        mapped = rank.mapped is not None and not self._pushes
        asked = self._settings.transfer_path
        if asked == "mapped" and not mapped:
            raise KVTransferError(
                "transfer_path mapped: the peer's memory is not mapped here (GPUs of one host "
                'with peer access, and a decoder that reads); use "auto"'
            )
        if asked == "staging" and rank.pair is None:
            raise KVTransferError("transfer_path staging: the peer has no staging ring")
        if asked != "auto":
            return asked
        pair = rank.pair
        fits = pair is not None and all(
            table.bytes_per_unit <= pair.slot_bytes for table in plan.tables
        )
        return route(
            self._costs,
            num_descriptors,
            num_bytes,
            pair.slot_bytes if pair is not None and fits else None,
            mapped=mapped,
            seen=rank.seen,
        ).way

    def _copy_mapped(self, rank: PeerRank, plan: TransferPlan, units: list[UnitBlocks]) -> Done:
        """A kernel here reads the peer's blocks."""
        assert self._backing is not None
        assert rank.mapped is not None
        base = self._backing.data_ptr()
        for movers, table, own in zip(rank.movers, plan.tables, units, strict=True):
            movers.copy.move(
                rank.mapped,
                base,
                table.starts("source", own.source_blocks, own.source_parts),
                table.starts("target", own.target_blocks, own.target_parts),
            )
        return Done(self._backing.device)

    def _advance(self, load: _Load) -> None:
        """Poll what is under way; go on to the check, and then to the end."""
        load.copies = [(rank, copy) for rank, copy in load.copies if not self._is_over(load, copy)]
        load.checks = [
            (rank, slot, check)
            for rank, slot, check in load.checks
            if not self._check_is_over(load, slot, check)
        ]
        if load.error is not None or load.given_up:
            for take in load.takes:
                self._taker.abandon(take, load.error or "given up")
        for take in [take for take in load.takes if take.over]:
            load.takes.remove(take)
            load.error = load.error or take.error
            load.num_descriptors += take.num_descriptors
        if load.copies or load.checks or load.takes:
            return
        if load.error is None and not load.given_up and not load.checking:
            self._start_checks(load)
            if load.checks:
                self._advance(load)
                return
        self._end(load)

    def _is_over(self, load: _Load, transfer: Any) -> bool:
        """Whether a transfer can write no more; notes its failure."""
        if isinstance(transfer, Done):
            return transfer.poll()
        try:
            return self._port.poll(transfer)
        except PeerLostError as error:
            load.error = load.error or str(error)
            self._lost(load.engine_id)
        except PortError as error:
            load.error = load.error or str(error)
        return True

    def _start_checks(self, load: _Load) -> None:
        load.checking = True
        peer = self._book.peers.get(load.engine_id)
        if peer is None:
            load.error = "the peer was lost before its blocks could be confirmed"
            return
        lease = np.array([load.params.remote_lease_slot])
        for number, rank in peer.ranks.items():
            if rank.plan is None or not rank.plan.tables:
                continue
            if not self._free_scratch:
                load.error = "too many loads at a time"
                return
            slot = self._free_scratch.pop()
            self._scratch[slot] = -1
            try:
                check = self._port.read(
                    self._scratch_list, np.array([slot]), rank.lease_table, lease
                )
            except PortError as error:
                load.error = str(error)
                self._free_scratch.append(slot)
                return
            load.checks.append((number, slot, check))

    def _check_is_over(self, load: _Load, slot: int, check: Any) -> bool:
        if not self._is_over(load, check):
            return False
        found, wanted = int(self._scratch[slot]), load.params.remote_lease_generation
        self._free_scratch.append(slot)
        if load.error is None and found != wanted:
            self._count(late_reads=1)
            load.error = (
                f"the peer gave the blocks back before they were read (lease generation {found}, "
                f"promised {wanted})"
            )
        return True

    def _end(self, load: _Load) -> None:
        request_id = load.receive.request_id
        del self._loads[request_id]
        self._let_go(load.params)
        with self._lock:
            assert self._results.finished_recving is not None
            assert self._results.failed_recving is not None
            if load.error is None and not load.given_up:
                self._results.finished_recving.add(request_id)
            else:
                self._results.failed_recving.add(request_id)
        if load.error is None and not load.given_up:
            self._learn(load)
            self._count(
                transfers=1,
                transfer_bytes=load.num_bytes,
                transfer_descriptors=load.num_descriptors,
                transfer_seconds=self._clock() - load.started,
            )
        else:
            self._count(failed_transfers=1)
            logger.warning("Loading KV of request %s failed: %s", request_id, load.error)

    def _learn(self, load: _Load) -> None:
        """How long it took, where one way brought everything."""
        if len(load.chosen) != 1:
            return
        rank, way, descriptors, num_bytes = load.chosen[0]
        if num_bytes < Experience.LEAST_BYTES:
            return
        slot = rank.pair.slot_bytes if rank.pair is not None else None
        ways = route(
            self._costs, descriptors, num_bytes, slot, mapped=rank.mapped is not None
        ).seconds
        if way in ways:
            rank.seen.learn(way, ways[way], self._clock() - load.started)

    def _give_up_late(self) -> None:
        now = self._clock()
        for load in self._loads.values():
            if now > load.deadline and not load.given_up:
                load.given_up = True
                load.error = load.error or (
                    f"not complete after {self._settings.transfer_timeout:g} s (transfer_timeout)"
                )
                blocks = sum(len(row) for row in load.receive.block_ids)
                self._count(quarantined_blocks=blocks)
                with self._lock:
                    assert self._results.stuck_recving is not None
                    self._results.stuck_recving.add(load.receive.request_id)
        for engine_id, waiting in list(self._waiting.items()):
            late = [load for load in waiting if now > load.deadline]
            self._fail_waiting(engine_id, late, "no handshake in time")

    def _fail_waiting(self, engine_id: str, loads: list[_Load], error: str) -> None:
        """End loads that nothing has been posted for."""
        for load in loads:
            self._waiting[engine_id].remove(load)
            load.error = error
            self._loads[load.receive.request_id] = load
            self._end(load)
        if engine_id in self._waiting and not self._waiting[engine_id]:
            del self._waiting[engine_id]

    def _settle_handshakes(self) -> None:
        for engine_id, answer in self._book.settle().items():
            if isinstance(answer, Peer):
                self._count(handshakes=1)
                for load in self._waiting.pop(engine_id, []):
                    self._begin(load)
                continue
            self._count(failed_handshakes=1)
            logger.warning("Handshake with engine %s failed: %s", engine_id, answer)
            self._releases = [
                (deadline, params)
                for deadline, params in self._releases
                if params.remote_engine_id != engine_id
            ]
            self._fail_waiting(engine_id, list(self._waiting.get(engine_id, ())), str(answer))

    def _lost(self, engine_id: str) -> None:
        """A rank of a peer is gone. Others may still be read from, so nothing is freed yet."""
        self._book.retire(engine_id)

    # What we tell peers

    def _notify(self, params: RemoteParams, message: str) -> bool:
        """Tell all ranks; False where the peer is not known (yet)."""
        assert params.remote_engine_id is not None
        peer = self._book.peers.get(params.remote_engine_id)
        if peer is None:
            return False
        for rank in peer.ranks.values():
            try:
                self._port.notify(rank.agent, message.encode())
            except PortError as error:
                self._count(failed_notifications=1)
                logger.debug("Notification to %s failed: %s", rank.agent, error)
                if isinstance(error, PeerLostError):
                    self._lost(params.remote_engine_id)
                    break
        return True

    def _let_go(self, params: RemoteParams) -> None:
        """A request here needs the owner's blocks no more."""
        if self._readers.is_last(params):
            self._releases.append((self._clock() + self._settings.handshake_timeout, params))

    def _send_releases(self) -> None:
        """Done messages; one that cannot be sent in time is left to the peer's lease."""
        now, left = self._clock(), []
        for deadline, params in self._releases:
            peer = self._book.peers.get(str(params.remote_engine_id))
            if peer is not None and not peer.believes(params):
                # Whoever has made them up must not end the leases of others.
                continue
            if self._notify(params, f"{params.remote_request_id}:{self._local.shard.tp_size}"):
                continue
            if now < deadline:
                if params.remote_engine_id is not None:
                    self._book.ask_for(params)
                left.append((deadline, params))
        self._releases = left

    def _beat(self) -> None:
        """Prolong the leases of what we have not fetched yet."""
        now = self._clock()
        by_engine: dict[str, list[RemoteParams]] = {}
        loads = [load for waiting in self._waiting.values() for load in waiting]
        wanted = [load.params for load in (*self._loads.values(), *loads) if not load.given_up]
        for params in (*self._expected.values(), *wanted):
            by_engine.setdefault(str(params.remote_engine_id), []).append(params)
        for engine_id, requests in by_engine.items():
            peer = self._book.peers.get(engine_id)
            if peer is None or now < peer.heartbeat_at:
                continue
            peer.heartbeat_at = now + peer.lease_seconds / _HEARTBEATS_A_LEASE
            known = [params for params in requests if peer.believes(params)]
            if known:
                names = ",".join(sorted({str(params.remote_request_id) for params in known}))
                self._notify(known[0], f"HB:{names}")

    # What peers tell us, and our leases

    def _hear(self) -> None:
        try:
            messages = self._port.take_notifications()
        except PortError as error:
            logger.warning("Notifications cannot be read: %s", error)
            return
        for sender, message in messages:
            if not self._understand(sender, message):
                self._count(refused_notifications=1)

    def _understand(self, sender: str, message: bytes) -> bool:
        """Act on a message; False where it is none of ours."""
        if len(message) > _LONGEST_MESSAGE:
            return False
        letter = decode(message)
        if isinstance(letter, Ask):
            return self._giver.ask(sender, letter)
        if isinstance(letter, Told):
            return self._taker.take_in(sender, letter)
        if message.startswith(_HELLO):
            return self._meet(sender, message[len(_HELLO) :])
        try:
            text = message.decode()
        except UnicodeDecodeError:
            return False
        if text.startswith("HB:"):
            extended = False
            for request_id in text[3:].split(","):
                lease = self._leases.get(request_id)
                if lease is not None:
                    extended = True
                    more = self._settings.kv_lease_duration * _PROLONGS_BY
                    lease.deadline = max(lease.deadline, self._clock() + more)
            return extended
        request_id, _, size = text.rpartition(":")
        if not request_id or not size.isascii() or not size.isdigit() or len(size) > 4:
            return False
        return self._consumer_is_done(sender, request_id, int(size))

    def _meet(self, sender: str, payload: bytes) -> bool:
        """A consumer says what it is; False where it is none."""
        settings = self._settings
        try:
            checked = settings.enforce_handshake_compat
            metadata = decode_payload(payload, self._local.factors if checked else None)
            self._giver.introduce(sender, metadata)
        except (KVTransferError, PortError) as error:
            logger.warning("The consumer %s is refused: %s", sender, error)
            return False
        return True

    def _lease_view(self, request_id: str) -> LeaseView | None:
        lease = self._leases.get(request_id)
        if lease is not None:
            generation = int(self._lease_table[lease.slot])
            return LeaseView(generation=generation, block_ids=lease.block_ids)
        if request_id in self._ended:
            raise KeyError(request_id)
        return None

    def _consumer_is_done(self, sender: str, request_id: str, tp_size: int) -> bool:
        shard = self._local.shard
        large, small = max(tp_size, shard.tp_size), min(tp_size, shard.tp_size)
        if small < 1 or large % small:
            return False
        if request_id in self._ended:
            return False
        lease = self._leases.get(request_id)
        if lease is None:
            # The step that tells us of the lease may be on its way.
            self._early.setdefault(request_id, {})[sender] = tp_size
            while len(self._early) > _MOST_EARLY:
                self._early.popitem(last=False)
            return True
        lease.done.add(sender)
        topology = TransferTopology(
            tp_rank=shard.rank,
            tp_size=shard.tp_size,
            remote_tp_size=tp_size,
            total_heads=tuple(sorted({h for h in self._local.total_heads.values() if h})),
        )
        if len(lease.done) >= len(topology.consumers()):
            self._release(request_id)
        return True

    def _release(self, request_id: str) -> None:
        """The blocks may go: first make late readers see it."""
        lease = self._leases.pop(request_id)
        self._lease_table[lease.slot] += 1
        self._giver.lease_has_ended(request_id)
        self._ended[request_id] = None
        while len(self._ended) > _MOST_EARLY:
            self._ended.popitem(last=False)
        with self._lock:
            assert self._results.finished_sending is not None
            self._results.finished_sending.add(request_id)

    def _expire(self) -> None:
        now = self._clock()
        for request_id, lease in list(self._leases.items()):
            if now > lease.deadline:
                self._count(expired_leases=1)
                logger.warning(
                    "Nobody fetched the KV of request %s within its lease; its blocks are freed",
                    request_id,
                )
                self._release(request_id)
