"""Prefill and decode servers as processes of their own, the router before them, real HTTP."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.entrypoints.server import SMALL, TINY, Server, free_port

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")),
    reason="needs nixl: pip install 'vllm[nixl]'",
)
KEY = "join me"
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "brew",
    "strange",
    "blue",
    "tea",
]


def prompt(index: int) -> str:
    return " ".join(WORDS[(index * 5 + i * (index + 3)) % len(WORDS)] for i in range(8 + 9 * index))


def transfer(role: str, **extra: object) -> list[str]:
    import json

    config = {
        "kv_connector": "NixlConnector",
        "kv_role": role,
        "kv_connector_extra_config": extra,
    }
    return ["--kv-transfer-config", json.dumps(config)]


class RouterProcess:
    def __init__(self, log: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "router"]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), "--health-interval", "0.2", *options],
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def wait(self, status: int = 200, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if self.http.get("/health").status_code == status:
                    return
            time.sleep(0.1)
        raise AssertionError(f"the router did not come to {status}")

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.wait(10)


class Cluster:
    """P servers, D servers, a plain one and a router."""

    def __init__(self, folder: Path, options: tuple[str, ...], num_prefill: int = 1) -> None:
        self.stack = contextlib.ExitStack()
        self.folder, self.options = folder, options
        self.plain = self._server("plain")
        self.prefill = [self.make("kv_producer", f"p{i}") for i in range(num_prefill)]
        self.decode = [self.make("kv_consumer", "d")]
        for server in (self.plain, *self.prefill, *self.decode):
            self.stack.enter_context(server)
        self.router = RouterProcess(
            folder / "router",
            "--admin-key",
            KEY,
            "--prefill",
            *[server.url for server in self.prefill],
            "--decode",
            *[server.url for server in self.decode],
        )
        self.stack.callback(self.router.close)
        self.router.wait()

    def _server(self, name: str, *more: str) -> Server:
        return Server(self.folder / name, *self.options, "--dtype", "float32", *more)

    def make(self, role: str, name: str, **extra: object) -> Server:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
            return self._server(name, *transfer(role, **extra))


def ask(url: str, text: str, count: int = 12, **more: object) -> str:
    body = {"model": "smollm2", "prompt": text, "max_tokens": count, "temperature": 0, **more}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("UCX_NET_DEVICES", "lo")
        made = Cluster(tmp_path_factory.mktemp("cluster"), (*SMALL, *TINY))
        with made.stack:
            yield made


def test_answers_are_those_of_one_server(cluster):
    before = cluster.decode[0].metric("vllm:kv_transfer_bytes_total")
    for index in range(6):
        assert ask(cluster.router.url, prompt(index)) == ask(cluster.plain.url, prompt(index))
    decoder, prefiller = cluster.decode[0], cluster.prefill[0]
    assert decoder.metric("vllm:kv_transfers_total") >= 6
    assert decoder.metric("vllm:kv_transfer_bytes_total") > before
    assert decoder.metric("vllm:kv_transfer_descriptors_total") > 0
    assert decoder.metric("vllm:kv_failed_transfers_total") == 0
    decoder.wait_until_idle()
    wait_for(lambda: prefiller.metric("vllm:kv_cache_usage_perc") == 0)


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_streams_and_chats_pass_through(cluster):
    messages = [{"role": "user", "content": prompt(2)}]
    body = {"model": "smollm2", "messages": messages, "max_tokens": 8, "temperature": 0}
    answers = [
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
        for url in (cluster.router.url, cluster.plain.url)
    ]
    assert answers[0]["message"]["content"] == answers[1]["message"]["content"]
    body = {"model": "smollm2", "prompt": prompt(3), "max_tokens": 5, "stream": True}
    with httpx.stream("POST", f"{cluster.router.url}/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]" and len(lines) > 3


def test_what_a_server_refuses_reaches_the_client(cluster):
    body = {"model": "smollm2", "prompt": "x", "max_tokens": -1}
    response = httpx.post(f"{cluster.router.url}/v1/completions", json=body)
    # The prefill asks for one token; the decoder sees what the client wrote.
    assert response.status_code == 400 and "max_tokens" in response.text
    response = httpx.post(f"{cluster.router.url}/v1/completions", content=b"not JSON")
    assert response.status_code == 400
    assert httpx.get(f"{cluster.router.url}/v1/models").json()["data"][0]["id"] == "smollm2"


def test_servers_join_and_leave_with_the_key_only(cluster):
    url = f"{cluster.router.url}/servers/prefill"
    assert httpx.post(url, json={"url": "http://127.0.0.1:1"}).status_code == 401
    key = {"authorization": f"Bearer {KEY}"}
    assert httpx.post(url, json={"url": "ftp://x"}, headers=key).status_code == 400
    joined = httpx.post(url, json={"url": "http://127.0.0.1:1"}, headers=key)
    assert joined.json() == {"url": "http://127.0.0.1:1", "healthy": False}
    assert ask(cluster.router.url, prompt(1)) == ask(cluster.plain.url, prompt(1))
    left = httpx.delete(url, params={"url": "http://127.0.0.1:1"}, headers=key)
    assert left.status_code == 200
    assert httpx.delete(url, params={"url": "http://no"}, headers=key).status_code == 404


def test_a_request_goes_to_another_prefill_server_when_one_dies(cluster, tmp_path):
    """The router does not know yet that the server is gone: its health is looked at later."""
    key = {"authorization": f"Bearer {KEY}"}
    with cluster.make("kv_producer", "doomed") as doomed:
        url = f"{cluster.router.url}/servers/prefill"
        assert httpx.post(url, json={"url": doomed.url}, headers=key).json()["healthy"]
        expected = [ask(cluster.plain.url, prompt(index)) for index in range(4)]
        os.killpg(doomed.process.pid, signal.SIGKILL)
        got = [ask(cluster.router.url, prompt(index)) for index in range(4)]
        httpx.delete(url, params={"url": doomed.url}, headers=key)
    assert got == expected


def test_a_prefill_that_died_after_its_answer_fails_one_request_only(cluster):
    with cluster.make("kv_producer", "gone") as gone:
        body = {
            "model": "smollm2",
            "prompt": prompt(4),
            "max_tokens": 1,
            "kv_transfer_params": {"do_remote_decode": True},
        }
        params = gone.post("/v1/completions", body).json()["kv_transfer_params"]
        os.killpg(gone.process.pid, signal.SIGKILL)
    decoder = cluster.decode[0]
    body |= {"max_tokens": 4, "kv_transfer_params": params}
    response = decoder.post("/v1/completions", body)
    assert response.status_code == 500 and "could not be loaded" in response.text
    began = time.monotonic()
    assert ask(cluster.router.url, prompt(4)) == ask(cluster.plain.url, prompt(4))
    assert time.monotonic() - began < 30
    wait_for(lambda: decoder.metric("vllm:kv_cache_usage_perc") == 0)
    response = decoder.post(
        "/v1/completions", body | {"kv_transfer_params": {"do_remote_prefill": 1}}
    )
    assert response.status_code == 400 and "kv_transfer_params" in response.text


@pytest.mark.slow
def test_smollm2_writes_the_same_100_answers(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_NET_DEVICES", "lo")
        made = Cluster(tmp_path, SMALL)
        with made.stack:
            for index in range(100):
                text = f"{index}. {prompt(index % 17)}"
                assert ask(made.router.url, text) == ask(made.plain.url, text), text
