"""The router before prefill and decode servers that come, go, freeze and die: real processes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest

from tests.entrypoints.server import PATIENCE, TINY
from tests.kv_transfer.harness import (
    KEY,
    SMOLLM2,
    RouterProcess,
    Setup,
    body_of,
    tokens_of,
    wait_for,
)

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")),
    reason="needs nixl: pip install 'vllm[nixl]'",
)
PLAIN = Setup(model=SMOLLM2, options=(*TINY, "--max-model-len", "4000"))
PREFILL = replace(PLAIN, role="kv_producer", name="p")
DECODE = replace(PLAIN, role="kv_consumer", name="d")
DOOMED = "doomed"
LONG = 200
# More tokens than are drawn before the test goes on, however late it does.
ENDLESS = 3900


def prompt(index: int) -> list[int]:
    return [5 + (index * 131 + i * (index + 3)) % 900 for i in range(8 + 9 * index)]


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    log = tmp_path_factory.mktemp("router") / "log"
    # A server that has much to do on a busy machine is not taken for one that is frozen.
    made = RouterProcess(log, "--health-timeout", "10")
    yield made
    made.close()


@pytest.fixture
def cluster(fleet, router):
    """The router with one prefill and one decode server; and the plain one."""
    p, d, plain = fleet.all_of(PREFILL, DECODE, PLAIN)
    with router.with_servers([p], [d]):
        yield router, p, d, plain


@pytest.fixture
def doomed(fleet):
    """Makes another server that the test may hurt, of a role."""
    made = []

    def make(setup):
        made.append(replace(setup, name=DOOMED + setup.name))
        return fleet.get(made[-1])

    yield make
    for setup in made:
        if setup in fleet.running:
            fleet.end(setup)


def stream(url: str, index: int, count: int):
    """Events of an answer, as they come."""
    body = {**body_of(prompt(index), count), "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield line.removeprefix("data: ")


def ids_of(events: list[str]) -> list[int]:
    return [token for event in events for token in json.loads(event)["choices"][0]["token_ids"]]


def kill(server) -> None:
    server.signal(signal.SIGKILL)
    server.process.wait()


@contextlib.contextmanager
def frozen(server):
    server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        if server.alive:
            server.signal(signal.SIGCONT)


def in_flight(router: RouterProcess, kind: str) -> float:
    return router.metric(f'vllm_router_requests_in_flight{{kind="{kind}"}}')


def tokens_of_others(server) -> float:
    """Prompt tokens whose KV the server has not computed, but loaded."""
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    name, label = "vllm:prompt_tokens_by_source_total{", 'source="external_kv_transfer"'
    return sum(float(x.split()[-1]) for x in lines if x.startswith(name) and label in x)


def test_answers_are_those_of_one_server(cluster):
    router, p, d, plain = cluster
    before = d.metric("vllm:kv_transfer_bytes_total"), d.metric("vllm:kv_transfers_total")
    fetched = tokens_of_others(d)
    answered = router.metric('vllm_router_requests_total{outcome="ok"}')
    for index in range(6):
        assert router.tokens(prompt(index)) == plain.tokens(prompt(index))
    assert d.metric("vllm:kv_transfers_total") >= before[1] + 6
    assert d.metric("vllm:kv_transfer_bytes_total") > before[0]
    assert d.metric("vllm:kv_transfer_descriptors_total") > 0
    assert tokens_of_others(d) == fetched + sum(len(prompt(index)) for index in range(6))
    assert d.metric("vllm:kv_failed_transfers_total") == 0
    d.wait_until_empty()
    p.wait_until_empty()
    assert router.metric('vllm_router_requests_total{outcome="ok"}') == answered + 6
    assert router.metric("vllm_router_prefill_seconds_count") >= 6
    assert router.metric("vllm_router_first_byte_seconds_count") >= 6
    assert router.metric('vllm_router_healthy_servers{kind="prefill"}') == 1
    assert in_flight(router, "prefill") == in_flight(router, "decode") == 0


def test_streams_and_chats_pass_through(cluster):
    router, _, _, plain = cluster
    messages = [{"role": "user", "content": "the quick brown fox jumps over a lazy dog"}]
    body = {"messages": messages, "max_tokens": 8, "temperature": 0}
    answers = [
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE).json()["choices"][0]
        for url in (router.url, plain.url)
    ]
    assert answers[0]["message"]["content"] == answers[1]["message"]["content"]
    events = list(stream(router.url, 3, 5))
    assert events[-1] == "[DONE]" and len(events) > 3
    assert ids_of(events[:-1]) == plain.tokens(prompt(3), 5)


def test_several_answers_share_one_prefill(cluster):
    router, p, d, plain = cluster
    before = d.metric("vllm:kv_transfers_total"), p.metric("vllm:kv_expired_leases_total")
    text = [7, *prompt(5)]
    choices = router.complete(text, 4, n=3).json()["choices"]
    assert [choice["token_ids"] for choice in choices] == [plain.tokens(text, 4)] * 3
    assert d.metric("vllm:kv_transfers_total") == before[0] + 3
    # Nobody waits for the end of the lease.
    p.wait_until_empty()
    assert p.metric("vllm:kv_expired_leases_total") == before[1]


def test_a_decoder_computes_several_prompts_by_itself(cluster):
    """KV of one would be the wrong one for the others."""
    router, p, d, plain = cluster
    before = d.metric("vllm:kv_transfers_total")
    texts = [[9, *prompt(index)] for index in (2, 3)]
    for given in (texts, ["the quick brown fox", "jumps over a lazy dog"]):
        body = {**body_of([], 4), "prompt": given}
        got = router.http.post("/v1/completions", json=body).json()["choices"]
        right = plain.post("/v1/completions", body).json()["choices"]
        assert [one["token_ids"] for one in got] == [one["token_ids"] for one in right]
    assert d.metric("vllm:kv_transfers_total") == before
    for server, params in ((p, {"do_remote_decode": True}), (d, p.prefill(texts[0]))):
        body = {**body_of([], 4), "prompt": texts, "kv_transfer_params": params}
        response = server.post("/v1/completions", body)
        assert response.status_code == 400 and "request of its own" in response.text


def test_what_clients_say_of_kv_does_not_reach_a_decoder(cluster):
    router, p, d, plain = cluster
    theirs = p.prefill([11, *prompt(4)])
    answer = router.complete(prompt(1), 4, kv_transfer_params=theirs)
    assert tokens_of(answer) == plain.tokens(prompt(1), 4)
    # To the decoder itself: the blocks are not those of this prompt.
    refused = d.complete(prompt(6), params=theirs)
    assert refused.status_code == 500 and "could not be loaded" in refused.text
    assert "belong to another prompt" in d.log()


def test_what_a_server_refuses_reaches_the_client(cluster):
    router = cluster[0]
    body = {"prompt": "x", "max_tokens": -1}
    response = router.http.post("/v1/completions", json=body)
    # The prefill asks for one token; the decoder sees what the client wrote.
    assert response.status_code == 400 and "max_tokens" in response.text
    response = router.http.post("/v1/completions", content=b"not JSON")
    assert response.status_code == 400
    assert router.http.get("/v1/models").json()["data"][0]["id"] == SMOLLM2
    assert router.metric('vllm_router_requests_total{outcome="refused"}') >= 1


def test_servers_join_and_leave_with_the_key_only(cluster):
    router, _, _, plain = cluster
    key = {"authorization": f"Bearer {KEY}"}
    nobody = {"url": "http://127.0.0.1:1"}
    assert router.http.post("/servers/prefill", json=nobody).status_code == 401
    assert router.http.post("/servers/prefill", json={"url": "ftp://x"}, headers=key).is_error
    assert router.join("prefill", nobody["url"]) == {**nobody, "healthy": False}
    assert router.tokens(prompt(1)) == plain.tokens(prompt(1))
    router.leave("prefill", nobody["url"])
    unknown = router.http.delete("/servers/prefill", params={"url": "http://no"}, headers=key)
    assert unknown.status_code == 404


def test_without_servers_of_a_kind_it_says_so(cluster):
    router, p, d, _ = cluster
    assert router.http.get("/health").status_code == 200
    router.leave("decode", d.url)
    health = router.http.get("/health")
    assert health.status_code == 503
    assert health.json() == {"status": "waiting", "prefill_instances": 1, "decode_instances": 0}
    response = router.complete(prompt(0))
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "no decode server could take the request"
    assert router.join("decode", d.url)["healthy"]
    assert router.http.get("/health").status_code == 200
    router.leave("prefill", p.url)
    response = router.complete(prompt(0))
    assert (response.status_code, response.json()["error"]["code"]) == (503, 503)
    router.join("prefill", p.url)


def test_a_server_that_leaves_ends_what_it_has_begun(cluster):
    router, _, d, plain = cluster
    events = stream(router.url, 2, LONG)
    first = next(events)
    router.leave("decode", d.url)
    rest = list(events)
    assert rest[-1] == "[DONE]"
    assert ids_of([first, *rest[:-1]]) == plain.tokens(prompt(2), LONG)
    router.join("decode", d.url)


def test_a_frozen_server_is_left_alone_until_it_is_back(cluster, tmp_path):
    """Somebody who waits for it is told in time."""
    _, p, d, plain = cluster
    router = RouterProcess(tmp_path / "log", "--health-timeout", "3")
    try:
        with router.with_servers([p], [d]):
            with frozen(p):
                response = router.complete(prompt(1))
                assert response.status_code in (502, 503, 504), response.text
                assert response.json()["error"]["type"] == "router_error"
                router.wait(503)
            assert router.metric('vllm_router_server_failures_total{kind="prefill"}') > 0
            router.wait(200)
            assert router.tokens(prompt(1)) == plain.tokens(prompt(1))
    finally:
        router.close()


@pytest.mark.parametrize("kind", ["prefill", pytest.param("decode", marks=pytest.mark.slow)])
def test_a_request_goes_to_another_server_when_one_dies(cluster, doomed, tmp_path, kind):
    """The router does not know yet that the server is gone: its health is looked at later."""
    _, p, d, plain = cluster
    router = RouterProcess(tmp_path / "log", "--health-interval", "3600")
    try:
        with router.with_servers([p], [d]):
            second = doomed(PREFILL if kind == "prefill" else DECODE)
            assert router.join(kind, second.url)["healthy"]
            kill(second)
            got = [router.tokens(prompt(index)) for index in range(4)]
            failures = f'vllm_router_server_failures_total{{kind="{kind}"}}'
            assert router.metric(failures) == router.metric("vllm_router_retries_total") == 1
            assert router.metric(f'vllm_router_healthy_servers{{kind="{kind}"}}') == 1
    finally:
        router.close()
    assert got == [plain.tokens(prompt(index)) for index in range(4)]


@pytest.mark.parametrize("is_stream", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_decoder_that_dies_before_the_first_token_is_replaced(cluster, doomed, is_stream):
    """Prefill and all, whether the answer is a stream or not."""
    router, _, d, plain = cluster
    second = doomed(DECODE)
    router.leave("decode", d.url)
    assert router.join("decode", second.url)["healthy"]
    second.signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        if is_stream:
            answer = pool.submit(lambda: list(stream(router.url, 4, 12)))
        else:
            answer = pool.submit(router.tokens, prompt(4))
        wait_for(lambda: in_flight(router, "decode") == 1, "nothing was sent on")
        assert router.join("decode", d.url)["healthy"]
        kill(second)
        got = answer.result()
    if is_stream:
        assert got[-1] == "[DONE]"
        got = ids_of(got[:-1])
    assert got == plain.tokens(prompt(4))
    router.leave("decode", second.url)


@pytest.mark.parametrize("how", ["dies", pytest.param("freezes", marks=pytest.mark.slow)])
def test_a_decoder_that_fails_within_a_stream_ends_it_with_an_error(cluster, doomed, how):
    """What was drawn cannot be drawn again elsewhere: the client is told, and may ask again."""
    router, _, d, plain = cluster
    second = doomed(DECODE)
    router.leave("decode", d.url)
    assert router.join("decode", second.url)["healthy"]
    before = router.metric('vllm_router_requests_total{outcome="broken_off"}')
    events = stream(router.url, 2, ENDLESS)
    got = [next(events)]
    second.signal(signal.SIGSTOP)
    if how == "dies":
        kill(second)
    got += events
    assert got[-1] == "[DONE]"
    error = json.loads(got[-2])["error"]
    assert error["code"] == 502
    assert error["message"] == "the decode server failed within its answer"
    ids = ids_of(got[:-2])
    assert 0 < len(ids) < ENDLESS and ids == plain.tokens(prompt(2), len(ids))
    assert router.metric('vllm_router_requests_total{outcome="broken_off"}') == before + 1
    wait_for(lambda: in_flight(router, "decode") == 0, "a request is still counted")
    router.leave("decode", second.url)
    router.join("decode", d.url)


def test_a_client_that_leaves_ends_its_request_everywhere(cluster):
    router, _, d, _ = cluster
    with frozen(d), pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{router.url}/v1/completions", json=body_of(prompt(1), LONG), timeout=0.4)
    wait_for(lambda: in_flight(router, "decode") == 0, "a request is still counted")
    router.wait(200)
    events = stream(router.url, 1, LONG)
    next(events)
    events.close()
    wait_for(lambda: in_flight(router, "decode") == 0, "a request is still counted")
    d.wait_until_idle()
    d.wait_until_empty()


@pytest.mark.slow
def test_a_prefill_that_died_after_its_answer_fails_one_request_only(cluster, doomed):
    router, _, d, plain = cluster
    gone = doomed(PREFILL)
    params = gone.prefill(prompt(4))
    kill(gone)
    response = d.complete(prompt(4), 4, params)
    assert response.status_code == 500 and "could not be loaded" in response.text
    assert router.tokens(prompt(4)) == plain.tokens(prompt(4))
    d.wait_until_empty()
    response = d.complete(prompt(4), 4, {"do_remote_prefill": 1})
    assert response.status_code == 400 and "kv_transfer_params" in response.text


@pytest.mark.slow
def test_requests_survive_servers_that_come_and_go(cluster, doomed):
    """Under load, prefill and decode servers join, are killed and leave: no request notices."""
    router, _, _, plain = cluster
    prompts = [prompt(index % 12) for index in range(60)]
    expected = {index: plain.tokens(prompt(index)) for index in range(12)}
    wrong: list[str] = []
    stop = threading.Event()
    served = [0]

    def client() -> None:
        for turn, text in enumerate(prompts):
            if stop.is_set():
                return
            response = router.complete(text)
            served[0] += 1
            if response.status_code != 200 or tokens_of(response) != expected[turn % 12]:
                wrong.append(response.text)

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(client) for _ in range(3)]
        for setup, kind in ((PREFILL, "prefill"), (DECODE, "decode"), (PREFILL, "prefill")):
            server = doomed(setup)
            router.join(kind, server.url)
            time.sleep(1.0)
            kill(server)
            time.sleep(0.5)
            router.leave(kind, server.url)
        for future in clients:
            future.result()
    assert served[0] == 180
    assert not wrong, wrong[:2]
