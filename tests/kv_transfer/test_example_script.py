"""The script that shows all of it on one machine, run as a user would."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.kv_transfer.mooncake import ROOT, own_network, require_mooncake

QUESTION = "What is the capital of France?"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("connector", ["nixl", "mooncake"])
def test_servers_and_router_answer_a_question(connector):
    """In a network of its own, as its ports are fixed."""
    require_mooncake()
    script = ROOT / "examples/disaggregated/serve.py"
    command = [sys.executable, str(script), "--once", "--connector", connector]
    with own_network():
        ended = subprocess.run(
            [*command, "--question", QUESTION],
            env={**os.environ, "UCX_NET_DEVICES": "lo", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=580,
        )
    assert ended.returncode == 0, ended.stderr[-3000:]
    answer = ended.stdout.split(QUESTION, 1)[1]
    assert "Paris" in answer, ended.stdout[-3000:]
