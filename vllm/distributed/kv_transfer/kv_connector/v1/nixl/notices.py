"""What a decode engine tells the owners of blocks: heartbeats, and that it reads no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.messages import NixlSettings, RemoteParams
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.peers import PeerBook
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.readers import Readers
from vllm.distributed.kv_transfer.kv_connector.v1.reports import Reports
from vllm.distributed.kv_transfer.transport.port import PeerLostError, PortError, TransferPort
from vllm.logger import init_logger

__all__ = ["Notices"]

logger = init_logger(__name__)

_HEARTBEATS_A_LEASE = 6


class Notices:
    """
    Args:
        tp_size: of this engine; owners count its ranks' messages.
    """

    def __init__(
        self,
        port: TransferPort,
        book: PeerBook,
        settings: NixlSettings,
        reports: Reports,
        clock: Callable[[], float],
        tp_size: int,
    ) -> None:
        self._port = port
        self._book = book
        self._settings = settings
        self._reports = reports
        self._clock = clock
        self._tp_size = tp_size
        self._releases: list[tuple[float, RemoteParams]] = []
        self._readers = Readers()
        self._expected: dict[str, RemoteParams] = {}

    @property
    def expected(self) -> set[str]:
        """Requests whose leases are kept alive until they are fetched."""
        return set(self._expected)

    @property
    def is_waiting(self) -> bool:
        """There is something to say."""
        return bool(self._releases)

    def expect(self, request_id: str, params: RemoteParams) -> None:
        """Keep this request's lease alive until it is fetched."""
        self._expected[request_id] = params
        if params.remote_engine_id not in self._book.peers:
            self._book.ask_for(params)

    def expect_no_more(self, request_id: str) -> None:
        self._expected.pop(request_id, None)

    def release(self, params: RemoteParams) -> None:
        """A request here needs the owner's blocks no more; the last one's tells the owner."""
        if self._readers.is_last(params):
            self._releases.append((self._clock() + self._settings.handshake_timeout, params))

    def forget(self, engine_id: str) -> None:
        """An engine that cannot be reached is told nothing."""
        self._releases = [
            (deadline, params)
            for deadline, params in self._releases
            if params.remote_engine_id != engine_id
        ]

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
                self._reports.count(failed_notifications=1)
                logger.debug("Notification to %s failed: %s", rank.agent, error)
                if isinstance(error, PeerLostError):
                    self._book.retire(params.remote_engine_id)
                    break
        return True

    def send_releases(self) -> None:
        """Done messages; one that cannot be sent in time is left to the peer's lease."""
        now, left = self._clock(), []
        for deadline, params in self._releases:
            peer = self._book.peers.get(str(params.remote_engine_id))
            if peer is not None and not peer.believes(params):
                # Whoever has made them up must not end the leases of others.
                continue
            if self._notify(params, f"{params.remote_request_id}:{self._tp_size}"):
                continue
            if now < deadline:
                if params.remote_engine_id is not None:
                    self._book.ask_for(params)
                left.append((deadline, params))
        self._releases = left

    def beat(self, wanted: Iterable[RemoteParams]) -> None:
        """Prolong the leases of what is expected, and of ``wanted``, which is being fetched."""
        now = self._clock()
        by_engine: dict[str, list[RemoteParams]] = {}
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
