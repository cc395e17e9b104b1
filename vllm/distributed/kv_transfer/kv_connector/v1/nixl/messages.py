"""What the parts of a NIXL connector tell each other: request parameters, steps, handshakes.

Everything that comes from outside (a client's ``kv_transfer_params``, a peer's handshake) is
checked against these types before anybody reads it. Imports no torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.compatibility import (
    Rank,
    RankCount,
    check_factors,
    compatibility_hash,
)
from vllm.distributed.kv_transfer.kv_connector.v1.seals import seal
from vllm.errors import ConfigError, KVTransferError, VLLMValidationError

__all__ = [
    "CONNECTOR_VERSION",
    "AgentMetadata",
    "HandshakePayload",
    "LeaseStart",
    "NixlHandshakeMetadata",
    "NixlSettings",
    "NixlStepMetadata",
    "Receive",
    "RemoteParams",
    "compatibility_hash",
    "decode_payload",
    "encode_payload",
    "parse_params",
    "parse_settings",
]

CONNECTOR_VERSION = 3
PATHS = ("auto", "descriptors", "staging", "mapped")
_LONGEST_ID = 512
_MOST_BLOCKS = 1 << 22
_MOST_READERS = 1 << 14


class NixlSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``kv_connector_extra_config``; times in seconds."""

    backends: tuple[str, ...] = ("UCX",)
    num_threads: int = 4
    enforce_handshake_compat: bool = True
    kv_lease_duration: float = 30.0
    """Blocks of a prefill wait this long to be fetched; heartbeats prolong it by two thirds."""
    engine_ttl: float = 3600.0
    """An idle peer is forgotten after this."""
    handshake_timeout: float = 5.0
    transfer_timeout: float = 60.0
    """A load that takes longer fails (or is computed); its blocks stay until it has ended."""
    push_registration_timeout: float = 120.0
    """The same wait where a decoder announces blocks to be written (push)."""
    max_leases: int = 4096
    transfer_path: str = "auto"
    """How blocks cross: "descriptors", "staging", "mapped", or what the cost model finds best."""
    staging_slots: int | None = None
    """Of the ring that blocks are gathered into; 0 for none, None for what suits the device."""
    staging_slot_bytes: int | None = None
    """A power of two; by default what suits the device."""


def parse_settings(name: str, given: dict[str, Any]) -> NixlSettings:
    """
    Raises:
        ConfigError: an unknown field, or a value of the wrong type or range.
    """
    try:
        settings = msgspec.convert(given, NixlSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{name}: kv_connector_extra_config: {error}", parameter="kv_connector_extra_config"
        ) from None
    slots, size = settings.staging_slots, settings.staging_slot_bytes
    problem = None
    if settings.transfer_path not in PATHS:
        problem = f"transfer_path must be one of {', '.join(PATHS)}"
    elif slots is not None and (not 0 <= slots <= 4096 or slots == 1):
        problem = "staging_slots must be 0, or 2 to 4096"
    elif size is not None and (not 1 << 12 <= size <= 1 << 32 or size & (size - 1)):
        problem = "staging_slot_bytes must be a power of two from 4096 to 4294967296"
    elif settings.transfer_path == "staging" and slots == 0:
        problem = "transfer_path staging needs staging_slots"
    if problem is not None:
        raise ConfigError(f"{name}: {problem}", parameter="kv_connector_extra_config")
    for field_name in (
        "kv_lease_duration",
        "handshake_timeout",
        "transfer_timeout",
        "push_registration_timeout",
    ):
        if not getattr(settings, field_name) > 0:
            raise ConfigError(
                f"{name}: {field_name} must be more than 0 seconds",
                parameter="kv_connector_extra_config",
            )
    return settings


class RemoteParams(msgspec.Struct, kw_only=True):
    """``kv_transfer_params`` of a request; fields of others' are ignored."""

    do_remote_prefill: bool = False
    do_remote_decode: bool = False
    remote_engine_id: str | None = None
    remote_request_id: str | None = None
    remote_host: str | None = None
    remote_port: int | None = None
    remote_block_ids: list[list[int]] | None = None
    remote_num_tokens: int | None = None
    tp_size: int = 1
    pp_size: int = 1
    remote_session: str = ""
    """The run of the engine that made these parameters; another one does not have the blocks."""
    remote_lease_slot: int = 0
    remote_lease_generation: int = 0
    remote_seal: str = ""
    """Of all this, by the engine that says it."""
    num_readers: int = 1
    """Requests here that fetch the same: children of one request for several answers."""
    digest: bytes = b""
    """Of this engine's own prompt, as far as it is fetched: set by the scheduler, whatever came."""

    def sealed_by(self, secret: bytes) -> str:
        """The seal that these parameters should have."""
        return seal(
            secret,
            self.remote_request_id,
            self.remote_block_ids,
            self.remote_num_tokens,
            self.remote_lease_slot,
            self.remote_lease_generation,
            self.digest,
        )


def parse_params(given: dict[str, Any] | None) -> RemoteParams | None:
    """The parameters of one request; None where nothing is asked.

    Raises:
        VLLMValidationError: a field is missing, has the wrong type, or a value that cannot be.
    """
    if not given:
        return None
    try:
        params = msgspec.convert(given, RemoteParams)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None
    if not params.do_remote_prefill and not params.do_remote_decode:
        return None
    if params.do_remote_prefill and params.do_remote_decode:
        raise _refusal("do_remote_prefill and do_remote_decode exclude each other")
    if params.do_remote_decode:
        return params
    for name in (
        "remote_engine_id",
        "remote_request_id",
        "remote_host",
        "remote_port",
        "remote_block_ids",
        "remote_num_tokens",
    ):
        if getattr(params, name) is None:
            raise _refusal(f"do_remote_prefill needs {name}")
    for name in ("remote_engine_id", "remote_request_id", "remote_host"):
        if not 0 < len(getattr(params, name)) <= _LONGEST_ID:
            raise _refusal(f"{name} must have 1 to {_LONGEST_ID} characters")
    if not 0 < (params.remote_port or 0) < 65536:
        raise _refusal("remote_port must be 1 to 65535")
    if not 1 <= params.tp_size <= 1024 or params.pp_size != 1:
        raise _refusal("tp_size must be 1 to 1024, and pp_size 1")
    rows = params.remote_block_ids or []
    if not rows or sum(map(len, rows)) > _MOST_BLOCKS or len(rows) > 64:
        raise _refusal(f"remote_block_ids must name 1 to 64 groups, {_MOST_BLOCKS} blocks in all")
    if any(min(row) < 0 or max(row) >= 1 << 40 for row in rows if row):
        raise _refusal("remote_block_ids holds a number that is no block id")
    if not 0 < (params.remote_num_tokens or 0) < 1 << 40:
        raise _refusal("remote_num_tokens must be at least 1")
    if not 1 <= params.num_readers <= _MOST_READERS:
        raise _refusal(f"num_readers must be 1 to {_MOST_READERS}")
    if params.remote_lease_slot < 0 or params.remote_lease_generation < 0:
        raise _refusal("remote_lease_slot and remote_lease_generation cannot be negative")
    return params


def _refusal(message: str) -> VLLMValidationError:
    return VLLMValidationError(f"kv_transfer_params: {message}", parameter="kv_transfer_params")


@dataclass(frozen=True, slots=True, kw_only=True)
class Receive:
    """A load for the worker half: rows of the whole request, and which of its tokens to fetch."""

    request_id: str
    params: RemoteParams
    block_ids: tuple[list[int], ...]
    first_token: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseStart:
    slot: int
    block_ids: tuple[list[int], ...]
    """Of each group; nothing else is gathered or written for this request."""


@dataclass(slots=True)
class NixlStepMetadata(KVConnectorMetadata):
    receives: list[Receive] = field(default_factory=list)
    leases: dict[str, LeaseStart] = field(default_factory=dict)
    """Requests whose blocks wait to be fetched."""
    releases: list[RemoteParams] = field(default_factory=list)
    """Nothing will be fetched of these: let their blocks go."""
    expected: dict[str, RemoteParams] = field(default_factory=dict)
    """Requests that will fetch something once they are admitted: keep their leases alive."""
    unexpected: list[str] = field(default_factory=list)
    after: Any = None
    """A ``torch.cuda.Event``: blocks may still be written by the device until then."""

    @property
    def says_something(self) -> bool:
        return bool(
            self.receives or self.leases or self.releases or self.expected or self.unexpected
        )


class AgentMetadata(msgspec.Struct, kw_only=True):
    """What a worker tells peers of itself; meaningless unless the compatibility hash agrees."""

    engine_id: str
    session: str
    """Differs after a restart, also under the same engine id."""
    tp_rank: Rank
    tp_size: RankCount
    agent: bytes
    descriptor: str
    """``CacheDescriptor`` as JSON."""
    total_heads: dict[str, int | None]
    """Of each layer, KV heads of the whole model; None where it is not cut by head."""
    lease_table: int
    """Address of the int64 generation numbers of leases."""
    num_leases: int
    lease_seconds: float
    number_format: str = ""
    """``conversion.format_name`` of the cache."""
    ring: dict[str, int | bool] | None = None
    """Fields of ``staging.RingShape``."""
    registers_blocks: bool = True
    """False: only the ring can be reached (kv_buffer_device "cpu")."""
    secret: bytes = b""
    """By which this engine seals what it answers; told to those who fetch from it."""


class HandshakePayload(msgspec.Struct, kw_only=True):
    compatibility_hash: str
    factors: dict[str, str]
    """What was hashed, to say what differs."""
    agent_metadata_bytes: bytes
    digest: bytes
    """SHA-256 of the metadata: a damaged address would be a wrong read that nobody notices."""


@dataclass(slots=True)
class NixlHandshakeMetadata(KVConnectorHandshakeMetadata):
    payload: bytes
    """An encoded ``HandshakePayload``."""


def encode_payload(factors: dict[str, str], metadata: AgentMetadata) -> bytes:
    """The answer to a handshake."""
    encoded = msgspec.msgpack.encode(metadata)
    payload = HandshakePayload(
        compatibility_hash=compatibility_hash(factors),
        factors=factors,
        agent_metadata_bytes=encoded,
        digest=hashlib.sha256(encoded).digest(),
    )
    return msgspec.msgpack.encode(payload)


def decode_payload(encoded: bytes, factors: dict[str, str] | None) -> AgentMetadata:
    """What a peer says of itself, if it can exchange blocks with an engine of ``factors``.

    Args:
        factors: None believes that it can.

    Raises:
        KVTransferError: it cannot, or this is no such answer, or a damaged one.
    """
    try:
        payload = msgspec.msgpack.decode(encoded, type=HandshakePayload)
        if factors is not None:
            check_factors(factors, payload.factors, payload.compatibility_hash)
        if hashlib.sha256(payload.agent_metadata_bytes).digest() != payload.digest:
            raise KVTransferError("the handshake was damaged on the way: its digest differs")
        return msgspec.msgpack.decode(payload.agent_metadata_bytes, type=AgentMetadata)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise KVTransferError(f"the handshake is malformed: {error}") from error
