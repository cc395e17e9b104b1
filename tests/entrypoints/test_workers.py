"""A server whose model runs on two workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.entrypoints.server import PATIENCE, SMALL, Server
from tests.entrypoints.test_lifecycle import all_gone

HEADS = '{"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}'
OPTIONS = (*SMALL, "--load-format", "dummy", "--hf-overrides", HEADS, "-tp", "2")


@pytest.fixture
def server(tmp_path: Path):
    with Server(tmp_path / "log", *OPTIONS) as server:
        yield server


def test_a_workers_death_is_answered_with_500_and_ends_the_server(server: Server):
    body = {"prompt": "Hi", "max_tokens": 3}
    first = server.post("/v1/completions", body)
    assert first.status_code == 200, first.text
    children = server.children()
    workers = [child for child in children if "worker_proc" in " ".join(child.cmdline())]
    assert len(workers) == 2
    # While nothing runs, too.
    workers[1].kill()
    while (answer := server.post("/v1/completions", body)).status_code == 200:
        pass
    assert answer.status_code == 500
    assert "worker 1 has died (killed by SIGKILL)" in answer.text
    assert server.get("/health").status_code == 503
    assert server.process.wait(PATIENCE) == 1
    assert all_gone(children)
    log = server.log()
    assert "Traceback" not in log
    assert "worker 1 has died (killed by SIGKILL)" in log
