"""Handshakes over ZMQ: a ROUTER that gives out metadata, and the question to it.

Bound to the configured address only. Request and answer are msgpack; an answer to anything that is
not a proper request is an error string. Knows nothing of what the metadata means.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping

import msgspec
import zmq

from vllm.errors import ConfigError, KVTransferError
from vllm.logger import init_logger

__all__ = ["HandshakeServer", "ask_handshake"]

logger = init_logger(__name__)

_GET = "get_meta_msg"
_LONGEST_REQUEST = 4096
_LONGEST_ANSWER = 64 << 20


class _Answer(msgspec.Struct):
    payload: bytes | None
    error: str | None = None


def _url(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


class HandshakeServer:
    """Answers (``get_meta_msg``, pipeline rank, tensor rank) until ``close``.

    Raises:
        ConfigError: the address cannot be bound.
    """

    def __init__(self, host: str, port: int, payloads: Mapping[tuple[int, int], bytes]) -> None:
        self._payloads = dict(payloads)
        self.num_refused = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _LONGEST_REQUEST)
        if ":" in host:
            self._socket.setsockopt(zmq.IPV6, 1)
        address = "127.0.0.1" if host == "localhost" else host
        try:
            self._socket.bind(_url(address, port))
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(
                f"VLLM_NIXL_SIDE_CHANNEL_HOST {host} with VLLM_NIXL_SIDE_CHANNEL_PORT {port} "
                f"cannot be bound: {error}; each engine of a host needs a port of its own",
                parameter="VLLM_NIXL_SIDE_CHANNEL_PORT",
                value=port,
            ) from None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nixl-handshake", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        while not self._stopping.is_set():
            if not poller.poll(200):
                continue
            frames = self._socket.recv_multipart()
            answer = self._answer(frames[-1])
            with contextlib.suppress(zmq.ZMQError):
                self._socket.send_multipart([*frames[:-1], msgspec.msgpack.encode(answer)])
        self._socket.close(linger=0)

    def _answer(self, request: bytes) -> _Answer:
        try:
            what, pp_rank, tp_rank = msgspec.msgpack.decode(request, type=tuple[str, int, int])
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.num_refused += 1
            return _Answer(None, "not a handshake request")
        payload = self._payloads.get((pp_rank, tp_rank))
        if what != _GET or payload is None:
            self.num_refused += 1
            return _Answer(None, f"there is no {what!r} of rank ({pp_rank}, {tp_rank})")
        return _Answer(payload)

    def close(self) -> None:
        if not self._stopping.is_set():
            self._stopping.set()
            self._thread.join(timeout=5)
            self._context.destroy(linger=0)


def ask_handshake(host: str, port: int, tp_rank: int, timeout: float) -> bytes:
    """The payload of one rank of the engine at this address.

    Raises:
        KVTransferError: no answer in ``timeout`` seconds, or a refusal.
    """
    context = zmq.Context()
    try:
        socket = context.socket(zmq.REQ)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, _LONGEST_ANSWER)
        if ":" in host:
            socket.setsockopt(zmq.IPV6, 1)
        socket.connect(_url(host, port))
        socket.send(msgspec.msgpack.encode((_GET, 0, tp_rank)))
        if not socket.poll(int(timeout * 1000)):
            raise KVTransferError(f"no handshake from {host}:{port} within {timeout:g} s")
        answer = msgspec.msgpack.decode(socket.recv(), type=_Answer)
    except (zmq.ZMQError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise KVTransferError(f"the handshake with {host}:{port} failed: {error}") from error
    finally:
        context.destroy(linger=0)
    if answer.payload is None:
        raise KVTransferError(f"the handshake with {host}:{port} was refused: {answer.error}")
    return answer.payload
