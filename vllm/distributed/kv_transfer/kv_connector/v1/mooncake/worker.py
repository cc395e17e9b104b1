"""The worker half of MooncakeConnector: one thread that owns the port and the channel.

Runs the two sides, of which a rank has one or both: the sender of a prefill engine and the receiver
of a decode engine.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.messages import MooncakeStepMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.receiver import Receiver
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.sender import Sender
from vllm.distributed.kv_transfer.kv_connector.v1.reports import Reports
from vllm.distributed.kv_transfer.transport.channel import Channel
from vllm.distributed.kv_transfer.transport.port import CopyPort
from vllm.errors import KVTransferError

__all__ = ["MooncakeWorker"]

_WRITING_WAIT = 0.0005
_BUSY_WAIT = 0.05
_IDLE_WAIT = 0.5
_LAST_WRITES_SECONDS = 5.0


class MooncakeWorker:
    """Runs until ``close``. ``submit``, ``take_results`` and ``take_stats`` are for the steps.

    Args:
        threaded: False leaves it to the caller to call ``turn``.
    """

    def __init__(
        self,
        port: CopyPort,
        channel: Channel,
        sender: Sender | None,
        receiver: Receiver | None,
        reports: Reports,
        *,
        threaded: bool = True,
    ) -> None:
        self._port = port
        self._channel = channel
        self.sender = sender
        self.receiver = receiver
        self._reports = reports
        self._inbox: queue.SimpleQueue[MooncakeStepMetadata] = queue.SimpleQueue()
        self._stopping = False
        self._broken: Exception | None = None
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._run, name="kv-transfer", daemon=True)
            self._thread.start()

    # For the thread of the steps

    def submit(self, metadata: MooncakeStepMetadata) -> None:
        """What the scheduler half says of this step."""
        self._inbox.put(metadata)
        self._channel.wake()

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

    def take_stats(self) -> dict[str, float] | None:
        return self._reports.take_stats()

    def close(self) -> None:
        """End the thread; what is being written may still be completed."""
        if self._thread is not None:
            self._stopping = True
            self._channel.wake()
            self._thread.join(timeout=2 * _LAST_WRITES_SECONDS)
        if self.sender is not None:
            self.sender.close()
        if self.receiver is not None:
            self.receiver.close()
        self._port.close()
        # Last: while somebody listens here, decoders know that something may still be written.
        self._channel.close()

    # The thread

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:  # noqa: BLE001 - raised again in the thread of the steps
            self._broken = error

    def _loop(self) -> None:
        while not self._stopping:
            self._channel.wait(self._pause())
            self.turn()
        deadline = time.monotonic() + _LAST_WRITES_SECONDS
        while self.sender is not None and self.sender.is_busy and time.monotonic() < deadline:
            self._channel.wait(_WRITING_WAIT)
            self.turn()

    def _pause(self) -> float:
        """Seconds until there may be something to do that nobody tells us of."""
        if self.sender is not None and self.sender.is_busy:
            return _WRITING_WAIT
        waits = self.receiver is not None and self.receiver.is_busy
        if waits or (self.sender is not None and self.sender.is_waiting):
            return _BUSY_WAIT
        return _IDLE_WAIT

    def turn(self) -> None:
        """Do what can be done now, without waiting."""
        with contextlib.suppress(queue.Empty):
            while True:
                metadata = self._inbox.get_nowait()
                if self.sender is not None:
                    self.sender.take(metadata)
                if self.receiver is not None:
                    self.receiver.take(metadata)
        if self.sender is not None:
            self.sender.turn()
        if self.receiver is not None:
            self.receiver.turn()
