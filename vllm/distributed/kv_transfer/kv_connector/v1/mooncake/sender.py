"""The prefill side of a worker: writes the blocks that decoders ask for into their caches.

A decoder may ask before its prefill has begun, and asks again while it waits; whatever it asks is
answered exactly when nothing more will be written for it. What was asked under one id is written
once at most: a question that comes late or twice gets the answer that was given already. Blocks
wait for their decoder under a lease, and what is written after that is never called complete.
Knows the transport as ``CopyPort`` and decoders as senders of messages.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vllm.distributed.kv_transfer.kv_connector.v1.compatibility import check_factors
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.messages import (
    Discard,
    Heartbeat,
    MooncakeSettings,
    MooncakeStepMetadata,
    MooncakeTimes,
    MooncakeXferMetadata,
    MooncakeXferResponse,
    Moved,
    Offer,
    PeerLayout,
    Question,
    Status,
    Wanted,
    Withdrawal,
    decode_sealed,
    sealed,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.peers import LocalSide
from vllm.distributed.kv_transfer.kv_connector.v1.reports import Reports
from vllm.distributed.kv_transfer.kv_connector.v1.topology import TransferTopology
from vllm.distributed.kv_transfer.plan import TransferPlan, plan_transfer
from vllm.distributed.kv_transfer.transport.channel import Channel
from vllm.distributed.kv_transfer.transport.port import CopyPort, PortError
from vllm.errors import ConfigError, KVTransferError
from vllm.logger import init_logger
from vllm.v1.kv_cache.descriptors import CacheDescriptor
from vllm.v1.kv_cache.rearrange import Shard

__all__ = ["Sender"]

logger = init_logger(__name__)

_PROLONGS_BY = 2 / 3
_SIGNS_A_SILENCE = 4
_MOST_REMEMBERED = 16384
_MOST_DECODERS = 1024
_DISCARDED = "its request has failed elsewhere"

_Key = tuple[str, int, str]
"""(session of the decoder, its rank, its request id)."""


@dataclass(slots=True)
class _Decoder:
    """A decoder's rank: what to write into it, and from which lists."""

    layout: PeerLayout
    agent: str
    plan: TransferPlan
    own: Any = None
    theirs: Any = None


@dataclass(slots=True)
class _Prefill:
    """A transfer id that the scheduler has told of; ``offer`` is there once it is computed."""

    deadline: float
    offer: Offer | None = None
    session: str | None = None
    """Of the decoder that it is for: the first that asked."""
    done: dict[int, set[str]] = field(default_factory=dict)
    """By rank of the decoder, its requests that need nothing more."""
    num_readers: int = 1
    """Requests of the decoder that must say so."""
    tp_size: int = 0
    is_discarded: bool = False


@dataclass(slots=True)
class _Wish:
    key: _Key
    who: Any
    wanted: Wanted
    decoder: _Decoder
    since: float
    told_at: float
    transfer: Any = None
    moved: Moved = field(default_factory=lambda: Moved(0, 0))
    error: str | None = None
    """Set where the answer can no longer be good, whatever the transport says."""

    @property
    def tp_size(self) -> int:
        return self.decoder.layout.tp_size


class Sender:
    """One rank's; all methods are for the transfer thread."""

    def __init__(
        self,
        port: CopyPort,
        channel: Channel,
        local: LocalSide,
        settings: MooncakeSettings,
        times: MooncakeTimes,
        reports: Reports,
        clock: Callable[[], float],
    ) -> None:
        self._port = port
        self._channel = channel
        self._local = local
        self._settings = settings
        self._times = times
        self._reports = reports
        self._clock = clock
        self._decoders: OrderedDict[str, _Decoder] = OrderedDict()
        self._prefills: dict[str, _Prefill] = {}
        self._early: OrderedDict[str, _Prefill] = OrderedDict()
        """Transfer ids that decoders have done with before the scheduler told of them."""
        self._over: OrderedDict[str, str] = OrderedDict()
        """Transfer ids of the past, and what became of them."""
        self._wishes: dict[_Key, _Wish] = {}
        self._answered: OrderedDict[_Key, bytes] = OrderedDict()

    @property
    def is_busy(self) -> bool:
        """Something is being written."""
        return any(wish.transfer is not None for wish in self._wishes.values())

    @property
    def is_waiting(self) -> bool:
        return bool(self._wishes or self._prefills)

    # What the scheduler says

    def take(self, metadata: MooncakeStepMetadata) -> None:
        for transfer_id in metadata.announced:
            self._over.pop(transfer_id, None)
            prefill = self._early.pop(transfer_id, None) or _Prefill(float("inf"))
            self._prefills[transfer_id] = prefill
        now = self._clock()
        for offer in metadata.offers:
            prefill = self._prefills.setdefault(offer.transfer_id, _Prefill(0.0))
            prefill.offer = offer
            claimed = prefill.session is not None
            lease = self._settings.kv_lease_duration if claimed else self._times.unclaimed
            prefill.deadline = now + lease
            if prefill.is_discarded:
                self._forget(offer.transfer_id, _DISCARDED)
            self._end_if_done(offer.transfer_id)
        for transfer_id, why in metadata.dropped.items():
            self._forget(transfer_id, why)

    # What decoders say

    def hear(self) -> None:
        for who, message in self._channel.take_questions():
            try:
                question = decode_sealed(message, Question)
            except ValueError as error:
                self._refuse(who, [], f"malformed: {error}")
                continue
            if isinstance(question, Heartbeat):
                self._prolong(question)
            elif isinstance(question, Discard):
                self._discard(question)
            elif isinstance(question, Withdrawal):
                self._withdraw(who, question)
            else:
                self._asked(who, question)

    def _refuse(self, who: Any, request_ids: list[str], why: str) -> None:
        self._reports.count(refused_notifications=1)
        self._say(who, MooncakeXferResponse(status=Status.ERROR, err_reqs=request_ids, err_msg=why))

    def _say(self, who: Any, response: MooncakeXferResponse) -> bytes:
        encoded = sealed(response)
        self._channel.answer(who, encoded)
        return encoded

    def _prolong(self, heartbeat: Heartbeat) -> None:
        more = self._settings.kv_lease_duration * _PROLONGS_BY
        for transfer_id in heartbeat.transfer_ids:
            prefill = self._prefills.get(transfer_id)
            if prefill is None:
                # It may be on its way here.
                continue
            if prefill.session is None:
                self._claim(prefill, heartbeat.remote_session, heartbeat.remote_tp_size)
            if prefill.session == heartbeat.remote_session and prefill.offer is not None:
                prefill.deadline = max(prefill.deadline, self._clock() + more)

    def _discard(self, question: Discard) -> None:
        for transfer_id in question.transfer_ids:
            if transfer_id in self._over:
                continue
            prefill = self._prefill_or_early(transfer_id)
            prefill.is_discarded = True
            if prefill.offer is not None:
                self._forget(transfer_id, _DISCARDED)

    def _asked(self, who: Any, question: MooncakeXferMetadata) -> None:
        names = list(question.req_blocks)
        for wanted in question.req_blocks.values():
            problem = wanted.problem()
            if problem is not None:
                self._refuse(who, names, problem)
                return
        decoder = self._decoders.get(question.layout_id)
        if decoder is None:
            if question.layout is None:
                self._say(who, MooncakeXferResponse(status=Status.LAYOUT_MISS, err_reqs=names))
                return
            try:
                decoder = self._meet(question.layout_id, question.layout)
            except (KVTransferError, ConfigError, PortError) as error:
                self._reports.count(failed_handshakes=1)
                logger.warning("A decoder was refused: %s", error)
                self._say_ended(who, question, str(error))
                return
        self._decoders.move_to_end(question.layout_id)
        layout = decoder.layout
        says = question.remote_session, question.remote_tp_rank, question.remote_tp_size
        if says != (layout.session, layout.tp_rank, layout.tp_size):
            self._refuse(who, names, "the layout is that of another worker")
            return
        for request_id, wanted in question.req_blocks.items():
            self._wish(who, (layout.session, layout.tp_rank, request_id), wanted, decoder)

    def _say_ended(self, who: Any, question: MooncakeXferMetadata, why: str) -> None:
        """A question that is answered for good before anything was begun."""
        for request_id, wanted in question.req_blocks.items():
            key = question.remote_session, question.remote_tp_rank, request_id
            if key in self._wishes:
                continue
            self._conclude(key, who, _failure(request_id, why))
            self._is_done(key, wanted.transfer_id, question.remote_tp_size, wanted.num_readers)

    def _wish(self, who: Any, key: _Key, wanted: Wanted, decoder: _Decoder) -> None:
        answered = self._answered.get(key)
        if answered is not None:
            self._channel.answer(who, answered)
            return
        now = self._clock()
        wish = self._wishes.get(key)
        if wish is not None:
            wish.who = who
            wish.told_at = now
            self._say_continue(wish)
            return
        if len(self._wishes) >= self._settings.max_requests:
            self._reports.count(refused_notifications=1)
            why = f"{len(self._wishes)} requests wait already (max_requests)"
            self._conclude(key, who, _failure(key[2], why))
            return
        self._wishes[key] = _Wish(key, who, wanted, decoder, now, now)
        prefill = self._prefills.get(wanted.transfer_id)
        if prefill is not None and prefill.session is None:
            self._claim(prefill, key[0], decoder.layout.tp_size)

    def _claim(self, prefill: _Prefill, session: str, tp_size: int) -> None:
        prefill.session, prefill.tp_size = session, tp_size
        if prefill.offer is not None:
            prefill.deadline = self._clock() + self._settings.kv_lease_duration

    def _withdraw(self, who: Any, question: Withdrawal) -> None:
        for request_id, transfer_id in question.requests.items():
            key = question.remote_session, question.remote_tp_rank, request_id
            wish = self._wishes.get(key)
            if wish is not None and wish.transfer is not None:
                # Answered when the transport has ended it.
                wish.who = who
                wish.error = wish.error or "withdrawn by the decoder"
                continue
            answered = self._answered.get(key)
            if answered is not None:
                self._channel.answer(who, answered)
                continue
            self._wishes.pop(key, None)
            self._conclude(key, who, _failure(request_id, "withdrawn by the decoder"))
            self._is_done(key, transfer_id, question.remote_tp_size, question.num_readers)

    # Decoders

    def _meet(self, layout_id: str, encoded: bytes) -> _Decoder:
        """Check a decoder's worker and plan what to write into it, once.

        Raises:
            KVTransferError, ConfigError: the two caches cannot exchange blocks.
            PortError: it cannot be reached, or says something that cannot be.
        """
        if hashlib.sha256(encoded).hexdigest() != layout_id:
            raise KVTransferError("the layout is not the one that its id names")
        try:
            layout = msgspec.msgpack.decode(encoded, type=PeerLayout)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise KVTransferError(f"the layout is malformed: {error}") from error
        local = self._local
        if self._settings.enforce_handshake_compat:
            check_factors(local.factors, layout.factors, layout.compatibility_hash)
        if layout.total_heads != local.total_heads:
            raise KVTransferError("the two engines count the heads of the model differently")
        if not 0 <= layout.tp_rank < layout.tp_size <= 1024:
            raise KVTransferError(f"rank {layout.tp_rank} of {layout.tp_size} does not exist")
        if layout.tp_rank not in self._topology(layout.tp_size).consumers():
            raise KVTransferError(
                f"rank {layout.tp_rank} of {layout.tp_size} takes nothing from rank "
                f"{local.shard.rank} of {local.shard.tp_size}"
            )
        target = CacheDescriptor.from_json(layout.descriptor)
        there = Shard(tp_size=layout.tp_size, rank=layout.tp_rank)
        plan = plan_transfer(local.descriptor, target, local.shard, there, local.total_heads)
        decoder = _Decoder(layout, self._port.connect(layout.agent), plan)
        if plan.tables:
            own, theirs = plan.rows("source"), plan.rows("target")
            own[:, 0] += local.descriptor.base
            theirs[:, 0] += target.base
            decoder.own = self._port.prepare(None, own)
            decoder.theirs = self._port.prepare(decoder.agent, theirs)
        self._decoders[layout_id] = decoder
        self._reports.count(handshakes=1)
        self._forget_decoders()
        return decoder

    def _forget_decoders(self) -> None:
        used = {id(wish.decoder) for wish in self._wishes.values()}
        for layout_id, decoder in list(self._decoders.items())[:-1]:
            if len(self._decoders) <= _MOST_DECODERS:
                return
            if id(decoder) not in used:
                del self._decoders[layout_id]
                self._let_go(decoder)

    def _let_go(self, decoder: _Decoder) -> None:
        for prepared in (decoder.own, decoder.theirs):
            if prepared is not None:
                self._port.forget(prepared)
        if all(other.agent != decoder.agent for other in self._decoders.values()):
            self._port.disconnect(decoder.agent)

    def _topology(self, remote_tp_size: int) -> TransferTopology:
        shard = self._local.shard
        return TransferTopology(
            tp_rank=shard.rank,
            tp_size=shard.tp_size,
            remote_tp_size=remote_tp_size,
            total_heads=tuple(sorted({h for h in self._local.total_heads.values() if h})),
        )

    # Turns

    def turn(self) -> None:
        """Go on with everything that can go on, without waiting."""
        self.hear()
        for wish in list(self._wishes.values()):
            if wish.transfer is not None:
                self._poll(wish)
        # What nobody waits for any more takes no place.
        writing = sum(
            wish.transfer is not None and wish.error is None for wish in self._wishes.values()
        )
        for wish in list(self._wishes.values()):
            if wish.transfer is None and self._advance(wish, writing < self._settings.num_workers):
                writing += 1
        self._expire()

    def _advance(self, wish: _Wish, may_write: bool) -> bool:
        """Begin to write, give up, or say that it will take longer; True if it is being written."""
        now, wanted = self._clock(), wish.wanted
        prefill = self._prefills.get(wanted.transfer_id)
        problem = None
        if prefill is None:
            problem = self._over.get(wanted.transfer_id)
            if problem is None and now > wish.since + self._times.silence:
                problem = (
                    f"no prefill {wanted.transfer_id!r} came within {self._times.silence:g} s "
                    "(VLLM_MOONCAKE_CONNECTOR_TIMEOUT)"
                )
        else:
            if prefill.session is None:
                self._claim(prefill, wish.key[0], wish.tp_size)
            if prefill.session != wish.key[0]:
                problem = "it is another decoder's"
            elif prefill.offer is not None:
                problem = _difference(prefill.offer, wanted)
        if problem is not None:
            self._fail(wish, problem)
            return False
        if prefill is not None and prefill.offer is not None and may_write:
            return self._write(wish, prefill.offer)
        if now > wish.told_at + self._times.silence / _SIGNS_A_SILENCE:
            wish.told_at = now
            self._say_continue(wish)
        return False

    def _say_continue(self, wish: _Wish) -> None:
        name = wish.key[2]
        response = MooncakeXferResponse(status=Status.CONTINUE)
        if wish.transfer is None:
            response.err_reqs = [name]
        else:
            response.ok_reqs = {name: wish.moved}
        self._say(wish.who, response)

    def _write(self, wish: _Wish, offer: Offer) -> bool:
        plan, wanted = wish.decoder.plan, wish.wanted
        try:
            if len(wanted.block_ids) != len(offer.block_ids):
                raise KVTransferError(
                    f"the decoder names blocks of {len(wanted.block_ids)} cache groups, this "
                    f"engine has {len(offer.block_ids)}"
                )
            units = plan.units(
                offer.block_ids, wanted.block_ids, wanted.num_tokens, wanted.first_token
            )
            out_of, into = plan.indices(units, "source"), plan.indices(units, "target")
            if not len(into):
                self._succeed(wish)
                return False
            wish.moved = Moved(plan.num_bytes(units), plan.num_descriptors(units))
            wish.transfer = self._port.write(wish.decoder.own, out_of, wish.decoder.theirs, into)
        except (KVTransferError, PortError) as error:
            self._fail(wish, str(error))
            return False
        return True

    def _poll(self, wish: _Wish) -> None:
        try:
            if not self._port.poll(wish.transfer):
                return
        except PortError as error:
            wish.error = wish.error or str(error)
        wish.transfer = None
        if wish.error is not None:
            self._fail(wish, wish.error)
        else:
            self._succeed(wish)

    def _succeed(self, wish: _Wish) -> None:
        response = MooncakeXferResponse(status=Status.FINISH, ok_reqs={wish.key[2]: wish.moved})
        self._end_wish(wish, response)

    def _fail(self, wish: _Wish, why: str) -> None:
        self._reports.count(failed_sends=1)
        logger.warning("Sending KV of transfer %s failed: %s", wish.wanted.transfer_id, why)
        self._end_wish(wish, _failure(wish.key[2], why))

    def _end_wish(self, wish: _Wish, response: MooncakeXferResponse) -> None:
        del self._wishes[wish.key]
        self._conclude(wish.key, wish.who, response)
        wanted = wish.wanted
        self._is_done(wish.key, wanted.transfer_id, wish.tp_size, wanted.num_readers)

    def _conclude(self, key: _Key, who: Any, response: MooncakeXferResponse) -> None:
        self._answered[key] = self._say(who, response)
        while len(self._answered) > _MOST_REMEMBERED:
            self._answered.popitem(last=False)

    # Blocks

    def _is_done(self, key: _Key, transfer_id: str, tp_size: int, num_readers: int) -> None:
        """A request of a rank of a decoder needs nothing more."""
        if transfer_id in self._over:
            return
        session, rank, request_id = key
        prefill = self._prefill_or_early(transfer_id)
        if prefill.session is None:
            self._claim(prefill, session, tp_size)
        if (prefill.session, prefill.tp_size) == (session, tp_size):
            prefill.done.setdefault(rank, set()).add(request_id)
            prefill.num_readers = max(prefill.num_readers, num_readers)
            self._end_if_done(transfer_id)

    def _prefill_or_early(self, transfer_id: str) -> _Prefill:
        """What is known of a transfer id, also if the scheduler has not told of it yet."""
        prefill = self._prefills.get(transfer_id) or self._early.get(transfer_id)
        if prefill is None:
            prefill = self._early[transfer_id] = _Prefill(float("inf"))
            while len(self._early) > _MOST_REMEMBERED:
                self._early.popitem(last=False)
        return prefill

    def _end_if_done(self, transfer_id: str) -> None:
        prefill = self._prefills.get(transfer_id)
        if prefill is None or prefill.offer is None or prefill.session is None:
            return
        try:
            consumers = self._topology(prefill.tp_size).consumers()
        except ConfigError:
            # Nobody of that kind has been let in: the lease ends it.
            return
        if all(len(prefill.done.get(rank, ())) >= prefill.num_readers for rank in consumers):
            self._forget(transfer_id, "it has been fetched already")

    def _forget(self, transfer_id: str, why: str) -> None:
        """A prefill is over: its blocks may go, and nothing of it is complete any more."""
        prefill = self._prefills.pop(transfer_id, None)
        self._over[transfer_id] = why
        while len(self._over) > _MOST_REMEMBERED:
            self._over.popitem(last=False)
        for wish in self._wishes.values():
            if wish.wanted.transfer_id == transfer_id and wish.transfer is not None:
                wish.error = wish.error or why
        if prefill is not None and prefill.offer is not None:
            self._reports.sent(prefill.offer.request_id)

    def _expire(self) -> None:
        now = self._clock()
        for transfer_id, prefill in list(self._prefills.items()):
            if now > prefill.deadline:
                self._reports.count(expired_leases=1)
                logger.warning(
                    "Nobody fetched the KV of transfer %s within its lease; its blocks are freed",
                    transfer_id,
                )
                self._forget(transfer_id, "its lease has expired")

    def close(self) -> None:
        """Give up what waits; nothing may be under way any more."""
        for transfer_id in list(self._prefills):
            self._forget(transfer_id, "the prefill engine has ended")
        while self._decoders:
            self._let_go(self._decoders.popitem()[1])


def _failure(request_id: str, why: str) -> MooncakeXferResponse:
    return MooncakeXferResponse(status=Status.ERROR, err_reqs=[request_id], err_msg=why)


def _difference(offer: Offer, wanted: Wanted) -> str | None:
    """Why an offer is not what is wanted."""
    if offer.num_tokens != wanted.num_tokens:
        return f"{wanted.num_tokens} tokens are asked for, the prefill has {offer.num_tokens}"
    if offer.digest != wanted.digest:
        return "the prefill was computed of other tokens than the decoder's prompt"
    return None
