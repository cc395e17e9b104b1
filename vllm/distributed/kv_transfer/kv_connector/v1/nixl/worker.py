"""The worker half of NIXL connectors: one thread that owns the port, fetches, and keeps leases.

Owns the thread, its pace, and who gets which message. Knows the transport as ``TransferPort`` only.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.giving import Giver
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.leases import Leases
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.letters import (
    PREFIXES,
    Ask,
    Told,
    decode,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.loads import Loads
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import (
    NixlSettings,
    NixlStepMetadata,
    decode_payload,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.notices import Notices
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.peers import (
    AskHandshake,
    LocalSide,
    PeerBook,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.taking import Taker
from vllm.distributed.kv_transfer.kv_connector.v1.reports import Reports
from vllm.distributed.kv_transfer.staging import StagingRing
from vllm.distributed.kv_transfer.transport.port import PortError, TransferPort
from vllm.errors import KVTransferError
from vllm.logger import init_logger
from vllm.utils.system import wake_on_time

__all__ = ["TransferWorker"]

logger = init_logger(__name__)

_STAGING_WAIT = 0.00002
_RELEASE_WAIT = 0.0002
_LEASE_WAIT = 0.0003
"""Somebody may read at any time, and the transport answers small reads only when it is turned."""
_IDLE_WAIT = 0.005
_LONGEST_MESSAGE = 1 << 20
_HELLO = b"HELLO:"


class TransferWorker:
    """Runs until ``close``. ``submit`` and ``take_results`` are for the thread of the steps.

    Args:
        lease_table: int64 ``(max_leases,)`` that peers may read, and ``scratch`` int64 for
            reading those of others; both registered with the port.
        hello: this worker's encoded handshake, for owners that stage or push.
        ring: where blocks are gathered and scattered; None: they go by descriptors only.
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
        pushes: bool = False,
        threaded: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._port = port
        self._local = local
        self._settings = settings
        self._clock = clock

        def now() -> float:
            return self._clock()

        self._inbox: queue.SimpleQueue[NixlStepMetadata | None] = queue.SimpleQueue()
        self._reports = Reports()
        self._book = PeerBook(port, local, settings, ask, now)
        lasts = settings.push_registration_timeout if pushes else settings.kv_lease_duration
        self.leases = Leases(
            local, settings, lease_table, self._reports, now,
            seconds=lasts, has_ended=lambda request_id: self._giver.lease_has_ended(request_id),
        )  # fmt: skip
        self._giver = Giver(port, local, ring, self.leases.view)
        self._taker = Taker(port, ring, hello, now)
        self.notices = Notices(port, self._book, settings, self._reports, now, local.shard.tp_size)
        self.loads = Loads(
            port, self._book, self._taker, self.notices, settings, scratch, self._reports, now,
            device=local.device, pushes=pushes,
        )  # fmt: skip
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
        return self._reports.take_results()

    def register_callback(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called, by the transfer thread, when ``take_results`` has something."""
        self._reports.register_callback(callback)

    def set_scales(self, scales: dict[str, tuple[float, float]]) -> None:
        """Of layers with one scale a side: (K, V); before the first load."""
        self._book.scales = scales

    def take_stats(self) -> dict[str, float] | None:
        return self._reports.take_stats()

    @property
    def is_idle(self) -> bool:
        """Nothing is fetched, leased, gathered or scattered."""
        return not (self.loads or self.leases or self._giver.is_busy or self._taker.is_busy)

    def close(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join(timeout=5)
        self._book.close()
        self._port.close()

    # The thread

    def _run(self) -> None:
        wake_on_time()
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
            wait = self._wait()
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

    def _wait(self) -> float:
        """Seconds until the next turn."""
        wait = self.loads.wait()
        if wait is not None:
            return wait
        if self.notices.is_waiting:
            return _RELEASE_WAIT
        return _LEASE_WAIT if self.leases else _IDLE_WAIT

    def turn(self) -> None:
        """Do what can be done now, without waiting."""
        with contextlib.suppress(queue.Empty):
            while True:
                metadata = self._inbox.get_nowait()
                if metadata is None:
                    self._inbox.put(None)
                    break
                self._take(metadata)
        self.loads.begin_held()
        self.loads.settle_handshakes()
        self._hear()
        self._giver.turn()
        self._taker.turn()
        self.loads.advance()
        self.loads.give_up_late()
        self.notices.send_releases()
        self.notices.beat(self.loads.wanted)
        self.leases.expire()
        self._book.sweep(self.loads.engines)

    def _take(self, metadata: NixlStepMetadata) -> None:
        for request_id, start in metadata.leases.items():
            self.leases.add(request_id, start)
            self._giver.lease_is_there(request_id)
            self.leases.hear_early(request_id)
        for request_id in metadata.unexpected:
            self.notices.expect_no_more(request_id)
        for request_id, params in metadata.expected.items():
            if request_id not in metadata.unexpected:
                self.notices.expect(request_id, params)
        for params in metadata.releases:
            self.notices.release(params)
        for receive in metadata.receives:
            self.loads.add(receive, metadata.after)

    # What peers tell us

    def _hear(self) -> None:
        try:
            messages = self._port.take_notifications()
        except PortError as error:
            logger.warning("Notifications cannot be read: %s", error)
            return
        for sender, message in messages:
            if not self._understand(sender, message):
                self._reports.count(refused_notifications=1)

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
        if message.startswith(PREFIXES):
            return False
        try:
            text = message.decode()
        except UnicodeDecodeError:
            return False
        if text.startswith("HB:"):
            return self.leases.prolong(text[3:].split(","))
        request_id, _, size = text.rpartition(":")
        if not request_id or not size.isascii() or not size.isdigit() or len(size) > 4:
            return False
        return self.leases.consumer_is_done(sender, request_id, int(size))

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
