"""The transport as connectors see it: registered memory, prepared lists, copies, notifications.

A port belongs to one thread. Lists are strided rows ``(address, length, stride, count)``; element
``i`` of a row is descriptor ``i`` plus the counts of the rows before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.transport.peer_process import PeerProcess

__all__ = ["CopyPort", "PeerLostError", "PortError", "TransferPort"]


class PortError(RuntimeError):
    """A transport refused or failed an operation."""


class PeerLostError(PortError):
    """The peer is gone; nothing of it will touch our memory any more."""


class CopyPort(ABC):
    """One agent that copies. Every method may raise ``PortError``."""

    name: str
    """Unique among all agents that will ever meet."""

    @abstractmethod
    def register(self, regions: Sequence[tuple[int, int]], device: str) -> None:
        """Let peers reach memory, given as (address, bytes), until ``close``."""

    @abstractmethod
    def metadata(self) -> bytes:
        """What a peer needs for ``connect``; after ``register``."""

    @abstractmethod
    def connect(self, metadata: bytes) -> str:
        """Know a peer by its metadata; returns its name."""

    @abstractmethod
    def disconnect(self, peer: str) -> None:
        """Forget a peer; its transfers are over."""

    @abstractmethod
    def prepare(self, peer: str | None, rows: np.ndarray, *, on_host: bool = False) -> Any:
        """A list of descriptors of ``peer``, or of our own where None; (rows, 4) int64.

        ``on_host``: of memory that was registered as the host's, beside a device's.
        """

    @abstractmethod
    def forget(self, prepared: Any) -> None:
        """Free a prepared list."""

    @abstractmethod
    def read(self, local: Any, into: np.ndarray, remote: Any, out_of: np.ndarray) -> Any:
        """Start copying descriptors ``out_of`` of a peer to descriptors ``into`` of ours."""

    @abstractmethod
    def write(self, local: Any, out_of: np.ndarray, remote: Any, into: np.ndarray) -> Any:
        """Start copying descriptors ``out_of`` of ours to descriptors ``into`` of a peer."""

    @abstractmethod
    def poll(self, transfer: Any) -> bool:
        """Whether a copy is complete.

        Raises:
            PortError: it has failed, and nothing more will be written.
        """

    def mapped(self, peer: str, address: int) -> int | None:
        """Where memory that a peer has registered can be read by a kernel here; None: nowhere."""
        return None

    def process(self, peer: str) -> PeerProcess | None:
        """A reader of a peer's host memory; None where it cannot be read from here."""
        return None

    @abstractmethod
    def close(self) -> None:
        """End all transfers and give up the memory."""


class TransferPort(CopyPort):
    """One that carries messages too."""

    @abstractmethod
    def notify(self, peer: str, message: bytes) -> None:
        """Send a message; delivery is not confirmed."""

    @abstractmethod
    def take_notifications(self) -> list[tuple[str, bytes]]:
        """(sender, message) of what has arrived."""
