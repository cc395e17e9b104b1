"""Engines that a worker fetches from: handshakes, plans and prepared lists, by engine id."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch

from vllm.distributed.kv_transfer.costs import Experience
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import (
    AgentMetadata,
    NixlSettings,
    RemoteParams,
    decode_payload,
)
from vllm.distributed.kv_transfer.kv_connector.v1.topology import TransferTopology
from vllm.distributed.kv_transfer.mapped import MappedMemory
from vllm.distributed.kv_transfer.plan import TransferPlan, plan_transfer
from vllm.distributed.kv_transfer.staging import RingPair, RingShape, TableMovers
from vllm.distributed.kv_transfer.transport.peer_process import PeerProcess
from vllm.distributed.kv_transfer.transport.port import TransferPort
from vllm.errors import ConfigError, KVTransferError
from vllm.v1.kv_cache.descriptors import CacheDescriptor
from vllm.v1.kv_cache.rearrange import Shard

__all__ = ["LocalSide", "Peer", "PeerBook", "PeerRank", "plan_between", "read_ring"]

AskHandshake = Callable[[str, int, int, float], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSide:
    """This worker's own cache and place, as plans need them."""

    engine_id: str
    session: str
    """Differs after a restart, also under the same engine id."""
    secret: bytes
    """By which this engine seals what it answers to clients."""
    shard: Shard
    descriptor: CacheDescriptor
    total_heads: dict[str, int | None]
    factors: dict[str, str]
    device: str = "cpu"
    """Of the cache."""
    number_format: str = ""
    ring: RingShape | None = None
    registers_blocks: bool = True


@dataclass(slots=True)
class PeerRank:
    """One rank of a peer: its agent, and what to copy from it (None: nothing, only talk)."""

    agent: str
    plan: TransferPlan | None
    local: Any = None
    remote: Any = None
    pair: RingPair | None = None
    """The two staging rings, where both have one."""
    local_ring: Any = None
    remote_ring: Any = None
    movers: list[TableMovers] = field(default_factory=list)
    mapped: MappedMemory | None = None
    """The peer's cache, where it can be read here."""
    seen: Experience = field(default_factory=Experience)
    introduced: bool = False
    """It knows us, and what we take."""
    lease_table: Any = None
    lease_address: int = 0
    """Of its lease table, in its process."""
    process: PeerProcess | None = None
    """By which the table is read where that can be."""
    num_leases: int = 0


@dataclass(slots=True)
class Peer:
    engine_id: str
    session: str
    address: tuple[str, int]
    tp_size: int
    ranks: dict[int, PeerRank]
    lease_seconds: float
    secret: bytes
    last_used: float
    heartbeat_at: float = 0.0

    def believes(self, params: RemoteParams) -> bool:
        """These parameters are what this run of the engine has said, of the same prompt."""
        found = params.remote_seal.encode()
        return params.remote_session == self.session and hmac.compare_digest(
            found, params.sealed_by(self.secret).encode()
        )


@dataclass(slots=True)
class _Answers:
    """A handshake that has been answered by every rank that was asked."""

    metadata: dict[int, AgentMetadata]


def read_ring(ring: dict[str, int | bool]) -> RingShape:
    """
    Raises:
        KVTransferError: no ring is like that.
    """
    try:
        return msgspec.convert(ring, RingShape)
    except msgspec.ValidationError as error:
        raise KVTransferError(f"the handshake is malformed: {error}") from error


def plan_between(
    local: LocalSide, metadata: AgentMetadata, *, receiving: bool
) -> tuple[TransferPlan, CacheDescriptor]:
    """What crosses between this worker and a peer's: both make the same plan of it.

    Raises:
        KVTransferError: they do not fit, or cannot agree on a way.
    """
    theirs = CacheDescriptor.from_json(metadata.descriptor)
    if metadata.total_heads != local.total_heads:
        raise KVTransferError("the two engines count the heads of the model differently")
    there = Shard(tp_size=metadata.tp_size, rank=metadata.tp_rank)
    sides = [
        (theirs, there, metadata.number_format),
        (local.descriptor, local.shard, local.number_format),
    ]
    source, target = sides if receiving else sides[::-1]
    plan = plan_transfer(
        source[0], target[0], source[1], target[1], local.total_heads, (source[2], target[2])
    )
    return plan, theirs


class PeerBook:
    """Asks in threads, connects in the thread that owns the port (``settle``).

    Args:
        ask: (host, port, rank, timeout) -> encoded ``HandshakePayload``.
        clock: seconds, by which peers are idle.
    """

    def __init__(
        self,
        port: TransferPort,
        local: LocalSide,
        settings: NixlSettings,
        ask: AskHandshake,
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        self._port = port
        self._local = local
        self._settings = settings
        self._ask = ask
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="nixl-ask")
        self._asking: dict[str, tuple[Future[_Answers], tuple[str, int]]] = {}
        self.peers: dict[str, Peer] = {}
        self._retired: list[Peer] = []
        self.scales: dict[str, tuple[float, float]] = {}
        """Of layers whose numbers may be converted: scales of K and V."""

    def ask_for(self, params: RemoteParams) -> None:
        """Start a handshake with the engine of these parameters, unless one is under way."""
        engine_id = params.remote_engine_id
        assert engine_id is not None
        assert params.remote_host is not None
        assert params.remote_port is not None
        if engine_id in self._asking:
            return
        address = params.remote_host, params.remote_port
        topology = self._topology(params.tp_size)
        ranks = topology.notified_ranks()
        future = self._pool.submit(self._ask_ranks, engine_id, params.tp_size, address, ranks)
        self._asking[engine_id] = future, address

    def _topology(self, remote_tp_size: int) -> TransferTopology:
        shard = self._local.shard
        return TransferTopology(
            tp_rank=shard.rank,
            tp_size=shard.tp_size,
            remote_tp_size=remote_tp_size,
            total_heads=tuple(sorted({h for h in self._local.total_heads.values() if h})),
        )

    def _ask_ranks(
        self, engine_id: str, tp_size: int, address: tuple[str, int], ranks: tuple[int, ...]
    ) -> _Answers:
        found = {}
        for rank in ranks:
            encoded = self._ask(*address, rank, self._settings.handshake_timeout)
            checked = self._settings.enforce_handshake_compat
            metadata = decode_payload(encoded, self._local.factors if checked else None)
            if (metadata.engine_id, metadata.tp_rank) != (engine_id, rank):
                raise KVTransferError(
                    f"{address[0]}:{address[1]} is engine {metadata.engine_id} rank "
                    f"{metadata.tp_rank}, not {engine_id} rank {rank}"
                )
            if metadata.tp_size != tp_size:
                raise KVTransferError(f"{engine_id} has {metadata.tp_size} ranks, not {tp_size}")
            found[rank] = metadata
        return _Answers(found)

    def settle(self) -> dict[str, Peer | KVTransferError]:
        """Handshakes that have ended since the last call: the peer, or why there is none."""
        ended: dict[str, Peer | KVTransferError] = {}
        for engine_id, (future, address) in list(self._asking.items()):
            if not future.done():
                continue
            del self._asking[engine_id]
            try:
                ended[engine_id] = self._connect(engine_id, address, future.result())
            except (KVTransferError, ConfigError, RuntimeError) as error:
                ended[engine_id] = KVTransferError(str(error))
        return ended

    def _connect(self, engine_id: str, address: tuple[str, int], answers: _Answers) -> Peer:
        self.retire(engine_id)
        first = next(iter(answers.metadata.values()))
        peer = Peer(
            engine_id=engine_id,
            session=first.session,
            address=address,
            tp_size=first.tp_size,
            ranks={},
            lease_seconds=first.lease_seconds,
            secret=first.secret,
            last_used=self._clock(),
        )
        topology = self._topology(first.tp_size)
        sources = topology.source_ranks()
        for rank, metadata in answers.metadata.items():
            peer.ranks[rank] = self._connect_rank(metadata, rank in sources)
        self.peers[engine_id] = peer
        return peer

    def _connect_rank(self, metadata: AgentMetadata, has_data: bool) -> PeerRank:
        plan = source = None
        if has_data:
            plan, source = plan_between(self._local, metadata, receiving=True)
        found = PeerRank(self._port.connect(metadata.agent), plan)
        if plan is not None and plan.tables:
            assert source is not None
            self._prepare(found, plan, metadata, source.base)
        table = np.array([[metadata.lease_table, 8, 8, metadata.num_leases]], dtype=np.int64)
        found.lease_table = self._port.prepare(found.agent, table, on_host=True)
        found.num_leases = metadata.num_leases
        found.lease_address = metadata.lease_table
        found.process = self._port.process(found.agent)
        return found

    def _prepare(
        self, rank: PeerRank, plan: TransferPlan, metadata: AgentMetadata, base: int
    ) -> None:
        """Everything by which bytes can come from there."""
        local = self._local
        device = torch.device(local.device)
        rank.movers = [TableMovers(table, device, self.scales) for table in plan.tables]
        if local.registers_blocks and metadata.registers_blocks and not plan.converts:
            own, theirs = plan.rows("target"), plan.rows("source")
            own[:, 0] += local.descriptor.base
            theirs[:, 0] += base
            rank.local = self._port.prepare(None, own)
            rank.remote = self._port.prepare(rank.agent, theirs)
            place = self._port.mapped(rank.agent, base)
            if place is not None:
                own_base = local.descriptor.base
                rank.mapped = MappedMemory(rank.movers, place, own_base, device)
        if local.ring is not None and metadata.ring is not None:
            pair = RingPair(source=read_ring(metadata.ring), target=local.ring)
            rank.pair = pair
            rank.local_ring = self._port.prepare(
                None, pair.rows("target"), on_host=pair.target.on_host
            )
            rank.remote_ring = self._port.prepare(
                rank.agent, pair.rows("source"), on_host=pair.source.on_host
            )
        if rank.local is None and rank.pair is None:
            why = (
                f"they convert {', '.join(_conversions(plan))}"
                if plan.converts
                else 'kv_buffer_device "cpu" lets peers reach the staging ring only'
            )
            raise KVTransferError(
                f"the engines need a staging ring, since {why}: set staging_slots in "
                "kv_connector_extra_config on both sides"
            )

    def retire(self, engine_id: str) -> None:
        """A peer is gone, or has come back as another: the next request shakes hands again."""
        peer = self.peers.pop(engine_id, None)
        if peer is not None:
            self._retired.append(peer)

    def sweep(self, busy: set[str]) -> None:
        """Free what is left of peers that no copy comes from any more."""
        limit = self._clock() - self._settings.engine_ttl
        for engine_id, peer in list(self.peers.items()):
            if peer.last_used < limit and engine_id not in busy:
                self.retire(engine_id)
        for peer in [peer for peer in self._retired if peer.engine_id not in busy]:
            self._retired.remove(peer)
            self._free(peer)

    def _free(self, peer: Peer) -> None:
        for rank in peer.ranks.values():
            for prepared in (
                rank.local,
                rank.remote,
                rank.lease_table,
                rank.local_ring,
                rank.remote_ring,
            ):
                if prepared is not None:
                    self._port.forget(prepared)
            self._port.disconnect(rank.agent)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for engine_id in list(self.peers):
            self.retire(engine_id)
        self.sweep(set())


def _conversions(plan: TransferPlan) -> set[str]:
    return {table.conversion.name for table in plan.tables if table.conversion is not None}
