"""Stands between a decoder and a port of a prefill server, and spoils messages.

That port takes handshakes (NIXL) or questions (Mooncake). Who asks has one socket where answers do
not say for whom they are.
"""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import msgspec
import zmq

__all__ = ["FAULTS", "SideChannelProxy"]

FAULTS = ("delay", "late", "lose request", "lose answer", "duplicate", "reorder", "garbage")


class SideChannelProxy:
    """A context manager; ``port`` is where decoders should ask instead.

    Args:
        target: the real port.
        fault: one of ``FAULTS``, or None to pass everything on.
        late: seconds that are too many for a handshake.
    """

    def __init__(self, target: int, fault: str | None, rng: random.Random, late: float) -> None:
        self._fault, self._rng, self._late = fault, rng, late
        self._context = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self.port = self._front.bind_to_random_port("tcp://127.0.0.1")
        self._back = self._context.socket(zmq.DEALER)
        self._back.connect(f"tcp://127.0.0.1:{target}")
        self._held: list[tuple[float, list[bytes]]] = []
        self._asker: list[bytes] = []
        self.num_spoiled = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> SideChannelProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stopping.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def be_honest(self) -> None:
        """Pass on everything from now."""
        self._fault = None

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        poller.register(self._back, zmq.POLLIN)
        while not self._stopping.is_set():
            ready = dict(poller.poll(10))
            if self._front in ready:
                self._request(self._front.recv_multipart())
            if self._back in ready:
                self._answer(self._back.recv_multipart())
            now = time.monotonic()
            due = [frames for when, frames in self._held if when <= now]
            self._held = [(when, frames) for when, frames in self._held if when > now]
            for frames in due:
                self._front.send_multipart(frames)

    def _request(self, frames: list[bytes]) -> None:
        self._asker = frames[:-1]
        if self._fault == "lose request":
            self.num_spoiled += 1
            return
        if self._fault == "garbage" and self._rng.random() < 0.3:
            self.num_spoiled += 1
            frames = [*frames[:-1], self._rng.randbytes(self._rng.randint(0, 200))]
        self._back.send_multipart(frames)
        if self._fault == "duplicate":
            self.num_spoiled += 1
            self._back.send_multipart(frames)

    def _answer(self, frames: list[bytes]) -> None:
        wait = 0.0
        if len(frames) == 1:
            frames = [*self._asker, *frames]
        if self._fault == "lose answer":
            self.num_spoiled += 1
            return
        if self._fault in ("delay", "late"):
            self.num_spoiled += 1
            wait = 0.3 if self._fault == "delay" else self._late
        elif self._fault == "reorder":
            # Those that come first go last.
            self.num_spoiled += 1
            wait = max(0.4 - 0.15 * len(self._held), 0.0)
        elif self._fault == "garbage":
            self.num_spoiled += 1
            frames = [*frames[:-1], self._spoil(frames[-1])]
        self._held.append((time.monotonic() + wait, frames))
        if self._fault == "duplicate":
            self._held.append((time.monotonic() + wait, frames))

    def _spoil(self, answer: bytes) -> bytes:
        rng = self._rng
        kind = rng.choice(("noise", "short", "bits", "types", "inside"))
        outer = _fields(answer)
        if kind == "noise":
            return rng.randbytes(rng.randint(0, 5000))
        if kind == "short":
            return answer[: rng.randrange(len(answer))]
        if kind == "types":
            payload = rng.choice([None, 5, "text", [answer], b"\xc1", b""])
            return msgspec.msgpack.encode({"payload": payload, "error": None})
        if kind == "inside" and outer.get("payload") is not None:
            inner = msgspec.msgpack.decode(outer["payload"])
            metadata = bytearray(inner["agent_metadata_bytes"])
            metadata[rng.randrange(len(metadata))] ^= 1 << rng.randrange(8)
            inner["agent_metadata_bytes"] = bytes(metadata)
            outer["payload"] = msgspec.msgpack.encode(inner)
            return msgspec.msgpack.encode(outer)
        spoilt = bytearray(answer)
        for _ in range(rng.randint(1, 8)):
            spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
        return bytes(spoilt)


def _fields(answer: bytes) -> dict[str, Any]:
    """Of a handshake; none of another answer."""
    try:
        found = msgspec.msgpack.decode(answer)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
