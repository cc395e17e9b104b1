"""Several API servers on one port: requests, metrics, sleep and the end are those of one server."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.entrypoints.server import BRIEF, MODEL, PATIENCE, SMALL, TINY, Server
from tests.entrypoints.test_lifecycle import all_gone

OPTIONS = (*TINY, *SMALL, "--api-server-count", "2", "--enable-sleep-mode")
BODY = {"model": MODEL, "prompt": "Hi", "max_tokens": 4, "extra_body": {"ignore_eos": True}}
NUM_REQUESTS = 24


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Server(tmp_path / "log", *OPTIONS) as server:
        yield server


def api_servers(server: Server) -> list[psutil.Process]:
    return [child for child in server.children() if "api_server_group" in " ".join(child.cmdline())]


async def complete(server: Server, request_id: str) -> openai.types.Completion:
    # A connection of its own: any of the servers may take it.
    async with server.async_client as client:
        return await client.completions.create(
            **{**BODY, "extra_body": {"ignore_eos": True, "request_id": request_id}}
        )


async def complete_all(server: Server) -> list[openai.types.Completion]:
    # Pairs with one id: two servers may be asked for it at once.
    return await asyncio.gather(
        *(complete(server, f"r{index // 2}") for index in range(NUM_REQUESTS))
    )


def test_a_group_serves_counts_sleeps_and_ends_as_one(group: Server, tmp_path: Path):
    processes = api_servers(group)
    assert len(processes) == 2
    answers = asyncio.run(complete_all(group))
    assert all(answer.usage.completion_tokens == 4 for answer in answers)

    # The one that counts what runs may hear of the end after another has answered.
    group.wait_until_idle()
    # Whoever is asked for metrics, answers for all.
    for _ in range(4):
        with httpx.Client(base_url=group.url, timeout=PATIENCE, limits=BRIEF) as http:
            text = http.get("/metrics").text
        (count,) = re.findall(r"^vllm:generation_tokens_total{.*} (\S+)$", text, re.M)
        assert float(count) == 4 * NUM_REQUESTS
        assert re.search(r"^vllm:num_requests_running{.*} 0.0$", text, re.M)
        assert len(re.findall(r"^vllm:cache_config_info{", text, re.M)) == 1
        assert "pid=" not in text

    assert group.get("/is_sleeping").json() == {"is_sleeping": False}
    assert group.post("/sleep?level=1").status_code == 200
    assert group.get("/is_sleeping").json() == {"is_sleeping": True}
    for level in ("9", "9" * 30, "9" * 5000, "-1", "\u0663"):
        assert group.post(f"/sleep?level={level}").status_code == 400
    assert group.post("/wake_up?tags=nothing").status_code == 400
    assert group.post("/wake_up?tags=weights&tags=kv_cache").status_code == 200
    assert group.get("/is_sleeping").json() == {"is_sleeping": False}
    assert group.post("/reset_prefix_cache").json() == {"success": True}
    body = {"method": "check_health", "timeout": 60, "args": [], "kwargs": {}}
    assert group.post("/collective_rpc", body).json() == {"results": [None]}
    assert group.post("/collective_rpc", {"method": "_x"}).status_code == 400
    assert group.post("/collective_rpc", {**body, "timeout": -1}).status_code == 400
    for wrong in ({"kwargs": []}, {"timeout": 1e300}, {"args": [10**30]}, {"method": "get_model"}):
        assert group.post("/collective_rpc", {**body, **wrong}).status_code == 400
    assert asyncio.run(complete(group, "after")).usage.completion_tokens == 4

    children = group.children()
    group.process.send_signal(signal.SIGTERM)
    assert group.process.wait(PATIENCE) == 0
    assert all_gone(children)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]


def test_one_servers_end_is_the_end_of_all(group: Server):
    children = group.children()
    api_servers(group)[1].kill()
    assert group.process.wait(PATIENCE) == 1
    assert all_gone(children)
    assert "API server 1 has ended (killed by SIGKILL)" in group.log()


def test_a_killed_group_leaves_nothing(group: Server, tmp_path: Path):
    assert asyncio.run(complete(group, "before")).usage.completion_tokens == 4
    children = group.children()
    group.process.kill()
    assert all_gone(children)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]


def test_the_engines_death_is_answered_by_every_server(group: Server):
    children = group.children()
    group.engine().kill()
    statuses = []
    while len(statuses) < 6:
        try:
            body = {"prompt": "x"}
            answer = httpx.post(f"{group.url}/v1/completions", json=body, timeout=PATIENCE)
        except httpx.TransportError:
            break
        statuses.append(answer.status_code)
        assert "killed by SIGKILL" in answer.text
    assert statuses
    assert set(statuses) == {500}
    assert group.process.wait(PATIENCE) == 1
    assert all_gone(children)
