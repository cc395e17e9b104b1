"""The decode side of a worker: asks prefill workers to write, and waits until they have ended it.

A load is over when every rank that was asked has said so, or is known to have died; until then
its blocks belong to it, also if the request is given up. Knows no transport: bytes arrive by
themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.directory import Directory, Engine
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.messages import (
    Heartbeat,
    MooncakeParams,
    MooncakeSettings,
    MooncakeStepMetadata,
    MooncakeTimes,
    MooncakeXferMetadata,
    MooncakeXferResponse,
    PeerLayout,
    Receive,
    Status,
    Wanted,
    Withdrawal,
    decode_sealed,
    sealed,
)
from vllm.distributed.kv_transfer.kv_connector.v1.reports import Reports
from vllm.distributed.kv_transfer.kv_connector.v1.topology import TransferTopology
from vllm.distributed.kv_transfer.transport.channel import Channel
from vllm.errors import ConfigError, KVTransferError
from vllm.logger import init_logger

__all__ = ["Receiver"]

logger = init_logger(__name__)

_HEARTBEATS_A_LEASE = 6
_ASKS_A_SILENCE = 6
_DRAIN_SECONDS = 1.0
"""What a dead peer had sent is in this host's buffers: Mooncake's threads store it at once."""


@dataclass(slots=True)
class _Load:
    receive: Receive
    started: float
    heard_at: float
    engine: Engine | None = None
    pending: dict[int, str] = field(default_factory=dict)
    """Addresses of the ranks that have not answered for good, by rank."""
    asked_at: float = float("-inf")
    gone_at: dict[int, float] = field(default_factory=dict)
    written_since: float | None = None
    error: str | None = None
    given_up: bool = False
    num_bytes: int = 0
    num_descriptors: int = 0

    @property
    def request_id(self) -> str:
        return self.receive.request_id

    @property
    def transfer_id(self) -> str:
        assert self.receive.params.transfer_id is not None
        return self.receive.params.transfer_id


class Receiver:
    """One rank's; all methods are for the transfer thread."""

    def __init__(
        self,
        channel: Channel,
        directory: Directory,
        layout: PeerLayout,
        total_heads: tuple[int, ...],
        settings: MooncakeSettings,
        times: MooncakeTimes,
        reports: Reports,
        clock: Callable[[], float],
    ) -> None:
        self._channel = channel
        self._directory = directory
        self._layout = layout
        self._encoded = msgspec.msgpack.encode(layout)
        self._layout_id = hashlib.sha256(self._encoded).hexdigest()
        self._total_heads = total_heads
        self._settings = settings
        self._times = times
        self._reports = reports
        self._clock = clock
        self._loads: dict[str, _Load] = {}
        self._expected: dict[str, MooncakeParams] = {}
        self._declined: list[tuple[float, str, MooncakeParams]] = []
        self._told: set[str] = set()
        """Addresses that have our layout."""
        self._beat_at = 0.0

    @property
    def is_busy(self) -> bool:
        return bool(self._loads or self._declined or self._expected)

    # What the scheduler says

    def take(self, metadata: MooncakeStepMetadata) -> None:
        now = self._clock()
        for request_id in metadata.unexpected:
            self._expected.pop(request_id, None)
        for request_id, params in metadata.expected.items():
            if request_id not in metadata.unexpected:
                self._expected[request_id] = params
                self._start_looking(params)
        for receive in metadata.receives:
            self._loads[receive.request_id] = _Load(receive, now, now)
        for request_id, params in metadata.declined.items():
            self._start_looking(params)
            self._declined.append((now + self._times.silence, request_id, params))
        for request_id in metadata.cancelled:
            load = self._loads.get(request_id)
            if load is not None:
                self._abandon(load, "the request has ended")

    def _start_looking(self, params: MooncakeParams) -> None:
        """Ask the bootstrap server early; what it has failed with, the load will say."""
        with contextlib.suppress(KVTransferError):
            self._look_up(params)

    def _look_up(self, params: MooncakeParams) -> Engine | None:
        """The prefill engine, as soon as its bootstrap server has answered.

        Raises:
            KVTransferError: it has answered that there is no such engine, or not at all.
        """
        assert params.remote_bootstrap_addr is not None
        assert params.remote_engine_id is not None
        return self._directory.find(params.remote_bootstrap_addr, params.remote_engine_id)

    # Turns

    def turn(self) -> None:
        """Go on with everything that can go on, without waiting."""
        for address, message in self._channel.take_answers():
            self._hear(address, message)
        for load in list(self._loads.values()):
            self._advance(load)
        self._decline()
        self._beat()

    def _advance(self, load: _Load) -> None:
        now = self._clock()
        if load.engine is None and load.error is None:
            try:
                load.engine = self._look_up(load.receive.params)
                if load.engine is not None:
                    ranks = self._topology(load.engine).notified_ranks()
                    load.pending = {rank: load.engine.addresses[rank] for rank in ranks}
            except (KVTransferError, ConfigError) as error:
                load.error = str(error)
        for rank, address in list(load.pending.items()):
            self._see_if_gone(load, rank, address)
        if not load.pending and (load.engine is not None or load.error is not None):
            self._end(load)
            return
        if now > load.heard_at + self._times.silence:
            silence = f"{self._times.silence:g} s (VLLM_MOONCAKE_CONNECTOR_TIMEOUT)"
            if load.engine is None:
                load.error = f"the bootstrap server did not answer within {silence}"
                self._end(load)
                return
            self._give_up(load, f"no word of the prefill engine for {silence}")
        longest = self._settings.transfer_timeout
        if load.written_since is not None and now > load.written_since + longest:
            self._give_up(load, f"not complete after {longest:g} s (transfer_timeout)")
        if load.engine is not None and now > load.asked_at + self._times.silence / _ASKS_A_SILENCE:
            self._ask(load)

    def _topology(self, engine: Engine) -> TransferTopology:
        return TransferTopology(
            tp_rank=self._layout.tp_rank,
            tp_size=self._layout.tp_size,
            remote_tp_size=len(engine.addresses),
            total_heads=self._total_heads,
        )

    def _see_if_gone(self, load: _Load, rank: int, address: str) -> None:
        if not self._channel.is_gone(address):
            return
        now = self._clock()
        self._told.discard(address)
        self._directory.forget(load.receive.params.remote_bootstrap_addr or "")
        load.error = load.error or f"the prefill worker at {address} is gone"
        if now > load.gone_at.setdefault(rank, now) + _DRAIN_SECONDS:
            del load.pending[rank]

    def _ask(self, load: _Load) -> None:
        """Ask all ranks that have not answered, again too; or say that it is no longer wanted."""
        load.asked_at = self._clock()
        for address in load.pending.values():
            if load.error is None:
                self._send_question(load, address)
            else:
                self._send_withdrawal(address, load.request_id, load.receive.params)

    def _send_question(self, load: _Load, address: str) -> None:
        receive, layout = load.receive, self._layout
        wanted = Wanted(
            transfer_id=load.transfer_id,
            block_ids=list(receive.block_ids),
            first_token=receive.first_token,
            num_tokens=receive.num_tokens,
            digest=receive.digest,
            num_readers=receive.params.num_readers,
        )
        question = MooncakeXferMetadata(
            remote_session=layout.session,
            remote_tp_rank=layout.tp_rank,
            remote_tp_size=layout.tp_size,
            req_blocks={load.request_id: wanted},
            layout_id=self._layout_id,
            layout=None if address in self._told else self._encoded,
        )
        if self._send(address, sealed(question)):
            self._told.add(address)

    def _send_withdrawal(self, address: str, request_id: str, params: MooncakeParams) -> bool:
        layout = self._layout
        assert params.transfer_id is not None
        question = Withdrawal(
            remote_session=layout.session,
            remote_tp_rank=layout.tp_rank,
            remote_tp_size=layout.tp_size,
            requests={request_id: params.transfer_id},
            num_readers=params.num_readers,
        )
        return self._send(address, sealed(question))

    def _send(self, address: str, message: bytes) -> bool:
        sent = self._channel.ask(address, message)
        if not sent:
            self._reports.count(failed_notifications=1)
        return sent

    # Answers

    def _hear(self, address: str, message: bytes) -> None:
        try:
            response = decode_sealed(message, MooncakeXferResponse)
        except ValueError:
            self._reports.count(refused_notifications=1)
            return
        for request_id, moved in response.ok_reqs.items():
            load, rank = self._asked(address, request_id)
            if load is None:
                continue
            load.heard_at = self._clock()
            if response.status is Status.CONTINUE:
                load.written_since = load.written_since or load.heard_at
            elif response.status is not Status.LAYOUT_MISS:
                load.num_bytes += moved.num_bytes
                load.num_descriptors += moved.num_descriptors
                self._rank_has_ended(load, rank)
        for request_id in response.err_reqs:
            load, rank = self._asked(address, request_id)
            if load is None:
                continue
            load.heard_at = self._clock()
            if response.status is Status.LAYOUT_MISS:
                self._told.discard(address)
                if load.error is None:
                    self._send_question(load, address)
            elif response.status is not Status.CONTINUE:
                text = response.err_msg or "for a reason that it does not tell"
                self._rank_has_ended(load, rank, f"refused by {address}: {text[:2000]}")

    def _asked(self, address: str, request_id: str) -> tuple[_Load | None, int]:
        """The load that this address was asked about; other answers count as refused or late."""
        load = self._loads.get(request_id)
        if load is not None:
            for rank, asked in load.pending.items():
                if asked == address:
                    return load, rank
        return None, 0

    def _rank_has_ended(self, load: _Load, rank: int, error: str | None = None) -> None:
        del load.pending[rank]
        load.heard_at = self._clock()
        if error is not None and load.error is None:
            load.error = error
            if load.pending:
                # The other ranks need not go on.
                self._ask(load)

    # Ends

    def _abandon(self, load: _Load, why: str) -> None:
        load.error = load.error or why
        if load.engine is not None:
            self._ask(load)

    def _give_up(self, load: _Load, why: str) -> None:
        """The request goes on without it; its blocks stay until the load has ended."""
        if load.given_up:
            return
        load.given_up = True
        self._abandon(load, why)
        self._reports.count(quarantined_blocks=sum(len(row) for row in load.receive.block_ids))
        self._reports.stuck(load.request_id)

    def _end(self, load: _Load) -> None:
        del self._loads[load.request_id]
        failed = load.error is not None
        self._reports.received(load.request_id, failed=failed)
        if failed:
            if load.engine is None:
                # The prefill engine has not heard of it yet.
                deadline = self._clock() + self._times.silence
                self._declined.append((deadline, load.request_id, load.receive.params))
            self._reports.count(failed_transfers=1)
            logger.warning("Loading KV of request %s failed: %s", load.request_id, load.error)
            return
        self._reports.count(
            transfers=1,
            transfer_bytes=load.num_bytes,
            transfer_descriptors=load.num_descriptors,
            transfer_seconds=self._clock() - load.started,
        )

    def close(self) -> None:
        """Nothing more is waited for."""
        for load in list(self._loads.values()):
            load.error = load.error or "the engine has ended or sleeps"
            self._end(load)
        self._directory.close()

    def _decline(self) -> None:
        """Tell prefill engines what need not be kept; what cannot be told is left to the lease."""
        left = []
        for deadline, request_id, params in self._declined:
            try:
                engine = self._look_up(params)
                ranks = () if engine is None else self._topology(engine).notified_ranks()
            except (KVTransferError, ConfigError):
                continue
            if engine is None:
                if self._clock() < deadline:
                    left.append((deadline, request_id, params))
                continue
            for rank in ranks:
                self._send_withdrawal(engine.addresses[rank], request_id, params)
        self._declined = left

    def _beat(self) -> None:
        """Prolong the leases of what we have not fetched yet."""
        now = self._clock()
        if now < self._beat_at:
            return
        self._beat_at = now + self._settings.kv_lease_duration / _HEARTBEATS_A_LEASE
        by_address: dict[str, set[str]] = {}
        loads = [load.receive.params for load in self._loads.values() if load.error is None]
        for params in (*self._expected.values(), *loads):
            try:
                engine = self._look_up(params)
                ranks = () if engine is None else self._topology(engine).notified_ranks()
            except (KVTransferError, ConfigError):
                # The load will say so.
                continue
            assert params.transfer_id is not None
            for rank in ranks:
                assert engine is not None
                by_address.setdefault(engine.addresses[rank], set()).add(params.transfer_id)
        for address, transfer_ids in by_address.items():
            heartbeat = Heartbeat(
                remote_session=self._layout.session,
                remote_tp_size=self._layout.tp_size,
                transfer_ids=sorted(transfer_ids),
            )
            self._send(address, sealed(heartbeat))
