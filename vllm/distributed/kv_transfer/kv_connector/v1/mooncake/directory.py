"""Which prefill engines there are, and where their workers are asked: by bootstrap address.

Bootstrap servers are asked in threads of their own; the transfer thread only looks at what is
known. Everything they say is checked.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import msgspec

from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.messages import checked_address
from vllm.errors import KVTransferError

__all__ = [
    "Directory",
    "Engine",
    "EngineEntry",
    "ask_bootstrap",
    "engines_of",
    "read_entries",
]

_LONGEST_ANSWER = 1 << 20
_ASK_SECONDS = 5.0
_KNOWN_SECONDS = 3600.0
_UNKNOWN_SECONDS = 0.5
_MOST_KNOWN = 1024
_MOST_RANKS = 1024


class EngineEntry(msgspec.Struct, kw_only=True):
    """One data-parallel rank of a prefill engine, as its bootstrap server knows it."""

    engine_id: str
    worker_addr: dict[int, dict[int, str]]
    """Addresses by tensor-parallel and pipeline-parallel rank."""
    tp_size: int | None = None
    """How many ranks there will be once all have registered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A prefill engine; ``addresses`` by tensor-parallel rank."""

    engine_id: str
    addresses: tuple[str, ...]


def ask_bootstrap(address: str) -> dict[int, EngineEntry]:
    """What the bootstrap server at ``http://host:port`` knows, by data-parallel rank.

    Raises:
        KVTransferError: it does not answer, or not properly.
    """
    try:
        with (
            httpx.Client(timeout=_ASK_SECONDS, trust_env=False) as client,
            client.stream("GET", f"{address}/query") as response,
        ):
            response.raise_for_status()
            body = b""
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > _LONGEST_ANSWER:
                    raise KVTransferError(f"the bootstrap server {address} answers too much")
        return read_entries(address, body)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
        raise KVTransferError(f"the bootstrap server {address} failed: {error!r}") from error


def read_entries(address: str, body: bytes) -> dict[int, EngineEntry]:
    """What a bootstrap server has answered.

    Raises:
        KVTransferError: it is no such answer.
    """
    try:
        return msgspec.json.decode(body, type=dict[int, EngineEntry])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise KVTransferError(f"{address}/query is malformed: {error}") from error


def engines_of(address: str, entries: dict[int, EngineEntry]) -> dict[str, Engine]:
    """By engine id, those that are complete.

    Raises:
        KVTransferError: an engine of several pipeline stages, or no address where one should be.
    """
    found = {}
    for entry in entries.values():
        size = len(entry.worker_addr) if entry.tp_size is None else entry.tp_size
        if not 0 <= size <= _MOST_RANKS:
            raise KVTransferError(f"{address}/query names an engine of {size} ranks")
        if sorted(entry.worker_addr) != list(range(size)):
            continue
        if any(list(stages) != [0] for stages in entry.worker_addr.values()):
            raise KVTransferError(
                f"engine {entry.engine_id} of {address} has several pipeline stages: it must run "
                "with --pipeline-parallel-size 1"
            )
        try:
            addresses = tuple(checked_address(entry.worker_addr[r][0]) for r in range(size))
        except ValueError as error:
            raise KVTransferError(f"{address}/query: {error}") from None
        found[entry.engine_id] = Engine(engine_id=entry.engine_id, addresses=addresses)
    return found


class Directory:
    """Of one worker; ``find`` is for the transfer thread.

    Args:
        ask: ``ask_bootstrap``, or the like.
    """

    def __init__(
        self,
        ask: Callable[[str], dict[int, EngineEntry]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="mooncake-ask")
        self._asking: dict[str, Future[dict[str, Engine]]] = {}
        self._known: OrderedDict[str, tuple[float, dict[str, Engine] | KVTransferError]]
        self._known = OrderedDict()

    def find(self, address: str, engine_id: str) -> Engine | None:
        """An engine of the bootstrap server at ``address``; None until that has answered.

        Raises:
            KVTransferError: the server has no such engine, or cannot be asked.
        """
        future = self._asking.get(address)
        if future is not None:
            if not future.done():
                return None
            del self._asking[address]
            try:
                self._known[address] = self._clock(), future.result()
            except KVTransferError as error:
                self._known[address] = self._clock(), error
            while len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)
        asked_at, answer = self._known.get(address, (0.0, None))
        age = self._clock() - asked_at
        if isinstance(answer, dict) and engine_id in answer and age < _KNOWN_SECONDS:
            return answer[engine_id]
        if answer is None or age > _UNKNOWN_SECONDS:
            self._asking[address] = self._pool.submit(self._look, address)
            return None
        if isinstance(answer, KVTransferError):
            raise answer
        raise KVTransferError(
            f"the bootstrap server {address} knows no engine {engine_id!r}"
            + (f", only {', '.join(sorted(answer))}"[:500] if answer else "")
        )

    def _look(self, address: str) -> dict[str, Engine]:
        return engines_of(address, self._ask(address))

    def forget(self, address: str) -> None:
        """What is known of this server is out of date."""
        self._known.pop(address, None)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
