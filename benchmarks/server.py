"""Starts and stops ``vllm serve`` for the benchmarks, and measures what it takes."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import psutil


@dataclass(kw_only=True)
class Server:
    """A running server; ``ready_s`` is from the command's start to the first good /health."""

    url: str
    process: subprocess.Popen[bytes]
    ready_s: float

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def memory(self) -> dict[str, float]:
        """MB over all processes: ``rss`` as the kernel sums it, ``pss`` with shared pages once."""
        infos = [p.memory_full_info() for p in self.processes()]
        return {
            "rss_mb": round(sum(i.rss for i in infos) / 1e6, 1),
            "pss_mb": round(sum(i.pss for i in infos) / 1e6, 1),
        }


@contextlib.contextmanager
def serve(model: str, *flags: str, timeout: float = 300.0) -> Iterator[Server]:
    """Run ``vllm serve model`` on a free loopback port until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}: {command}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            if time.perf_counter() - start > timeout:
                raise TimeoutError(f"no answer from {url} after {timeout:.0f} s")
            time.sleep(0.02)
        yield Server(url=url, process=process, ready_s=time.perf_counter() - start)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
