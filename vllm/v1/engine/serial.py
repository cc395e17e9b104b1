"""Messages between front end and engine core as bytes: msgpack, typed on arrival.

``LaunchConfig`` alone is pickled; it goes from parent to child through an inherited pipe.
"""

import os
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineFacts
from vllm.v1.engine.failures import EngineFailure

__all__ = [
    "UNENCODABLE",
    "EngineStatus",
    "LaunchConfig",
    "UtilityCall",
    "decode_call",
    "decode_ids",
    "decode_outputs",
    "decode_request",
    "encode",
    "read_status",
    "write_status",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """What an engine process is started with."""

    vllm_config: VllmConfig
    log_stats: bool
    output_addresses: list[str] = field(default_factory=list)
    """Where each front end listens, by client index."""


class UtilityCall(msgspec.Struct, array_like=True, gc=False):
    """A call of one of ``EngineCore``'s utilities; answered by ``UtilityOutput``."""

    client_index: int
    call_id: int
    method: str
    args: list[Any]


class EngineStatus(msgspec.Struct):
    """Sent once when the engine is ready, and once if it fails."""

    facts: EngineFacts | None = None
    failure: EngineFailure | None = None


encode = msgspec.msgpack.Encoder().encode
UNENCODABLE = (TypeError, ValueError, OverflowError, RecursionError)
"""What ``encode`` raises of: another type, a lone surrogate, more than 64 bits, too many levels."""
decode_request = msgspec.msgpack.Decoder(EngineCoreRequest).decode
decode_outputs = msgspec.msgpack.Decoder(EngineCoreOutputs).decode
decode_ids = msgspec.msgpack.Decoder(list[str]).decode
decode_call = msgspec.msgpack.Decoder(UtilityCall).decode
_decode_status = msgspec.msgpack.Decoder(EngineStatus).decode
_LENGTH_BYTES = 4


def write_status(fd: int, status: EngineStatus) -> None:
    """Write ``status`` to a pipe, its length in front."""
    payload = encode(status)
    os.write(fd, len(payload).to_bytes(_LENGTH_BYTES, "big") + payload)


def read_status(fd: int) -> EngineStatus | None:
    """The next status from a pipe; None at its end. Blocks until there is one."""
    header = _read_exactly(fd, _LENGTH_BYTES)
    if header is None:
        return None
    payload = _read_exactly(fd, int.from_bytes(header, "big"))
    return None if payload is None else _decode_status(payload)


def _read_exactly(fd: int, count: int) -> bytes | None:
    data = b""
    while len(data) < count:
        part = os.read(fd, count - len(data))
        if not part:
            return None
        data += part
    return data
