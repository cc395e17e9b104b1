"""What the parts of a Mooncake connector tell each other: parameters, steps, and the wire.

A decoder's worker asks each prefill worker whose bytes it takes (``MooncakeXferMetadata``), names
its own blocks, and is answered once they have been written (``MooncakeXferResponse``). Everything
from outside is checked against these types before anybody reads it. Imports no torch.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.compatibility import Rank, RankCount
from vllm.errors import ConfigError, VLLMValidationError

__all__ = [
    "CONNECTOR_VERSION",
    "Discard",
    "Heartbeat",
    "MooncakeParams",
    "MooncakeSettings",
    "MooncakeStepMetadata",
    "MooncakeTimes",
    "MooncakeXferMetadata",
    "MooncakeXferResponse",
    "Moved",
    "Offer",
    "PeerLayout",
    "Question",
    "Receive",
    "Status",
    "Wanted",
    "Withdrawal",
    "checked_address",
    "decode_sealed",
    "parse_params",
    "parse_settings",
    "sealed",
]

CONNECTOR_VERSION = 1
PROTOCOLS = ("rdma", "tcp")
_LONGEST_ID = 512
_MOST_BLOCKS = 1 << 22
_MOST_READERS = 1 << 14


class MooncakeSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``kv_connector_extra_config``; times in seconds."""

    mooncake_protocol: str = "rdma"
    """``rdma``, or ``tcp`` where there is no such network."""
    device_name: str = ""
    """Network devices of the protocol, comma-separated; all where empty."""
    num_workers: int = 10
    """Requests that a rank writes at a time."""
    max_runs_in_flight: int = 64
    """Runs of bytes that Mooncake is given at a time."""
    bootstrap_server_address: str | None = None
    """Where the bootstrap server of this prefill engine listens: ``host:port``. By default
    VLLM_HOST_IP and VLLM_MOONCAKE_BOOTSTRAP_PORT."""
    enforce_handshake_compat: bool = True
    kv_lease_duration: float = 30.0
    """Once a decoder has said that it will fetch, blocks wait this long for its next word."""
    transfer_timeout: float = 60.0
    """A load that is written for longer fails (or is computed); its blocks stay until it has
    ended."""
    max_requests: int = 4096
    """Requests of decoders that a rank keeps waiting."""


def parse_settings(name: str, given: dict[str, Any]) -> MooncakeSettings:
    """
    Raises:
        ConfigError: an unknown field, or a value of the wrong type or range.
    """

    def refuse(message: str) -> ConfigError:
        return ConfigError(f"{name}: {message}", parameter="kv_connector_extra_config")

    try:
        settings = msgspec.convert(given, MooncakeSettings)
    except msgspec.ValidationError as error:
        raise refuse(f"kv_connector_extra_config: {error}") from None
    if settings.mooncake_protocol not in PROTOCOLS:
        raise refuse(
            f"mooncake_protocol must be one of {', '.join(PROTOCOLS)}, not "
            f"{settings.mooncake_protocol!r}"
        )
    for field_name in ("num_workers", "max_runs_in_flight", "max_requests"):
        if getattr(settings, field_name) < 1:
            raise refuse(f"{field_name} must be at least 1")
    for field_name in ("kv_lease_duration", "transfer_timeout"):
        if not getattr(settings, field_name) > 0:
            raise refuse(f"{field_name} must be more than 0 seconds")
    if settings.bootstrap_server_address is not None:
        split_host_port(name, settings.bootstrap_server_address)
    return settings


def split_host_port(name: str, address: str) -> tuple[str, int]:
    """Of ``host:port``, with or without ``http://``.

    Raises:
        ConfigError: it is no such thing.
    """
    host, _, port = address.removeprefix("http://").rstrip("/").rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"{name}: bootstrap_server_address {address!r} must be host:port",
            parameter="kv_connector_extra_config",
            value=address,
        )
    return host.strip("[]"), int(port)


@dataclass(frozen=True, slots=True, kw_only=True)
class MooncakeTimes:
    """Seconds, of the environment."""

    unclaimed: float
    """Blocks wait this long for a decoder to say that it will fetch them
    (VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT)."""
    silence: float
    """The other side is given up after this long without a word
    (VLLM_MOONCAKE_CONNECTOR_TIMEOUT)."""


class MooncakeParams(msgspec.Struct, kw_only=True):
    """``kv_transfer_params`` of a request; fields of others' are ignored."""

    do_remote_prefill: bool = False
    do_remote_decode: bool = False
    transfer_id: str | None = None
    """What a prefill request and its decode request have in common."""
    remote_bootstrap_addr: str | None = None
    remote_engine_id: str | None = None
    num_readers: int = 1
    """Requests here that fetch the same: children of one request for several answers."""


def parse_params(given: dict[str, Any] | None) -> MooncakeParams | None:
    """The parameters of one request; None where nothing is asked.

    Raises:
        VLLMValidationError: a field is missing, has the wrong type, or a value that cannot be.
    """
    if not given:
        return None
    try:
        params = msgspec.convert(given, MooncakeParams)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from None
    if not params.do_remote_prefill and not params.do_remote_decode:
        return None
    if params.do_remote_prefill and params.do_remote_decode:
        raise _refusal("do_remote_prefill and do_remote_decode exclude each other")
    needed = ["transfer_id"]
    if params.do_remote_prefill:
        needed += ["remote_bootstrap_addr", "remote_engine_id"]
    for name in needed:
        value = getattr(params, name)
        if value is None:
            what = "do_remote_prefill" if params.do_remote_prefill else "do_remote_decode"
            raise _refusal(f"{what} needs {name}")
        if not 0 < len(value) <= _LONGEST_ID or not value.isprintable():
            raise _refusal(f"{name} must have 1 to {_LONGEST_ID} printable characters")
    if not 1 <= params.num_readers <= _MOST_READERS:
        raise _refusal(f"num_readers must be 1 to {_MOST_READERS}")
    if params.do_remote_prefill:
        address = params.remote_bootstrap_addr or ""
        try:
            url = httpx.URL(address)
        except httpx.InvalidURL as error:
            raise _refusal(f"remote_bootstrap_addr {address!r} is no URL: {error}") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise _refusal(f"remote_bootstrap_addr must be http://host:port, not {address!r}")
        params.remote_bootstrap_addr = address.rstrip("/")
    return params


def _refusal(message: str) -> VLLMValidationError:
    return VLLMValidationError(f"kv_transfer_params: {message}", parameter="kv_transfer_params")


# Scheduler half to worker half


@dataclass(frozen=True, slots=True, kw_only=True)
class Receive:
    """A load: rows of the whole request, and which of its tokens to fetch."""

    request_id: str
    params: MooncakeParams
    block_ids: tuple[list[int], ...]
    first_token: int
    num_tokens: int
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A prefill that is done, and waits for its decoder."""

    transfer_id: str
    request_id: str
    block_ids: tuple[list[int], ...]
    num_tokens: int
    digest: bytes


@dataclass(slots=True)
class MooncakeStepMetadata(KVConnectorMetadata):
    receives: list[Receive] = field(default_factory=list)
    expected: dict[str, MooncakeParams] = field(default_factory=dict)
    """Requests that will fetch something once they are admitted."""
    unexpected: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    """Requests that have ended while something was being fetched for them."""
    declined: dict[str, MooncakeParams] = field(default_factory=dict)
    """Requests that will fetch nothing: the prefill may go."""
    announced: list[str] = field(default_factory=list)
    """Transfer ids of prefills that have begun."""
    offers: list[Offer] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    """Transfer ids of prefills that came to nothing, and why."""

    @property
    def says_something(self) -> bool:
        return any(
            (
                self.receives,
                self.expected,
                self.unexpected,
                self.cancelled,
                self.declined,
                self.announced,
                self.offers,
                self.dropped,
            )
        )


# Decoder to prefill worker


class PeerLayout(msgspec.Struct, kw_only=True):
    """What a prefill worker must know of a decoder's worker to write into its cache."""

    engine_id: str
    session: str
    """Differs after a restart, also under the same engine id."""
    tp_rank: Rank
    tp_size: RankCount
    agent: bytes
    """Of its transport port."""
    descriptor: str
    """``CacheDescriptor`` as JSON."""
    total_heads: dict[str, int | None]
    """Of each layer, KV heads of the whole model; None where it is not cut by head."""
    factors: dict[str, str]
    """What both engines must have in common."""
    compatibility_hash: str


class Wanted(msgspec.Struct, kw_only=True):
    transfer_id: str
    block_ids: list[list[int]]
    first_token: int
    num_tokens: int
    digest: bytes
    num_readers: int = 1
    """Requests of this decoder that fetch the same: the blocks wait for all of them."""

    def problem(self) -> str | None:
        """Why this cannot be meant."""
        if not 0 < len(self.transfer_id) <= _LONGEST_ID:
            return f"transfer_id must have 1 to {_LONGEST_ID} characters"
        if not 0 < len(self.block_ids) <= 64 or sum(map(len, self.block_ids)) > _MOST_BLOCKS:
            return f"block_ids must name 1 to 64 groups, {_MOST_BLOCKS} blocks in all"
        if not 0 <= self.first_token < self.num_tokens < 1 << 40:
            return "first_token and num_tokens contradict each other"
        if not 1 <= self.num_readers <= _MOST_READERS:
            return f"num_readers must be 1 to {_MOST_READERS}"
        return None


class MooncakeXferMetadata(msgspec.Struct, kw_only=True, tag="xfer"):
    """ "Write these blocks": asked again until it is answered."""

    remote_session: str
    remote_tp_rank: Rank
    remote_tp_size: RankCount
    req_blocks: dict[str, Wanted]
    """By the decoder's request id."""
    layout_id: str
    """Hash of the encoded ``PeerLayout``."""
    layout: bytes | None = None
    """That itself, where the other side does not have it yet."""


class Heartbeat(msgspec.Struct, kw_only=True, tag="heartbeat"):
    """These will be fetched."""

    remote_session: str
    remote_tp_size: RankCount
    transfer_ids: list[str]


class Withdrawal(msgspec.Struct, kw_only=True, tag="withdraw"):
    """These need not be written any more; answered once that is certain."""

    remote_session: str
    remote_tp_rank: Rank
    remote_tp_size: RankCount
    requests: dict[str, str]
    """Transfer ids by the decoder's request id."""
    num_readers: int = 1
    """As of ``Wanted``."""


class Discard(msgspec.Struct, kw_only=True, tag="discard"):
    """Nobody will fetch these; from the bootstrap server, and not answered."""

    transfer_ids: list[str]


Question = MooncakeXferMetadata | Heartbeat | Withdrawal | Discard


# Prefill worker to decoder


class Status(enum.IntEnum):
    FINISH = 0
    """What is in ``ok_reqs`` and ``err_reqs`` has ended: nothing more will be written for it."""
    CONTINUE = 1
    """It has been heard: what is in ``err_reqs`` is waiting, ``ok_reqs`` being written."""
    ERROR = 2
    """As FINISH, and ``err_msg`` says what went wrong with ``err_reqs``."""
    LAYOUT_MISS = 3
    """Ask again with the layout."""


class Moved(msgspec.Struct, array_like=True):
    num_bytes: int
    num_descriptors: int


class MooncakeXferResponse(msgspec.Struct, kw_only=True):
    status: Status
    ok_reqs: dict[str, Moved] = {}
    err_reqs: list[str] = []
    """With LAYOUT_MISS, those that were asked for."""
    err_msg: str | None = None


_SEAL = 16


def sealed(message: Any) -> bytes:
    """On the wire: a digest, then msgpack. A damaged block id would be a wrong write."""
    encoded = msgspec.msgpack.encode(message)
    return hashlib.blake2b(encoded, digest_size=_SEAL).digest() + encoded


def decode_sealed(message: bytes, kind: Any) -> Any:
    """A message of type ``kind``.

    Raises:
        ValueError: it is damaged, or no such message.
    """
    seal, encoded = message[:_SEAL], message[_SEAL:]
    if hashlib.blake2b(encoded, digest_size=_SEAL).digest() != seal:
        raise ValueError("its digest is wrong")
    try:
        return msgspec.msgpack.decode(encoded, type=kind)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from None


def checked_address(address: str) -> str:
    """A worker's ``tcp://host:port``.

    Raises:
        ValueError: it is none.
    """
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is no tcp://host:port")
    return address
