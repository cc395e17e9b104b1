"""Where Mooncake's tests run: in a network of their own, as it listens on every address it sees.

They are skipped where Mooncake cannot be used; with REQUIRE_MOONCAKE=1 (the gate) they fail there.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = "REQUIRE_MOONCAKE"
_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def missing() -> str | None:
    """Why Mooncake cannot be tested here; None if it can."""
    try:
        importlib.import_module("mooncake.engine")
    except ImportError as error:
        return (
            f"needs Mooncake ({error}): pip install 'vllm[mooncake-cpu]' and, on Debian, "
            "apt-get install libibverbs1 libnuma1 libcurl4"
        )
    if os.geteuid() != 0:
        return "Mooncake is tested in a network namespace of its own, which needs root"
    return None


def require_mooncake() -> None:
    """Skip the test where Mooncake cannot be used; where it must be there, fail instead."""
    reason = missing()
    if reason is None:
        return
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{REQUIRED}=1, but this {reason}")
    pytest.skip(reason)


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """This thread, and what it starts from now on, sees a loopback device and nothing else."""
    with open("/proc/thread-self/ns/net") as before:
        _checked(_LIBC.unshare(_CLONE_NEWNET))
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                request = struct.pack("16sh14x", b"lo", 0)
                answer = fcntl.ioctl(control, _SIOCGIFFLAGS, request)
                flags = struct.unpack("16sh14x", answer)[1] | _IFF_UP
                fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags))
            yield
        finally:
            _checked(_LIBC.setns(before.fileno(), _CLONE_NEWNET))
