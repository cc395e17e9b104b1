"""Reads of another process's memory on the same host by one system call, without its help.

A transport answers a small read only when the peer turns its agent; this takes microseconds
whatever the peer does. A process is known by a nonce in its memory, which is read along: a number
that the kernel has given to another process since is noticed. Where the system call is not allowed
(another container or user, a hardened kernel) there is no such reader.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
from pathlib import Path
from typing import Annotated

import msgspec

from vllm.distributed.kv_transfer.transport.port import PeerLostError, PortError

__all__ = ["PeerProcess", "ProcessIdentity", "own_identity"]

_NONCE_BYTES = 16
_nonces: dict[int, ctypes.Array[ctypes.c_char]] = {}
"""Of this process, by its number: a forked one gets its own."""


class ProcessIdentity(msgspec.Struct, array_like=True, frozen=True):
    """What finds a process, and tells that it is still the same."""

    pid: Annotated[int, msgspec.Meta(ge=1, le=(1 << 31) - 1)]
    namespace: str
    """Of its process numbers."""
    nonce_address: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    nonce: Annotated[bytes, msgspec.Meta(min_length=_NONCE_BYTES, max_length=_NONCE_BYTES)]


def _namespace() -> str:
    link = Path("/proc/self/ns/pid")
    return os.readlink(link) if link.is_symlink() else ""


def own_identity() -> ProcessIdentity:
    """Of this process."""
    pid = os.getpid()
    if pid not in _nonces:
        _nonces[pid] = ctypes.create_string_buffer(secrets.token_bytes(_NONCE_BYTES), _NONCE_BYTES)
    nonce = _nonces[pid]
    return ProcessIdentity(pid, _namespace(), ctypes.addressof(nonce), nonce.raw)


class _Run(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = [("address", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class PeerProcess:
    """
    Raises:
        PortError: its memory cannot be read from here.
    """

    def __init__(self, identity: ProcessIdentity) -> None:
        self._identity = identity
        library = ctypes.CDLL(None, use_errno=True)
        if not hasattr(library, "process_vm_readv") or identity.namespace != _namespace():
            raise PortError("the memory of processes there cannot be read from here")
        self._call = library.process_vm_readv
        self._call.restype = ctypes.c_ssize_t
        self._word = ctypes.c_int64()
        self._nonce = ctypes.create_string_buffer(_NONCE_BYTES)
        # Made once; only the address of the word differs from call to call.
        self._theirs = (_Run * 2)(
            _Run(0, ctypes.sizeof(self._word)), _Run(identity.nonce_address, _NONCE_BYTES)
        )
        self._ours = (_Run * 2)(
            _Run(ctypes.addressof(self._word), ctypes.sizeof(self._word)),
            _Run(ctypes.addressof(self._nonce), _NONCE_BYTES),
        )
        self.read_word(identity.nonce_address)

    def read_word(self, address: int) -> int:
        """A signed number of 8 bytes; for one thread at a time.

        Raises:
            PeerLostError: the process is gone.
            PortError: there is no such memory.
        """
        self._theirs[0].address = address
        pid, two, none = self._identity.pid, ctypes.c_ulong(2), ctypes.c_ulong(0)
        size = self._call(pid, self._ours, two, self._theirs, two, none)
        whole = size == ctypes.sizeof(self._word) + _NONCE_BYTES
        same = self._nonce.raw == self._identity.nonce
        if whole and same:
            return self._word.value
        error = ctypes.get_errno() if size < 0 else errno.EFAULT
        if error == errno.ESRCH or (whole and not same):
            raise PeerLostError(f"process {pid} is gone")
        raise PortError(f"memory of process {pid} cannot be read: {os.strerror(error)}")
