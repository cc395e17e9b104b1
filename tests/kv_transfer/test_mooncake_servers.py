"""Prefill and decode servers over Mooncake as processes, the router before them, real HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kv_transfer.harness import (
    MODELS,
    STATEFUL,
    Engine,
    Fleet,
    RouterProcess,
    Setup,
    in_parallel,
)
from tests.kv_transfer.mooncake import own_network, require_mooncake

TCP = json.dumps({"mooncake_protocol": "tcp"})


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Iterator[Fleet]:
    """Servers in a network of their own."""
    require_mooncake()
    with pytest.MonkeyPatch.context() as patch, own_network():
        patch.setenv("GLOG_minloglevel", "2")
        made = Fleet(tmp_path_factory.mktemp("mooncake"))
        try:
            yield made
        finally:
            made.close()


def setup(model: str, **more) -> Setup:
    environment = (("VLLM_SSM_CONV_STATE_LAYOUT", "DS"),) if model in STATEFUL else ()
    given = {"connector": "MooncakeConnector", "extra": TCP, "environment": environment}
    return Setup(model=model, **{**given, **more})


class Cluster:
    """P, D, a plain server, and a router that knows Mooncake."""

    def __init__(self, fleet: Fleet, folder: Path, prefill: Setup, decode: Setup) -> None:
        self.p, self.d, self.plain = fleet.pair(prefill, decode)
        self.router = RouterProcess(
            folder / "router.log",
            *("--connector", "mooncake", "--prefill", self.p.url),
            *("--bootstrap", bootstrap_of(self.p), "--decode", self.d.url),
        )

    def __enter__(self):
        self.router.wait()
        return self

    def __exit__(self, *_):
        self.router.close()

    def settle(self):
        self.p.wait_until_empty()
        self.d.wait_until_empty()


def bootstrap_of(engine: Engine) -> str:
    return f"http://127.0.0.1:{engine.side_port}"


def prompts(count: int, longest: int = 180) -> list[list[int]]:
    lengths = [2 + (i * 37) % longest for i in range(count)]
    return [
        [3 + (i * 7 + n * 13 + j * (n + 3)) % 90 for j in range(n)] for i, n in enumerate(lengths)
    ]


def compare(cluster: Cluster, asked: list[list[int]]) -> None:
    plain = in_parallel(cluster.plain.tokens, asked)
    before = cluster.d.metric("vllm:kv_transfers_total")
    got = in_parallel(cluster.router.tokens, asked)
    wrong = [index for index, pair in enumerate(zip(got, plain, strict=True)) if pair[0] != pair[1]]
    assert not wrong, f"prompts {wrong} of {len(asked)} differ"
    assert cluster.d.metric("vllm:kv_transfers_total") - before == len(asked)
    cluster.settle()


def test_answers_are_those_of_one_server(fleet, tmp_path):
    with Cluster(fleet, tmp_path, setup("llama"), setup("llama")) as cluster:
        compare(cluster, prompts(6))
        assert cluster.d.metric("vllm:kv_transfer_bytes_total") > 0
        assert cluster.d.metric("vllm:kv_transfer_descriptors_total") > 0
        assert cluster.d.metric("vllm:kv_failed_transfers_total") == 0
        assert cluster.p.metric("vllm:kv_failed_sends_total") == 0


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_hundred_answers_are_those_of_one_server(fleet, tmp_path, model):
    with Cluster(fleet, tmp_path, setup(model), setup(model)) as cluster:
        compare(cluster, prompts(100))
