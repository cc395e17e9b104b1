"""Questions and answers between workers: whoever listens is asked, and answers when it likes.

A channel belongs to one thread; only ``wake`` may be called from others. Messages are bytes and
may get lost with a connection, so whoever asks asks again. Knows nothing of what they mean.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import zmq

from vllm.errors import ConfigError

__all__ = ["Channel", "ZmqChannel"]

_LONGEST_MESSAGE = 64 << 20
_PROBE_SECONDS = 0.5
_KEPT_OPEN_SECONDS = 600.0


class Channel(ABC):
    """One worker's end."""

    address: str
    """Where this end can be asked; empty where it listens to nobody."""

    @abstractmethod
    def ask(self, address: str, message: bytes) -> bool:
        """Send a question; False where it cannot be sent now."""

    @abstractmethod
    def take_answers(self) -> list[tuple[str, bytes]]:
        """(address that was asked, answer) of what has arrived."""

    @abstractmethod
    def take_questions(self) -> list[tuple[Any, bytes]]:
        """(who asks, question) of what has arrived."""

    @abstractmethod
    def answer(self, who: Any, message: bytes) -> None:
        """Answer somebody; nothing happens if that one is gone."""

    @abstractmethod
    def is_gone(self, address: str) -> bool:
        """Whether the process at this address is known to have ended.

        A process that is frozen, or cannot be reached, is not gone.
        """

    @abstractmethod
    def wait(self, seconds: float) -> None:
        """Return when something has arrived, after ``wake``, or after this time."""

    @abstractmethod
    def wake(self) -> None:
        """End ``wait`` from another thread."""

    @abstractmethod
    def close(self) -> None: ...


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


class ZmqChannel(Channel):
    """A ROUTER on a port of its own if it listens, and a DEALER for each address that is asked.

    Args:
        host: where to listen, and nowhere else; None not to.

    Raises:
        ConfigError: the host is none of this machine's addresses.
    """

    def __init__(self, host: str | None) -> None:
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._dealers: dict[str, zmq.Socket[bytes]] = {}
        self._used: dict[str, float] = {}
        self._probes = ThreadPoolExecutor(2, thread_name_prefix="kv-probe")
        self._probing: dict[str, Future[bool]] = {}
        self._probed_at: dict[str, float] = {}
        self._gone: set[str] = set()
        self._router: zmq.Socket[bytes] | None = None
        self.address = ""
        if host is not None:
            self._listen(host)

    def _listen(self, host: str) -> None:
        router = self._socket(zmq.ROUTER)
        router.setsockopt(zmq.IPV6, int(":" in host))
        try:
            router.bind(f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*")
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(
                f"VLLM_HOST_IP {host} cannot be listened on: {error}; it must be an address of "
                "this machine",
                parameter="VLLM_HOST_IP",
                value=host,
            ) from None
        self.address = router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._poller.register(router, zmq.POLLIN)
        self._router = router

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        made = self._context.socket(kind)
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.MAXMSGSIZE, _LONGEST_MESSAGE)
        # A host that lost its power is noticed, if late: a probe is refused only by a live one.
        made.setsockopt(zmq.TCP_KEEPALIVE, 1)
        made.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 60)
        return made

    def ask(self, address: str, message: bytes) -> bool:
        self._gone.discard(address)
        dealer = self._dealers.get(address)
        if dealer is None:
            self._forget_unused()
            dealer = self._socket(zmq.DEALER)
            dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
            dealer.setsockopt(zmq.IPV6, int("[" in address))
            try:
                dealer.connect(address)
            except zmq.ZMQError:
                dealer.close(linger=0)
                return False
            self._dealers[address] = dealer
            self._poller.register(dealer, zmq.POLLIN)
        self._used[address] = time.monotonic()
        try:
            dealer.send(message, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def _forget_unused(self) -> None:
        limit = time.monotonic() - _KEPT_OPEN_SECONDS
        for address in [a for a, used in self._used.items() if used < limit]:
            dealer = self._dealers.pop(address)
            del self._used[address]
            self._probed_at.pop(address, None)
            self._poller.unregister(dealer)
            dealer.close(linger=0)

    def take_answers(self) -> list[tuple[str, bytes]]:
        found = []
        for address, dealer in self._dealers.items():
            with contextlib.suppress(zmq.ZMQError):
                while True:
                    found.append((address, dealer.recv(zmq.NOBLOCK)))
        return found

    def take_questions(self) -> list[tuple[Any, bytes]]:
        found: list[tuple[Any, bytes]] = []
        if self._router is None:
            return found
        with contextlib.suppress(zmq.ZMQError):
            while True:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
                found.append((frames[0], frames[-1]))
        return found

    def answer(self, who: Any, message: bytes) -> None:
        assert self._router is not None
        with contextlib.suppress(zmq.ZMQError):
            self._router.send_multipart([who, message], zmq.NOBLOCK)

    def is_gone(self, address: str) -> bool:
        """The kernel refuses a connection where no process listens any more."""
        if address in self._gone:
            return True
        probe = self._probing.get(address)
        if probe is None:
            now = time.monotonic()
            if now - self._probed_at.get(address, 0.0) > _PROBE_SECONDS:
                self._probed_at[address] = now
                self._probing[address] = self._probes.submit(_is_refused, address)
            return False
        if not probe.done():
            return False
        del self._probing[address]
        if probe.result():
            self._gone.add(address)
        return address in self._gone

    def wait(self, seconds: float) -> None:
        self._poller.poll(int(seconds * 1000))
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)

    def wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        self._probes.shutdown(wait=True, cancel_futures=True)
        self._context.destroy(linger=0)
        os.close(self._wake_fd)


def _is_refused(address: str) -> bool:
    try:
        socket.create_connection(_host_and_port(address), timeout=1).close()
    except OSError as error:
        return isinstance(error, ConnectionRefusedError)
    return False
