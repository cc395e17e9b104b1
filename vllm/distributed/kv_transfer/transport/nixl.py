"""The NIXL transport. Import cost is paid when a port is made; nothing of a peer is unpickled."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from vllm.distributed.kv_transfer.transport.port import PeerLostError, PortError, TransferPort
from vllm.errors import ConfigError

__all__ = ["NixlPort", "load_api"]

_PACKAGES = ("nixl", "nixl_cu13", "nixl_cu12")
_OWN = "NIXL_INIT_AGENT"
_THREADS = {
    "UCX": "num_threads",
    "OBJ": "num_threads",
    "LIBFABRIC": "num_threads",
    "GDS_MT": "thread_count",
    "UCCL": "num_cpus",
}
"""Each backend's name for the number of its threads."""
_SPLIT = 128
"""Descriptors that are worth a thread of their own."""


def load_api() -> Any:
    """The API module of whichever package is installed."""
    for package in _PACKAGES:
        with contextlib.suppress(ImportError):
            return import_module(f"{package}._api")
    raise ConfigError("this needs the package nixl: pip install nixl", parameter="kv_connector")


def _parameters(backend: str, num_threads: int) -> dict[str, str]:
    """Of a backend: how many threads share a transfer's descriptors."""
    name = _THREADS.get(backend)
    if not num_threads or name is None:
        return {}
    split = {"split_batch_size": str(_SPLIT)} if backend == "UCX" else {}
    return {name: str(num_threads), **split}


class NixlPort(TransferPort):
    """An agent of its own, without a progress thread: whoever owns the port polls it.

    Raises:
        ConfigError: NIXL is not installed, or has no such backend.
    """

    def __init__(self, name: str, backends: Sequence[str] = ("UCX",), num_threads: int = 0) -> None:
        self.name = name
        api = load_api()
        errors = import_module(api.__name__.replace("._api", "._bindings"))
        self._error: tuple[type[BaseException], ...] = tuple(
            value
            for key, value in vars(errors).items()
            if key.startswith("nixl") and key.endswith("Error") and isinstance(value, type)
        )
        self._lost: type[BaseException] = errors.nixlRemoteDisconnectError
        config = api.nixl_agent_config(enable_prog_thread=False, backends=[])
        with self._calling("making an agent"):
            self._agent = api.nixl_agent(name, config)
            missing = sorted(set(backends) - set(self._agent.get_plugin_list()))
            for backend in [] if missing else backends:
                self._agent.create_backend(backend, _parameters(backend, num_threads))
        if missing:
            raise ConfigError(
                f"NIXL has no backends {', '.join(missing)} here",
                parameter="kv_connector_extra_config",
                value=list(backends),
            )
        self._registered: list[Any] = []
        self._peers: set[str] = set()
        self._kind = "DRAM"
        self._device = 0
        self._places: dict[str, tuple[str, int]] = {}
        """Kind and device of peers' caches, where they differ from ours."""

    @contextlib.contextmanager
    def _calling(self, what: str) -> Any:
        try:
            yield
        except self._lost as error:
            raise PeerLostError(f"{what}: the peer is gone ({error})") from error
        except self._error as error:
            raise PortError(f"{what}: {type(error).__name__} {error}") from error

    def register(self, regions: Sequence[tuple[int, int]], device: str) -> None:
        name, _, index = device.partition(":")
        kind, number = ("VRAM", int(index or 0)) if name == "cuda" else ("DRAM", 0)
        if kind == "VRAM":
            self._kind, self._device = kind, number
        with self._calling("registering memory"):
            entries = [(address, size, number, "") for address, size in regions]
            self._registered.append(self._agent.register_memory(entries, kind))

    def metadata(self) -> bytes:
        with self._calling("agent metadata"):
            return self._agent.get_agent_metadata()

    def connect(self, metadata: bytes) -> str:
        with self._calling("adding the peer"):
            name = self._agent.add_remote_agent(metadata)
        decoded = name.decode() if isinstance(name, bytes) else str(name)
        self._peers.add(decoded)
        return decoded

    def disconnect(self, peer: str) -> None:
        if peer in self._peers:
            self._peers.discard(peer)
            with contextlib.suppress(PortError), self._calling("removing the peer"):
                self._agent.remove_remote_agent(peer)

    def prepare(self, peer: str | None, rows: np.ndarray, *, on_host: bool = False) -> Any:
        own = self._kind, self._device
        kind, device = ("DRAM", 0) if on_host else self._places.get(peer or "", own)
        table = np.empty((len(rows), 5), dtype=np.uint64)
        table[:, :2] = rows[:, :2]
        table[:, 2] = device
        table[:, 3:] = rows[:, 2:]
        with self._calling("preparing descriptors"):
            return self._agent.prep_xfer_dlist(_OWN if peer is None else peer, table, kind)

    def forget(self, prepared: Any) -> None:
        with contextlib.suppress(PortError), self._calling("releasing descriptors"):
            self._agent.release_dlist_handle(prepared)

    def read(self, local: Any, into: np.ndarray, remote: Any, out_of: np.ndarray) -> Any:
        return self._start("READ", local, into, remote, out_of)

    def write(self, local: Any, out_of: np.ndarray, remote: Any, into: np.ndarray) -> Any:
        return self._start("WRITE", local, out_of, remote, into)

    def _start(
        self, what: str, local: Any, own: np.ndarray, remote: Any, theirs: np.ndarray
    ) -> Any:
        with self._calling(what):
            handle = self._agent.make_prepped_xfer(what, local, own, remote, theirs, b"")
            self._agent.transfer(handle)
        return handle

    def poll(self, transfer: Any) -> bool:
        try:
            with self._calling("transfer"):
                state = self._agent.check_xfer_state(transfer)
        except PortError:
            self._release(transfer)
            raise
        if state == "PROC":
            return False
        self._release(transfer)
        if state != "DONE":
            raise PortError(f"the transfer ended as {state}")
        return True

    def _release(self, transfer: Any) -> None:
        with contextlib.suppress(PortError), self._calling("releasing a transfer"):
            self._agent.release_xfer_handle(transfer)

    def notify(self, peer: str, message: bytes) -> None:
        with self._calling("notification"):
            self._agent.send_notif(peer, message)

    def take_notifications(self) -> list[tuple[str, bytes]]:
        with self._calling("notifications"):
            arrived = self._agent.get_new_notifs()
        return [(peer, message) for peer, messages in arrived.items() for message in messages]

    def close(self) -> None:
        for peer in list(self._peers):
            self.disconnect(peer)
        for registered in self._registered:
            with contextlib.suppress(PortError), self._calling("giving up memory"):
                self._agent.deregister_memory(registered)
        self._registered.clear()
