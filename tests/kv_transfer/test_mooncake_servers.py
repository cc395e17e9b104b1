"""Prefill and decode servers over Mooncake as processes, the router before them, real HTTP."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.entrypoints.server import PATIENCE
from tests.kv_transfer.harness import MODELS, body_of, wait_for
from tests.kv_transfer.mooncake_servers import (
    Cluster,
    ask_of,
    bootstrap_of,
    compare,
    engine_id_of,
    fetch_of,
    prompts,
    setup,
)


def test_answers_are_those_of_one_server(mooncake_fleet, tmp_path):
    with Cluster(mooncake_fleet, tmp_path, setup("llama"), setup("llama")) as cluster:
        compare(cluster, prompts(6))
        assert cluster.d.metric("vllm:kv_transfer_bytes_total") > 0
        assert cluster.d.metric("vllm:kv_transfer_descriptors_total") > 0
        assert cluster.d.metric("vllm:kv_failed_transfers_total") == 0
        assert cluster.p.metric("vllm:kv_failed_sends_total") == 0


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_hundred_answers_are_those_of_one_server(mooncake_fleet, tmp_path, model):
    with Cluster(mooncake_fleet, tmp_path, setup(model), setup(model)) as cluster:
        compare(cluster, prompts(100))


def test_a_stream_a_refusal_and_several_answers_pass_through(mooncake_fleet, tmp_path):
    with Cluster(mooncake_fleet, tmp_path, setup("llama"), setup("llama")) as cluster:
        (prompt,) = prompts(1)
        body = {**body_of(prompt, 5), "stream": True}
        url = f"{cluster.router.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=PATIENCE) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        # A reader that comes late gets several tokens in one piece.
        pieces = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        streamed = [piece["choices"][0]["token_ids"] for piece in pieces if piece["choices"]]
        assert len(streamed) > 1
        assert [token for piece in streamed for token in piece] == cluster.plain.tokens(prompt, 5)
        refused = cluster.router.complete(prompt, -1)
        assert refused.status_code == 400 and "max_tokens" in refused.text
        # Both would refuse a prompt that is too long; the decoder does not wait for nothing.
        assert cluster.router.complete([5] * 400).status_code == 400
        before = cluster.d.metric("vllm:kv_transfers_total")
        several = cluster.router.complete(prompt, 4, n=2).json()
        both = [choice["token_ids"] for choice in several["choices"]]
        assert both == [cluster.plain.tokens(prompt, 4)] * 2
        assert cluster.d.metric("vllm:kv_transfers_total") == before + 2
        assert cluster.p.metric("vllm:kv_failed_sends_total") == 0
        cluster.settle()


def test_a_killed_prefill_server_fails_its_requests_and_the_router_goes_on(
    mooncake_fleet, tmp_path
):
    """D's blocks come back, and a prefill server that joins takes over."""
    doomed = setup("llama", name="doomed", role="kv_producer")
    first = mooncake_fleet.get(doomed)
    with Cluster(mooncake_fleet, tmp_path, setup("llama"), setup("llama")) as cluster:
        (prompt,) = prompts(1, 100)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(fetch, first, cluster.d, prompt, "never")
            wait_for(lambda: cluster.d.metric("vllm:kv_cache_usage_perc") > 0, "it does not load")
            first.signal(signal.SIGKILL)
            response = waiting.result(timeout=PATIENCE)
        assert response.status_code == 500 and "could not be loaded" in response.text
        compare(cluster, prompts(2))
    mooncake_fleet.end(doomed)


@pytest.mark.slow
def test_a_decode_server_that_is_killed_leaves_no_blocks_behind(mooncake_fleet, tmp_path):
    extra = json.dumps({"mooncake_protocol": "tcp", "kv_lease_duration": 2})
    doomed = setup("llama", name="doomed", role="kv_consumer", extra=extra)
    # Some it may not have asked for yet: those wait this long.
    waits = (("VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT", "4"),)
    prefill = setup("llama", extra=extra, environment=waits)
    with Cluster(mooncake_fleet, tmp_path, prefill, setup("llama")) as cluster:
        second = mooncake_fleet.get(doomed)
        (prompt,) = prompts(1, 100)
        ids = [f"x-{i}" for i in range(3)]
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(fetch, cluster.p, second, prompt, name) for name in ids]
            wait_for(lambda: second.metric("vllm:kv_cache_usage_perc") > 0, "nothing loads")
            second.signal(signal.SIGKILL)
            for future in waiting:
                assert future.exception(timeout=PATIENCE) is not None
        for name in ids:
            assert cluster.p.complete(prompt, 1, ask_of(name)).status_code == 200
        cluster.p.wait_until_empty()
        compare(cluster, prompts(2))
    mooncake_fleet.end(doomed)


def fetch(p, d, prompt, transfer_id):
    return d.complete(prompt, 6, fetch_of(transfer_id, bootstrap_of(p), engine_id_of(p)))
