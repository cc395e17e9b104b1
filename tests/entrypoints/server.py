"""A real server as a process: started, watched, ended."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

MODEL = "smollm2"
# Two layers of random weights: starts in a few seconds, and computes a token in no time.
TINY = ("--load-format", "dummy", "--hf-overrides", '{"num_hidden_layers": 2}')
SMALL = ("--max-model-len", "1024", "--kv-cache-memory-bytes", "128M")
# Waits end with what they wait for: a busy machine may take its time.
PATIENCE = 120.0
# A server closes connections that have idled for 5 s, maybe just when such a one is used again.
BRIEF = httpx.Limits(keepalive_expiry=1.0)
_START_SECONDS = 2 * PATIENCE


# Below the ports that Linux gives to outgoing connections, which would take one between its choice
# and its use, and above those that Mooncake takes by itself; spread by the operating system's
# randomness, as tests may run beside others.
_PORTS = range(18_000, 32_000)
_given: set[int] = set()


def _own_ports() -> range:
    """Those that no other process of the same run of tests chooses from."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    count = max(1, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    return _PORTS[int(worker) % count :: count]


def free_port() -> int:
    """A port that nobody listens on, and that this process has not been given before."""
    while True:
        port = random.SystemRandom().choice(_own_ports())
        with socket.socket() as sock:
            if port not in _given and sock.connect_ex(("127.0.0.1", port)):
                _given.add(port)
                return port


def serve_command(*options: str, model: str = MODEL) -> list[str]:
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *options]


class Server:
    """``vllm serve`` on a free port; a context manager that leaves nothing behind."""

    def __init__(
        self,
        log: Path,
        *options: str,
        model: str = MODEL,
        api_key: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=PATIENCE, limits=BRIEF
        )
        self._api_key = api_key or "none"
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                serve_command("--port", str(self.port), *options, model=model),
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                start_new_session=True,
            )
        self.tree = psutil.Process(self.process.pid)

    def __enter__(self) -> Server:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended while starting:\n{self.log()}")
            try:
                if httpx.get(f"{self.url}/health", timeout=_START_SECONDS).status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.1)
        self.process.kill()
        raise AssertionError(f"the server did not start:\n{self.log()}")

    def __exit__(self, *_: object) -> None:
        self._http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for_log(self, text: str) -> None:
        """Until the server has said so."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.log():
            assert time.monotonic() < deadline, f"{text!r} is not in the log:\n{self.log()}"
            time.sleep(0.02)

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self._api_key, max_retries=0)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self._api_key, max_retries=0)

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self._http.get(path, **kwargs)

    def post(self, path: str, json: object = None, **kwargs: Any) -> httpx.Response:
        return self._http.post(path, json=json, **kwargs)

    def metric(self, name: str) -> float:
        """The value of a metric, summed over its labels."""
        found = self._values(name)
        assert found, f"no metric {name}"
        return sum(found)

    def _values(self, name: str) -> list[float]:
        text = self.get("/metrics").text
        return [float(x) for x in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.M)]

    def wait_until_idle(self) -> None:
        """Until gauges are there, which one of several servers may be late to hear of, and 0."""
        deadline = time.monotonic() + PATIENCE
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        while time.monotonic() < deadline:
            if all(values and not sum(values) for values in map(self._values, names)):
                return
            time.sleep(0.05)
        raise AssertionError("requests are still running")

    def children(self) -> list[psutil.Process]:
        return self.tree.children(recursive=True)

    def engine(self) -> psutil.Process:
        """The engine's process."""
        (engine,) = [child for child in self.children() if "core_proc" in " ".join(child.cmdline())]
        return engine
