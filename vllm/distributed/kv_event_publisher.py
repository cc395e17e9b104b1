"""Sends KV events over ZMQ as vLLM does, from a thread of its own.

Three frames a batch: topic, sequence number (8 bytes, big endian), msgpack payload. A subscriber
that finds a gap in the numbers asks the replay endpoint for what it missed. Knows nothing of the
scheduler.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import deque
from typing import Any, Protocol

import msgspec
import zmq

from vllm.config.misc import KVEventsConfig
from vllm.distributed.kv_events import KVEventBatch
from vllm.errors import ConfigError
from vllm.logger import init_logger, log_once

__all__ = ["END_OF_REPLAY", "EventPublisher", "NullEventPublisher", "ZmqEventPublisher"]

logger = init_logger(__name__)

END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
"""Sequence number of the message that ends the answer to a replay request."""
_POLL_MS = 100


class EventPublisher(Protocol):
    def publish(self, batch: KVEventBatch) -> None: ...

    def shutdown(self) -> None: ...


class NullEventPublisher:
    """Publisher "null": events go nowhere."""

    def publish(self, batch: KVEventBatch) -> None: ...

    def shutdown(self) -> None: ...


class ZmqEventPublisher:
    """Publisher "zmq": a PUB socket, and a ROUTER for replays where ``replay_endpoint`` is set.

    A batch that finds the queue full is dropped, and its number is left out, so that subscribers
    see that something is missing.

    Raises:
        ConfigError: an endpoint cannot be bound.
    """

    def __init__(self, config: KVEventsConfig) -> None:
        self._topic = config.topic.encode()
        self._queue: queue.Queue[tuple[int, KVEventBatch]] = queue.Queue(config.max_queue_size)
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._next = 0
        self._stopping = threading.Event()
        self._context = zmq.Context()
        self._pub = self._bind(zmq.PUB, config.endpoint, "endpoint", config.hwm)
        self._wake = self._context.socket(zmq.PAIR)
        self._wake.bind("inproc://wake")
        self._woken = self._context.socket(zmq.PAIR)
        self._woken.connect("inproc://wake")
        self._replay = (
            self._bind(zmq.ROUTER, config.replay_endpoint, "replay_endpoint")
            if config.replay_endpoint
            else None
        )
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def _bind(
        self, kind: int, endpoint: str, option: str, hwm: int | None = None
    ) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        if hwm is not None:
            socket.set_hwm(hwm)
        socket.setsockopt(zmq.LINGER, 1000)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(
                f"--kv-events-config.{option} {endpoint} cannot be bound: {error}",
                parameter="kv_events_config",
                value=endpoint,
            ) from None
        return socket

    def publish(self, batch: KVEventBatch) -> None:
        """Queue a batch; never blocks. To be called from one thread."""
        number, self._next = self._next, self._next + 1
        try:
            self._queue.put_nowait((number, batch))
        except queue.Full:
            message = "KV events are dropped: publishing is slower than the engine"
            log_once(logger, logging.WARNING, message)
            return
        self._wake_up()

    def _wake_up(self) -> None:
        # A full pipe means that the thread has enough to wake up to.
        with contextlib.suppress(zmq.Again):
            self._wake.send(b"", zmq.NOBLOCK)

    def shutdown(self) -> None:
        """Send what is queued, then close."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._wake_up()
        self._thread.join(timeout=5)
        self._wake.close(linger=0)
        self._context.destroy(linger=1000)

    def _run(self) -> None:
        encoder = msgspec.msgpack.Encoder()
        poller = zmq.Poller()
        poller.register(self._woken, zmq.POLLIN)
        if self._replay is not None:
            poller.register(self._replay, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(_POLL_MS))
            if self._woken in ready:
                self._woken.recv()
            while not self._queue.empty():
                number, batch = self._queue.get_nowait()
                payload = encoder.encode(batch)
                self._kept.append((number, payload))
                self._pub.send_multipart((self._topic, number.to_bytes(8, "big"), payload))
            if self._replay is not None and self._replay in ready:
                self._answer_replay(self._replay)
            if self._stopping.is_set():
                self._woken.close(linger=0)
                return

    def _answer_replay(self, replay: zmq.Socket[bytes]) -> None:
        frames = replay.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            logger.warning("A replay request of KV events is malformed and was left unanswered")
            return
        client, _, start = frames
        first = int.from_bytes(start, "big")
        for number, payload in self._kept:
            if number >= first:
                replay.send_multipart(
                    (client, b"", self._topic, number.to_bytes(8, "big"), payload)
                )
        replay.send_multipart((client, b"", self._topic, END_OF_REPLAY, b""))


def make_publisher(config: KVEventsConfig | None) -> Any:
    """The configured ``EventPublisher``."""
    if config is None or not config.enable_kv_cache_events or config.publisher == "null":
        return NullEventPublisher()
    return ZmqEventPublisher(config)
