"""Child processes that belong to one parent: how they start, and that they end with it.

A child is a fresh interpreter (as multiprocessing's spawn would start, without running the user's
``__main__`` again, so scripts need no guard). Owns nothing but these manners; what a child is for
is its entry point's.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

__all__ = [
    "adopt_child_manners",
    "child_command",
    "describe_end",
    "end_with_parent",
    "private_directory",
    "start_child",
]

# struct sockaddr_un holds 108 bytes; "/out" and a terminator must fit too.
_MAX_SOCKET_DIR = 96
_PARENT_POLL_SECONDS = 1.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def private_directory() -> str:
    """A new directory of this user's, short enough for the addresses of unix sockets."""
    path = tempfile.mkdtemp(prefix="vllm-")
    if len(path) > _MAX_SOCKET_DIR:
        os.rmdir(path)
        path = tempfile.mkdtemp(prefix="vllm-", dir="/tmp")
    return path


def child_command(entry: str) -> list[str]:
    """This interpreter, with its flags and its import path, running ``entry`` ("module:function").

    The path is handed over, not made anew: the child might find other modules than we did
    (in the current directory, say).
    """
    module, _, function = entry.partition(":")
    return [
        sys.executable,
        *subprocess._args_from_interpreter_flags(),  # type: ignore[attr-defined]
        "-P",
        "-c",
        "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
        f"from {module} import {function}; {function}()",
        json.dumps(sys.path),
    ]


def start_child(
    entry: str,
    arguments: Sequence[str],
    pass_fds: Sequence[int],
    env: dict[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start ``entry`` as a child, which is to call ``adopt_child_manners`` first of all."""
    # Blocked until the child has its handlers: a Ctrl-C now must not kill it half-way.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return subprocess.Popen(
            [*child_command(entry), *arguments],
            pass_fds=tuple(pass_fds),
            stdin=subprocess.DEVNULL,
            env=env,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def adopt_child_manners(name: str, fds: Sequence[int]) -> None:
    """First call of a child: be ``name`` in process lists, leave signals to the parent, and keep
    the descriptors that were handed over from children of its own.
    """

    # Handlers rather than SIG_IGN, which child processes would inherit.
    def ignore(signum: int, frame: object) -> None:
        """Ctrl-C and SIGTERM reach the whole process group; the parent decides what they mean."""

    for signum in _SIGNALS:
        signal.signal(signum, ignore)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as comm:
        comm.write(name)
    for fd in fds:
        os.set_inheritable(fd, False)


def end_with_parent(parent: int, directory: str | None = None) -> None:
    """End this process at once when ``parent`` does, however it ends, and remove ``directory``.

    A pidfd is used because PR_SET_PDEATHSIG fires when the *thread* that started us ends.
    """

    def end() -> None:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        os._exit(1)

    def wait() -> None:
        try:
            fd = os.pidfd_open(parent)
        except (OSError, AttributeError):
            while os.getppid() == parent:
                time.sleep(_PARENT_POLL_SECONDS)
            end()
            return
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        if os.getppid() == parent:
            poller.poll()
        end()

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


def describe_end(process: subprocess.Popen[bytes], timeout: float = 5) -> str:
    """How ``process`` has ended: "killed by SIGKILL", "exit code 1"."""
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return "still ending"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
