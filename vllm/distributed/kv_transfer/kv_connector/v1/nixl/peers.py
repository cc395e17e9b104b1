"""Engines that a worker fetches from: handshakes, plans and prepared lists, by engine id."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import (
    AgentMetadata,
    NixlSettings,
    RemoteParams,
    decode_payload,
)
from vllm.distributed.kv_transfer.kv_connector.v1.topology import TransferTopology
from vllm.distributed.kv_transfer.plan import TransferPlan, plan_transfer
from vllm.distributed.kv_transfer.transport.port import TransferPort
from vllm.errors import ConfigError, KVTransferError
from vllm.v1.kv_cache.descriptors import CacheDescriptor
from vllm.v1.kv_cache.rearrange import Shard

__all__ = ["LocalSide", "Peer", "PeerBook", "PeerRank"]

AskHandshake = Callable[[str, int, int, float], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSide:
    """This worker's own cache and place, as plans need them."""

    engine_id: str
    session: str
    shard: Shard
    descriptor: CacheDescriptor
    total_heads: dict[str, int | None]
    factors: dict[str, str]


@dataclass(slots=True)
class PeerRank:
    """One rank of a peer: its agent, and what to copy from it (None: nothing, only talk)."""

    agent: str
    plan: TransferPlan | None
    local: Any = None
    remote: Any = None
    lease_table: Any = None
    num_leases: int = 0


@dataclass(slots=True)
class Peer:
    engine_id: str
    session: str
    address: tuple[str, int]
    tp_size: int
    ranks: dict[int, PeerRank]
    lease_seconds: float
    last_used: float = field(default_factory=time.monotonic)
    heartbeat_at: float = 0.0


@dataclass(slots=True)
class _Answers:
    """A handshake that has been answered by every rank that was asked."""

    metadata: dict[int, AgentMetadata]


class PeerBook:
    """Asks in threads, connects in the thread that owns the port (``settle``).

    Args:
        ask: (host, port, rank, timeout) -> encoded ``HandshakePayload``.
    """

    def __init__(
        self,
        port: TransferPort,
        local: LocalSide,
        settings: NixlSettings,
        ask: AskHandshake,
    ) -> None:
        self._port = port
        self._local = local
        self._settings = settings
        self._ask = ask
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="nixl-ask")
        self._asking: dict[str, tuple[Future[_Answers], tuple[str, int]]] = {}
        self.peers: dict[str, Peer] = {}
        self._retired: list[Peer] = []

    def is_asking(self, engine_id: str) -> bool:
        return engine_id in self._asking

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
            metadata = self._read(encoded)
            if (metadata.engine_id, metadata.tp_rank) != (engine_id, rank):
                raise KVTransferError(
                    f"{address[0]}:{address[1]} is engine {metadata.engine_id} rank "
                    f"{metadata.tp_rank}, not {engine_id} rank {rank}"
                )
            if metadata.tp_size != tp_size:
                raise KVTransferError(f"{engine_id} has {metadata.tp_size} ranks, not {tp_size}")
            found[rank] = metadata
        return _Answers(found)

    def _read(self, encoded: bytes) -> AgentMetadata:
        checked = self._settings.enforce_handshake_compat
        return decode_payload(encoded, self._local.factors if checked else None)

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
        peer = Peer(engine_id, first.session, address, first.tp_size, {}, first.lease_seconds)
        topology = self._topology(first.tp_size)
        sources = topology.source_ranks()
        for rank, metadata in answers.metadata.items():
            peer.ranks[rank] = self._connect_rank(rank, metadata, rank in sources)
        self.peers[engine_id] = peer
        return peer

    def _connect_rank(self, rank: int, metadata: AgentMetadata, has_data: bool) -> PeerRank:
        source = CacheDescriptor.from_json(metadata.descriptor)
        if metadata.total_heads != self._local.total_heads:
            raise KVTransferError("the two engines count the heads of the model differently")
        plan = None
        if has_data:
            there = Shard(tp_size=metadata.tp_size, rank=rank)
            plan = plan_transfer(
                source, self._local.descriptor, there, self._local.shard, self._local.total_heads
            )
        found = PeerRank(self._port.connect(metadata.agent), plan)
        if plan is not None and plan.tables:
            own, theirs = plan.rows("target"), plan.rows("source")
            own[:, 0] += self._local.descriptor.base
            theirs[:, 0] += source.base
            found.local = self._port.prepare(None, own)
            found.remote = self._port.prepare(found.agent, theirs)
        table = np.array([[metadata.lease_table, 8, 8, metadata.num_leases]], dtype=np.int64)
        found.lease_table = self._port.prepare(found.agent, table, on_host=True)
        found.num_leases = metadata.num_leases
        return found

    def retire(self, engine_id: str) -> None:
        """A peer is gone, or has come back as another: the next request shakes hands again."""
        peer = self.peers.pop(engine_id, None)
        if peer is not None:
            self._retired.append(peer)

    def sweep(self, busy: set[str]) -> None:
        """Free what is left of peers that no copy comes from any more."""
        limit = time.monotonic() - self._settings.engine_ttl
        for engine_id, peer in list(self.peers.items()):
            if peer.last_used < limit and engine_id not in busy:
                self.retire(engine_id)
        for peer in [peer for peer in self._retired if peer.engine_id not in busy]:
            self._retired.remove(peer)
            self._free(peer)

    def _free(self, peer: Peer) -> None:
        for rank in peer.ranks.values():
            for prepared in (rank.local, rank.remote, rank.lease_table):
                if prepared is not None:
                    self._port.forget(prepared)
            self._port.disconnect(rank.agent)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for engine_id in list(self.peers):
            self.retire(engine_id)
        self.sweep(set())
