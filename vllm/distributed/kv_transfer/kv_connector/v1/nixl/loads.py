"""Loads: what a decode engine fetches, from the order to the confirmation.

A load is: handshake if need be, one copy a source rank, then a look at the lease's generation
number in the owner's memory. Only if that is still the one that was promised were the bytes the
right ones. What cannot be waited for is given up early, but its blocks stay until the transport
says that nothing more will be written. Runs in the transfer thread; every call returns at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm.distributed.kv_transfer.costs import HOST_COPIES, NVLINK, Experience, route
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.letters import (
    PULL_STAGED,
    PUSH,
    PUSH_STAGED,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import (
    NixlSettings,
    Receive,
    RemoteParams,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.notices import Notices
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.peers import Peer, PeerBook, PeerRank
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.taking import Take, Taker
from vllm.distributed.kv_transfer.kv_connector.v1.reports import Reports
from vllm.distributed.kv_transfer.plan import TransferPlan, UnitBlocks
from vllm.distributed.kv_transfer.staging import Done
from vllm.distributed.kv_transfer.transport.port import PeerLostError, PortError, TransferPort
from vllm.errors import KVTransferError
from vllm.logger import init_logger

__all__ = ["Loads"]

logger = init_logger(__name__)

_SHORTEST_WAIT = 0.00002
_LONGEST_WAIT = 0.0005
_WAITED_PART = 16
"""Of the time that something has taken: so much later it may be noticed."""
_BRISK_SECONDS = 0.01
"""GPUs copy a long prompt's blocks in less; the host has nothing to do for it."""
_ACTIVE_WAIT = 0.0002


@dataclass(slots=True)
class _Load:
    receive: Receive
    deadline: float
    started: float
    posted: float = 0.0
    """When its copies were under way, and ``copied``: when they were complete."""
    copied: float = 0.0
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


class Loads:
    """
    Args:
        scratch: int64, registered with the port, for reading generations of leases.
        device: of the cache.
        pushes: the owner writes, after this worker has announced its blocks.
    """

    def __init__(
        self,
        port: TransferPort,
        book: PeerBook,
        taker: Taker,
        notices: Notices,
        settings: NixlSettings,
        scratch: np.ndarray,
        reports: Reports,
        clock: Callable[[], float],
        *,
        device: str,
        pushes: bool,
    ) -> None:
        self._port = port
        self._book = book
        self._taker = taker
        self._notices = notices
        self._settings = settings
        self._reports = reports
        self._clock = clock
        self._pushes = pushes
        self._scratch = scratch
        self._free_scratch = list(range(len(scratch)))
        rows = np.array([[scratch.ctypes.data, 8, 8, len(scratch)]], dtype=np.int64)
        self._scratch_list = port.prepare(None, rows, on_host=True)
        self._waiting: dict[str, list[_Load]] = {}
        self._loads: dict[str, _Load] = {}
        self._held: list[tuple[Any, _Load]] = []
        """Loads whose blocks the device may still write."""
        on_gpu = torch.device(device).type == "cuda"
        self._costs = NVLINK if on_gpu else HOST_COPIES
        self._brisk_seconds = _BRISK_SECONDS if on_gpu else 0.0
        self.ways_taken: dict[str, int] = {}
        """How often each way was chosen; for logs and tests."""

    def __len__(self) -> int:
        return len(self._loads)

    @property
    def engines(self) -> set[str]:
        """Engines that bytes come from now."""
        return {load.engine_id for load in self._loads.values()}

    @property
    def wanted(self) -> list[RemoteParams]:
        """Of everything that is still being fetched, or waits for a handshake."""
        waiting = [load for loads in self._waiting.values() for load in loads]
        return [load.params for load in (*self._loads.values(), *waiting) if not load.given_up]

    def wait(self) -> float | None:
        """Seconds until something should be looked at; None: nothing is under way."""
        if self._loads:
            newest = max(load.copied or load.started for load in self._loads.values())
            age = self._clock() - newest
            if age < self._brisk_seconds:
                return _SHORTEST_WAIT
            return min(max(age / _WAITED_PART, _SHORTEST_WAIT), _LONGEST_WAIT)
        return _ACTIVE_WAIT if self._waiting or self._held else None

    def add(self, receive: Receive, after: Any = None) -> None:
        """Fetch this, once the event ``after`` has happened."""
        now = self._clock()
        load = _Load(receive, now + self._settings.transfer_timeout, now)
        if after is None or after.query():
            self._begin(load)
        else:
            self._held.append((after, load))

    def begin_held(self) -> None:
        """Begin what the device does not write any more."""
        held, self._held = self._held, []
        for after, load in held:
            if after.query():
                self._begin(load)
            else:
                self._held.append((after, load))

    def advance(self) -> None:
        """Go on with every load as far as can be now."""
        for load in list(self._loads.values()):
            self._advance(load)

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
            load.posted = self._clock()
        except PeerLostError as error:
            self._book.retire(load.engine_id)
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
            self._post_rank(load, number, rank, plan, units)

    def _post_rank(
        self, load: _Load, number: int, rank: PeerRank, plan: TransferPlan, units: list[UnitBlocks]
    ) -> None:
        """Start what one rank has, by the way that costs least."""
        descriptors, num_bytes = plan.num_descriptors(units), plan.num_bytes(units)
        way = self._way(rank, plan, descriptors, num_bytes)
        if way == "staging" or self._pushes:
            if way == "staging":
                code = PUSH_STAGED if self._pushes else PULL_STAGED
            else:
                code = PUSH
            load.takes.append(self._taker.start(rank, load.params, code, units))
        elif way == "mapped":
            assert rank.mapped is not None
            load.copies.append((number, rank.mapped.copy(units)))
            load.num_descriptors += descriptors
        else:
            into, out_of = plan.indices(units, "target"), plan.indices(units, "source")
            load.copies.append((number, self._port.read(rank.local, into, rank.remote, out_of)))
            load.num_descriptors += descriptors
        load.num_bytes += num_bytes
        load.chosen.append((rank, way, descriptors, num_bytes))
        self.ways_taken[way] = self.ways_taken.get(way, 0) + 1
        self._reports.count(**{f"transfers_by_{way}": 1})

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
            self._book.retire(load.engine_id)
        except PortError as error:
            load.error = load.error or str(error)
        return True

    def _start_checks(self, load: _Load) -> None:
        load.checking = True
        load.copied = self._clock()
        peer = self._book.peers.get(load.engine_id)
        if peer is None:
            load.error = "the peer was lost before its blocks could be confirmed"
            return
        try:
            for number, rank in peer.ranks.items():
                if rank.plan is not None and rank.plan.tables:
                    self._start_check(load, number, rank)
        except PeerLostError as error:
            load.error = str(error)
            self._book.retire(load.engine_id)
        except PortError as error:
            load.error = str(error)

    def _start_check(self, load: _Load, number: int, rank: PeerRank) -> None:
        lease = load.params.remote_lease_slot
        if rank.process is not None:
            size = self._scratch.itemsize
            self._compare(load, rank.process.read_word(rank.lease_address + lease * size))
            return
        if not self._free_scratch:
            load.error = "too many loads at a time"
            return
        slot = self._free_scratch.pop()
        self._scratch[slot] = -1
        try:
            check = self._port.read(
                self._scratch_list, np.array([slot]), rank.lease_table, np.array([lease])
            )
        except PortError:
            self._free_scratch.append(slot)
            raise
        load.checks.append((number, slot, check))

    def _check_is_over(self, load: _Load, slot: int, check: Any) -> bool:
        if not self._is_over(load, check):
            return False
        found = int(self._scratch[slot])
        self._free_scratch.append(slot)
        if load.error is None:
            self._compare(load, found)
        return True

    def _compare(self, load: _Load, found: int) -> None:
        wanted = load.params.remote_lease_generation
        if found != wanted:
            self._reports.count(late_reads=1)
            load.error = load.error or (
                f"the peer gave the blocks back before they were read (lease generation {found}, "
                f"promised {wanted})"
            )

    def _end(self, load: _Load) -> None:
        request_id = load.receive.request_id
        del self._loads[request_id]
        now = self._clock()
        is_right = load.error is None and not load.given_up
        if is_right:
            self._reports.count(
                transfers=1,
                transfer_bytes=load.num_bytes,
                transfer_descriptors=load.num_descriptors,
                transfer_seconds=now - load.started,
                transfer_post_seconds=load.posted - load.started,
                transfer_check_seconds=now - load.copied,
            )
        else:
            self._reports.count(failed_transfers=1)
            logger.warning("Loading KV of request %s failed: %s", request_id, load.error)
        self._reports.received(request_id, failed=not is_right)
        # Somebody waits for that; for what follows nobody does.
        self._notices.release(load.params)
        if is_right:
            self._learn(load, now - load.started)

    def _learn(self, load: _Load, seconds: float) -> None:
        """That it took so long, where one way brought everything."""
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
            rank.seen.learn(way, ways[way], seconds)

    def give_up_late(self) -> None:
        now = self._clock()
        for load in self._loads.values():
            if now > load.deadline and not load.given_up:
                load.given_up = True
                load.error = load.error or (
                    f"not complete after {self._settings.transfer_timeout:g} s (transfer_timeout)"
                )
                blocks = sum(len(row) for row in load.receive.block_ids)
                self._reports.count(quarantined_blocks=blocks)
                self._reports.stuck(load.receive.request_id)
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

    def settle_handshakes(self) -> None:
        for engine_id, answer in self._book.settle().items():
            if isinstance(answer, Peer):
                self._reports.count(handshakes=1)
                for load in self._waiting.pop(engine_id, []):
                    self._begin(load)
                continue
            self._reports.count(failed_handshakes=1)
            logger.warning("Handshake with engine %s failed: %s", engine_id, answer)
            self._notices.forget(engine_id)
            self._fail_waiting(engine_id, list(self._waiting.get(engine_id, ())), str(answer))
