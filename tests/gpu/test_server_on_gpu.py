"""``vllm serve`` on a GPU: several API servers, sleep over HTTP, and advice that helps."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.engine.conftest import make_tokenizer
from tests.entrypoints.server import Server, serve_command
from tests.gpu.conftest import SHAPE
from tests.worker.driver import make_hf_model

pytestmark = pytest.mark.gpu

OPTIONS = ("--max-model-len", "1024", "--dtype", "float32", "--max-num-seqs", "64")
SMALL = ("--kv-cache-memory-bytes", "128M")


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("gpu-served")
    make_hf_model(**SHAPE).save_pretrained(folder)
    make_tokenizer(folder)
    return str(folder)


def test_several_api_servers_answer_alike_and_sleep_as_one(served, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    options = (*OPTIONS, *SMALL, "--api-server-count", "3", "--enable-sleep-mode")

    def complete(number: int) -> str:
        body = {"prompt": f"Tell me {number % 7}", "max_tokens": 24, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    with Server(tmp_path / "log", *options, model=served) as server:
        first = [complete(number) for number in range(7)]
        with ThreadPoolExecutor(24) as pool:
            together = list(pool.map(complete, range(70)))
        assert together == first * 10
        for level in (1, 2):
            assert server.post(f"/sleep?level={level}").status_code == 200
            assert server.get("/is_sleeping").json() == {"is_sleeping": True}
            assert server.post("/wake_up").status_code == 200
            assert server.get("/is_sleeping").json() == {"is_sleeping": False}
            assert [complete(number) for number in range(7)] == first
        assert server.metric("vllm:generation_tokens_total") > 0


def test_the_servers_advice_about_memory_starts_it(served, tmp_path) -> None:
    command = serve_command(*OPTIONS, "--gpu-memory-utilization", "0.01", model=served)
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode != 0
    text = refused.stdout + refused.stderr
    advice = re.search(r"--gpu-memory-utilization .*at least (0\.\d+)", text)
    assert advice, text
    assert "Traceback" not in text
    options = (*OPTIONS, "--gpu-memory-utilization", advice.group(1))
    with Server(tmp_path / "log", *options, model=served) as server:
        body = {"prompt": "Hello", "max_tokens": 4}
        assert server.post("/v1/completions", body).status_code == 200
