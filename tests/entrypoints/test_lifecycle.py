"""How a server starts, fills up, loses clients, drains and ends."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.entrypoints.server import MODEL, PATIENCE, SMALL, TINY, Server, serve_command
from tests.models.checkpoints import make_hf_model, save
from vllm.entrypoints.openai.api_server import StartupStop

KEY = "sesame"
LONG = {"model": MODEL, "prompt": "Once", "max_tokens": 1000, "extra_body": {"ignore_eos": True}}
# More tokens than are drawn before the test goes on, however late it does.
PATIENT = ("--max-model-len", "8000", "--kv-cache-memory-bytes", "512M")
ENDLESS = {**LONG, "max_tokens": 7900}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One request at a time, 64 may wait, and a key is needed."""
    log = tmp_path_factory.mktemp("guarded") / "log"
    options = (
        *TINY,
        *PATIENT,
        "--served-model-name",
        MODEL,
        "alias",
        "--max-num-seqs",
        "1",
        "--max-num-queued-reqs",
        "64",
        "--scheduling-policy",
        "priority",
        "--api-key",
        KEY,
        "another",
        "--root-path",
        "/proxied",
        "--enable-server-load-tracking",
        "--disable-fastapi-docs",
        "--response-role",
        "helper",
        "--enable-force-include-usage",
        "--trust-request-chat-template",
        "--disable-access-log-for-endpoints",
        "/health,/metrics",
        "--enable-log-requests",
        "--enable-log-outputs",
        "--max-log-len",
        "20",
    )
    with Server(log, *options, api_key=KEY) as server:
        yield server


def all_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE)
    return not alive


# Keys and options


def test_a_key_is_needed(guarded: Server):
    def status(path: str, key: str | None) -> int:
        headers = {} if key is None else {"authorization": key}
        return httpx.get(guarded.url + path, headers=headers, timeout=PATIENCE).status_code

    assert status("/v1/models", None) == 401
    assert status("/v1/models", "Bearer wrong") == 401
    assert status("/v1/models", f"Basic {KEY}") == 401
    assert status("/v1/models", f"Bearer {KEY}") == 200
    assert status("/v1/models", "bearer another") == 200
    assert status("/tokenize", None) == 401
    for path in ("/health", "/ping", "/version", "/load", "/metrics"):
        assert status(path, None) == 200
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="no", max_retries=0).models.list()


def test_options_of_the_front_end_work(guarded: Server):
    assert [card.id for card in guarded.client.models.list()] == [MODEL, "alias"]
    answer = guarded.post("/v1/completions", {"model": "alias", "prompt": "Hi", "max_tokens": 1})
    assert answer.json()["model"] == "alias"
    assert guarded.get("/docs").status_code == 404
    assert guarded.get("/proxied/v1/models").status_code == 200
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "stream": True}
    text = guarded.post("/v1/chat/completions", body).text
    assert '"role":"helper"' in text
    assert '"usage":{"prompt_tokens"' in text
    template = {**body, "stream": False, "chat_template": "{{ messages[0].content.upper() }}"}
    answer = guarded.post("/v1/chat/completions", {**template, "return_prompt_text": True})
    assert answer.json()["prompt_text"] == "HI"
    broken = {**template, "chat_template": "{{ raise_exception('no such chat') }}"}
    answer = guarded.post("/v1/chat/completions", broken)
    assert answer.status_code == 400
    assert "no such chat" in answer.json()["error"]["message"]
    broken = {**template, "chat_template": "{% if %}"}
    assert guarded.post("/v1/chat/completions", broken).status_code == 400


def test_the_log_holds_requests_but_no_polling(guarded: Server):
    guarded.post("/v1/completions", {"prompt": "x" * 100, "max_tokens": 1, "request_id": "seen"})
    log = guarded.log()
    assert "Received request cmpl-seen: prompt: 'xxxxxxxxxxxxxxxxxxxx', " in log
    assert "Request cmpl-seen: output:" in log
    assert '"POST /v1/completions' in log
    assert "/health" not in log
    assert "/metrics" not in log


# Full


async def until_load_is(server: Server, count: int) -> None:
    async with httpx.AsyncClient(timeout=PATIENCE) as http:
        while (await http.get(f"{server.url}/load")).json() != {"server_load": count}:
            await asyncio.sleep(0.01)


async def until_running(server: Server) -> None:
    while not await asyncio.to_thread(server.metric, "vllm:num_requests_running"):
        await asyncio.sleep(0.01)


async def until_waiting(server: Server, count: int) -> None:
    while await asyncio.to_thread(server.metric, "vllm:num_requests_waiting") < count:
        await asyncio.sleep(0.01)


def test_the_65th_request_of_a_queue_of_64_gets_503_and_the_others_go_on(guarded: Server):
    refused: list[openai.InternalServerError] = []

    async def flood() -> None:
        async with (
            guarded.async_client as client,
            asyncio.timeout(PATIENCE),
            asyncio.TaskGroup() as group,
        ):
            blocker = group.create_task(client.completions.create(**ENDLESS))
            await until_running(guarded)
            for _ in range(64):
                group.create_task(client.completions.create(**{**LONG, "max_tokens": 1}))
            await until_waiting(guarded, 64)
            for stream in (False, True):
                with pytest.raises(openai.InternalServerError) as refusal:
                    await client.completions.create(**{**LONG, "stream": stream})
                refused.append(refusal.value)
            blocker.cancel()

    asyncio.run(flood())
    assert [answer.status_code for answer in refused] == [503, 503]
    assert all("--max-num-queued-reqs" in answer.message for answer in refused)
    assert guarded.metric("vllm:admission_rejections_total") == 2
    assert guarded.post("/v1/completions", {"prompt": "Hi", "max_tokens": 1}).status_code == 200


def test_priority_reorders(guarded: Server):
    ended: list[str] = []

    async def one(client: openai.AsyncOpenAI, name: str, priority: int, num_tokens: int) -> None:
        body = {"ignore_eos": True, "priority": priority}
        asked = {"model": MODEL, "prompt": name, "max_tokens": num_tokens, "extra_body": body}
        await client.completions.create(**asked)
        ended.append(name)

    async def race() -> None:
        async with (
            guarded.async_client as client,
            asyncio.timeout(PATIENCE),
            asyncio.TaskGroup() as group,
        ):
            blocker = group.create_task(one(client, "blocker", -1, 7900))
            await until_running(guarded)
            group.create_task(one(client, "low", 5, 2))
            await until_waiting(guarded, 1)
            group.create_task(one(client, "high", 1, 2))
            await until_waiting(guarded, 2)
            await until_load_is(guarded, 3)
            blocker.cancel()
        async with asyncio.timeout(PATIENCE):
            await until_load_is(guarded, 0)

    asyncio.run(race())
    assert ended == ["high", "low"]


# Clients that leave


def test_an_aborted_stream_gives_its_blocks_back(server: Server):
    stream = server.client.completions.create(stream=True, **LONG)
    next(iter(stream))
    assert server.metric("vllm:num_requests_running") == 1
    assert server.metric("vllm:kv_cache_usage_perc") > 0
    stream.close()
    server.wait_until_idle()
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    text = server.get("/metrics").text
    assert any(
        'finished_reason="abort"' in line and not line.endswith(" 0.0")
        for line in text.splitlines()
        if line.startswith("vllm:request_success_total")
    )


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_stops_waiting_aborts_its_request(server: Server, path: str):
    body = {"max_tokens": 900, "ignore_eos": True, "prompt": "Once"}
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + path, json=body, timeout=1.0)
    server.wait_until_idle()


def test_a_client_that_leaves_within_its_body_is_no_error(server: Server):
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        "Content-Length: 1000\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(head.encode() + b'{"prompt": "half')
        # Served while the rest is awaited.
        assert server.post("/v1/completions", {"prompt": "Hi", "max_tokens": 1}).status_code == 200
    assert server.get("/health").status_code == 200
    log = server.log()
    assert "ClientDisconnect" not in log
    assert "Traceback" not in log


def test_leaving_one_of_several_prompts_leaves_all(server: Server):
    asked = {**LONG, "prompt": ["One", "Two", "Three"], "stream": True}
    stream = server.client.completions.create(**asked)
    next(iter(stream))
    stream.close()
    server.wait_until_idle()


# Ends


def test_sigterm_aborts_what_runs_and_exits_well(tmp_path: Path):
    with Server(tmp_path / "log", *TINY, *PATIENT) as server:
        children = server.children()
        stream = server.client.completions.create(stream=True, **ENDLESS)
        next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
        assert reasons[-1] == "abort"
        assert server.process.wait(PATIENCE) == 0
        assert all_gone(children)
        assert server.log().count("shutting down") == 1


def test_shutdown_timeout_lets_requests_end(tmp_path: Path):
    options = (*TINY, *PATIENT, "--shutdown-timeout", "600")
    with Server(tmp_path / "log", *options) as server:
        asked = {**LONG, "max_tokens": 2000, "stream_options": {"include_usage": True}}
        stream = server.client.completions.create(stream=True, **asked)
        next(iter(stream))
        # The request cannot end before the rest has been seen.
        engine = server.engine()
        engine.suspend()
        idle = httpx.Client(base_url=server.url, timeout=PATIENCE)
        assert idle.get("/health").status_code == 200
        # As Ctrl-C in a terminal does, to the engine's process, too.
        os.killpg(server.process.pid, signal.SIGINT)
        while idle.get("/health").status_code == 200:
            time.sleep(0.01)
        # A connection that is open already is told; a new one finds nobody.
        assert idle.post("/v1/completions", json={"prompt": "Hi"}).status_code == 503
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health", timeout=PATIENCE)
        engine.resume()
        *_, last = stream
        assert last.usage.completion_tokens == 2000
        assert server.process.wait(PATIENCE) == 0


def test_a_second_signal_ends_at_once(tmp_path: Path):
    options = (*TINY, *PATIENT, "--shutdown-timeout", "600")
    with Server(tmp_path / "log", *options) as server:
        children = server.children()
        stream = server.client.completions.create(stream=True, **{**ENDLESS, "n": 8})
        next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("SIGTERM: waiting up to 600 s for 1 requests")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 128 + signal.SIGTERM
        assert "Traceback" not in server.log()
        assert all_gone(children)


def test_a_killed_engine_turns_into_errors_and_an_exit_status(tmp_path: Path):
    with Server(tmp_path / "log", *TINY, *PATIENT) as server:
        stream = server.client.completions.create(stream=True, **ENDLESS)
        next(iter(stream))
        server.engine().kill()
        with pytest.raises(openai.APIError, match="engine process has died"):
            list(stream)
        assert server.get("/health").status_code == 503
        answer = server.post("/v1/completions", {"prompt": "Hi"})
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "InternalServerError"
        assert server.process.wait(PATIENCE) == 1
        assert not server.log().count("Traceback")


def test_a_killed_server_leaves_no_engine(tmp_path: Path):
    with Server(tmp_path / "log", *TINY, *SMALL) as server:
        children = server.children()
        assert children
        server.process.kill()
        assert all_gone(children)


# What keeps a server from starting


def ends(*options: str, model: str = MODEL) -> tuple[int, str]:
    done = subprocess.run(
        serve_command(*options, model=model),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stderr


def test_a_port_in_use_is_one_line():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        status, printed = ends("--port", str(port))
    assert status == 1
    assert printed.strip().splitlines()[-1] == (
        f"vllm serve: error: --port {port} is in use on 127.0.0.1; choose another, or 0 for a "
        "free one"
    )


def test_too_few_files_are_one_line():
    shell = ["bash", "-c", 'ulimit -n 40; exec "$@"', "bash"]
    done = subprocess.run(
        [*shell, *serve_command("--port", "0", *TINY, *SMALL)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "vllm serve: error: this process may open 40 files, and a server needs at least 64, with "
        "one more for each connection: raise the limit with ulimit -n"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--enable-auto-tool-choice",), "--tool-call-parser"),
        (("--tool-call-parser", "hermess"), "hermes"),
        (("--chat-template", "/no/such/file.jinja"), "--chat-template"),
        (("--chat-template", "{% if %}"), "--chat-template: line 1"),
        (("--ssl-certfile", "/no/such/cert.pem"), "--ssl-certfile"),
        (("--ssl-certfile", __file__), "--ssl-certfile cannot be used"),
        (("--served-model-name", ""), "--served-model-name"),
        (("--host", "256.1.1.1"), "--host 256.1.1.1"),
        (("--host", "a" * 70), "label too long"),
        (("--chat-template", ""), "--chat-template"),
        (("--allowed-methods", "[null]"), "--allowed-methods takes a JSON list"),
        (("--middleware", "no.such.thing"), "--middleware"),
        (
            ("--tool-parser-plugin", "/no/such.py", "--tool-call-parser", "x"),
            "--tool-parser-plugin",
        ),
        (("--uds", str(Path(__file__))), "no socket"),
    ],
)
def test_a_wrong_option_is_one_line_before_anything_is_loaded(options, words):
    status, printed = ends("--port", "0", *options)
    assert status != 0
    last = printed.strip().splitlines()[-1]
    assert last.startswith("vllm serve: error: ")
    assert words in last
    assert "Traceback" not in printed
    assert "Start-up" not in printed


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ({"model.norm.weight": torch.ones(5)}, "has shape [5], expected [96]"),
        (None, "holds no .safetensors weights; use --load-format dummy"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(tmp_path: Path, spoil: dict | None, words: str):
    save(make_hf_model("llama"), tmp_path)
    weights = tmp_path / "model.safetensors"
    if spoil is None:
        weights.unlink()
    else:
        save_file(load_file(weights) | spoil, weights)
    options = ("--port", "0", "--skip-tokenizer-init", "--kv-cache-memory-bytes", "16M")
    status, printed = ends(*options, model=str(tmp_path))
    assert status == 2
    assert words in printed.strip().splitlines()[-1]
    assert "Traceback" not in printed


def test_a_directory_is_served(tmp_path: Path):
    save(make_hf_model("llama"), tmp_path)
    options = ("--skip-tokenizer-init", "--kv-cache-memory-bytes", "16M", "--max-model-len", "64")
    with Server(tmp_path / "log", *options, model=str(tmp_path)) as server:
        body = {"prompt": [5, 6, 7], "max_tokens": 4, "return_token_ids": True}
        answer = server.post("/v1/completions", {**body, "ignore_eos": True}).json()
        assert answer["model"] == str(tmp_path)
        assert len(answer["choices"][0]["token_ids"]) == 4
        # Each phase of the start is a line with its time; weights have a progress bar.
        log = server.log()
        for phase in (
            "resolving the configuration",
            "loading the tokenizer",
            "importing torch",
            "preparing the device",
            "loading the model",
            "planning and allocating the KV cache",
            "warming up",
        ):
            assert re.search(rf"Start-up: {phase} took \d+\.\d\d s", log)
        assert "Loading weights: 100%" in log
        assert re.search(r"ready in \d+\.\d s", log)


def test_the_servers_process_never_imports_torch(server: Server):
    """torch alone maps hundreds of libraries' worth of memory; the engine's process has it."""
    mapped = {Path(m.path).name for m in server.tree.memory_maps()}
    assert not any(name.startswith("libtorch") for name in mapped)
    assert any(Path(m.path).name.startswith("libtorch") for m in server.engine().memory_maps())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_python_drops_ends_the_start_all_the_same():
    class Cell:
        pass

    stop = StartupStop()
    cell = Cell()
    # As in the import machinery: an exception in a weak reference's callback goes nowhere.
    reference = weakref.ref(cell, lambda _: stop(signal.SIGTERM, None))
    del cell
    assert reference() is None
    stuck = threading.Thread(target=threading.Event().wait, daemon=True)
    stuck.start()
    with pytest.raises(SystemExit) as ended:
        stop.join(stuck)
    assert ended.value.code == 0


def is_listening(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(path) == 0


def test_a_unix_socket_serves(tmp_path: Path):
    path = str(tmp_path / "vllm.sock")
    process = subprocess.Popen(
        serve_command(*TINY, *SMALL, "--uds", path), stderr=subprocess.DEVNULL
    )
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), timeout=PATIENCE) as client:
            deadline = time.monotonic() + PATIENCE
            while not is_listening(path):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            assert client.get("http://server/v1/models").json()["data"][0]["id"] == MODEL
    finally:
        process.terminate()
    assert process.wait(PATIENCE) == 0
    assert not Path(path).exists()
