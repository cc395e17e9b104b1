"""Messages by which two workers stage or push blocks: a question, answers, an introduction.

Each may be lost, come twice or in another order: whoever asks, asks again, and every message can
be taken twice. Checked here before anybody reads it.
"""

from __future__ import annotations

import msgspec
import numpy as np

__all__ = [
    "PREFIXES",
    "PULL_STAGED",
    "PUSH",
    "PUSH_STAGED",
    "STRANGER",
    "Ask",
    "Told",
    "UnitLists",
    "decode",
    "encode",
]

PULL_STAGED, PUSH_STAGED, PUSH = 0, 1, 2
STRANGER = "stranger"
"""The error of an answer to somebody who has not introduced himself, or is forgotten."""
_MOST = 1 << 20


class UnitLists(msgspec.Struct, array_like=True):
    """Units of one table: int32 blocks and int32 parts; the target's only where it is written."""

    source_blocks: bytes
    source_parts: bytes
    target_blocks: bytes = b""
    target_parts: bytes = b""

    def read(self, name: str) -> np.ndarray:
        """
        Raises:
            ValueError: not whole numbers.
        """
        return np.frombuffer(getattr(self, name), dtype=np.int32).astype(np.int64)


class Ask(msgspec.Struct, array_like=True):
    """A consumer to an owner: gather (and write) these units; also how far it has come."""

    job: int
    """Of the consumer's; the same in every repetition."""
    request_id: str
    generation: int
    way: int
    num_done: int
    """Chunks that have arrived: their slots may be used again."""
    grants: list[tuple[int, int]]
    """(chunk, slot) of the consumer's ring that the owner may write."""
    cancelled: bool
    units: list[UnitLists]


class Told(msgspec.Struct, array_like=True):
    """An owner to a consumer: a chunk lies in a slot, or nothing more will come of a job."""

    job: int
    chunk: int
    slot: int
    over: bool = False
    error: str = ""


PREFIXES = b"ASK:", b"TOLD:"
"""No other message begins so."""


def encode(letter: Ask | Told) -> bytes:
    return (b"ASK:" if isinstance(letter, Ask) else b"TOLD:") + msgspec.msgpack.encode(letter)


def decode(message: bytes) -> Ask | Told | None:
    """None: it is none of these, or not a proper one."""
    kind, _, body = message.partition(b":")
    letter: Ask | Told
    try:
        if kind == b"ASK":
            letter = msgspec.msgpack.decode(body, type=Ask)
            numbers = (letter.way, letter.num_done, letter.generation, len(letter.units))
            if min(numbers) < 0 or letter.way > PUSH:
                return None
            if any(not 0 <= n < _MOST for pair in letter.grants for n in pair):
                return None
        elif kind == b"TOLD":
            letter = msgspec.msgpack.decode(body, type=Told)
            if not (0 <= letter.chunk < _MOST and 0 <= letter.slot < _MOST):
                return None
        else:
            return None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return letter
