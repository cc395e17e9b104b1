"""``vllm run-batch``: files of requests, their answers and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.entrypoints.server import SMALL, TINY
from vllm.entrypoints.openai.run_batch import read_requests
from vllm.errors import ConfigError

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
REQUESTS = [
    ("a", "/v1/chat/completions", {"model": "smollm2", **CHAT}),
    ("b", "/v1/completions", {"model": "smollm2", "prompt": "Once", "max_tokens": 2, "n": 2}),
    ("c", "/v1/chat/completions", {"model": "other", **CHAT}),
    ("d", "/v1/embeddings", {"model": "smollm2", "input": "x"}),
    ("e", "/v1/chat/completions", {"model": "smollm2", **CHAT, "temperature": -1}),
]


def as_lines(requests) -> str:
    return "\n".join(
        json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body})
        for name, url, body in requests
    )


@pytest.fixture
def store() -> Iterator[tuple[str, dict[str, bytes]]]:
    """A web server that gives and takes files, as an object store does."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = files.get(self.path)
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(found or b"")

        def do_PUT(self) -> None:
            files[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", files
    server.shutdown()
    thread.join()
    server.server_close()


def run_batch(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "run-batch", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_every_line_has_its_answer(store):
    url, files = store
    files["/in.jsonl"] = as_lines(REQUESTS).encode() + b"\n\n"
    result = run_batch(
        "-i", f"{url}/in.jsonl", "-o", f"{url}/out.jsonl", "--model", "smollm2", *TINY, *SMALL
    )
    assert result.returncode == 0, result.stderr
    assert "2 of 5 requests were answered" in result.stderr
    answers = [json.loads(line) for line in files["/out.jsonl"].splitlines()]
    assert [answer["custom_id"] for answer in answers] == ["a", "b", "c", "d", "e"]
    statuses = [answer["response"]["status_code"] for answer in answers]
    assert statuses == [200, 200, 404, 404, 400]
    chat, completion, *refused = [answer["response"]["body"] for answer in answers]
    assert chat["object"] == "chat.completion"
    assert chat["usage"]["completion_tokens"] == 3
    assert len(completion["choices"]) == 2
    assert "temperature" in refused[2]["error"]["message"]
    assert all(answer["error"] is None for answer in answers)
    assert len({answer["id"] for answer in answers}) == 5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no requests"),
        ("{", "line 1: "),
        (as_lines(REQUESTS[:1]) + '\n{"custom_id": "x"}', "line 2: "),
        (
            '{"custom_id": "x", "method": "GET", "url": "/health", "body": {}}',
            "line 1: GET /health: give POST",
        ),
        (as_lines([("s", "/v1/completions", {"stream": True})]), "a batch has no streams"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, text: str, reason: str):
    file = tmp_path / "in.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_requests(str(file))
    assert str(error.value).startswith(f"--input-file {file}")
    assert reason in str(error.value)


def test_what_is_missing_is_named_before_a_model_is_loaded(tmp_path: Path):
    for options, message in (
        (("-o", "out"), "--input-file is needed"),
        (("-i", str(tmp_path / "none"), "-o", "out"), "No such file"),
        (("-i", "in", "-o", "out", "--enable-metrics"), "--enable-metrics: vLLM has this"),
    ):
        result = run_batch(*options)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert message in result.stderr
