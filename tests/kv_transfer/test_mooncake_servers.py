"""Prefill and decode servers over Mooncake as processes, the router before them, real HTTP."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.kv_transfer.harness import (
    MODELS,
    STATEFUL,
    Engine,
    Fleet,
    RouterProcess,
    Setup,
    body_of,
    in_parallel,
    wait_for,
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


def test_a_stream_a_refusal_and_several_answers_pass_through(fleet, tmp_path):
    with Cluster(fleet, tmp_path, setup("llama"), setup("llama")) as cluster:
        (prompt,) = prompts(1)
        body = {**body_of(prompt, 5), "stream": True}
        with httpx.stream("POST", f"{cluster.router.url}/v1/completions", json=body) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]" and len(lines) > 3
        refused = cluster.router.complete(prompt, -1)
        assert refused.status_code == 400 and "max_tokens" in refused.text
        # Both would refuse a prompt that is too long; the decoder does not wait for nothing.
        assert cluster.router.complete([5] * 400).status_code == 400
        before = cluster.d.metric("vllm:kv_transfers_total")
        several = cluster.router.http.post(
            "/v1/completions", json={**body_of(prompt, 4), "n": 2, "temperature": 0}
        ).json()
        both = [choice["token_ids"] for choice in several["choices"]]
        assert both == [cluster.plain.tokens(prompt, 4)] * 2
        assert cluster.d.metric("vllm:kv_transfers_total") == before
        cluster.settle()


def test_a_prefill_server_that_is_killed_fails_its_requests_and_the_router_goes_on(fleet, tmp_path):
    """D's blocks come back, and a prefill server that joins takes over."""
    doomed = setup("llama", name="doomed", role="kv_producer")
    first = fleet.get(doomed)
    with Cluster(fleet, tmp_path, setup("llama"), setup("llama")) as cluster:
        (prompt,) = prompts(1, 100)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(fetch, first, cluster.d, prompt, "never")
            wait_for(
                lambda: cluster.d.metric("vllm:kv_cache_usage_perc") > 0, 20, "it does not load"
            )
            first.signal(signal.SIGKILL)
            response = waiting.result(timeout=30)
        assert response.status_code == 500 and "could not be loaded" in response.text
        compare(cluster, prompts(2))
    fleet.end(doomed)


@pytest.mark.slow
def test_a_decode_server_that_is_killed_leaves_no_blocks_behind(fleet, tmp_path):
    extra = json.dumps({"mooncake_protocol": "tcp", "kv_lease_duration": 2})
    doomed = setup("llama", name="doomed", role="kv_consumer", extra=extra)
    # Some it may not have asked for yet: those wait this long.
    waits = (("VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT", "4"),)
    prefill = setup("llama", extra=extra, environment=waits)
    with Cluster(fleet, tmp_path, prefill, setup("llama")) as cluster:
        second = fleet.get(doomed)
        (prompt,) = prompts(1, 100)
        ids = [f"x-{i}" for i in range(3)]
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(fetch, cluster.p, second, prompt, name) for name in ids]
            wait_for(lambda: second.metric("vllm:kv_cache_usage_perc") > 0, 20, "nothing loads")
            second.signal(signal.SIGKILL)
            for future in waiting:
                assert future.exception(timeout=30) is not None
        for name in ids:
            ask = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": name}
            assert cluster.p.complete(prompt, 1, ask).status_code == 200
        cluster.p.wait_until_empty(30)
        compare(cluster, prompts(2))
    fleet.end(doomed)


def fetch(p, d, prompt, transfer_id):
    params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "transfer_id": transfer_id,
        "remote_bootstrap_addr": bootstrap_of(p),
        "remote_engine_id": engine_id_of(p),
    }
    return d.complete(prompt, 6, params)


def engine_id_of(engine: Engine) -> str:
    return httpx.get(f"{bootstrap_of(engine)}/query").json()["0"]["engine_id"]
