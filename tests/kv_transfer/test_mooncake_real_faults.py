"""Servers over Mooncake while things go wrong for real: killed, frozen, lied to, too late.

As ``test_real_faults``; here both servers have a request at the same time, and the prefill server
writes into the decoder's memory.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import msgspec
import pytest
import zmq

from tests.entrypoints.server import free_port
from tests.kv_transfer.harness import Fleet, Setup, body_of, wait_for
from tests.kv_transfer.mooncake_servers import ask_of, bootstrap_of, fetch_of
from tests.kv_transfer.real_campaign import Outcome, RealCampaign, campaigns, schedule
from tests.kv_transfer.side_channel_proxy import FAULTS, SideChannelProxy
from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.messages import (
    Discard,
    Heartbeat,
    MooncakeXferMetadata,
    Wanted,
    Withdrawal,
    sealed,
)

LEASE, UNCLAIMED, SILENCE, TRANSFER = 3.0, 5.0, 3.0, 4.0
EXTRA = {
    "mooncake_protocol": "tcp",
    "kv_lease_duration": LEASE,
    "transfer_timeout": TRANSFER,
}
TIMES = (
    ("VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT", str(UNCLAIMED)),
    ("VLLM_MOONCAKE_CONNECTOR_TIMEOUT", str(SILENCE)),
)
KINDS = {
    "kill the prefill server before the fetch": 3,
    "kill the prefill server within requests": 4,
    "kill the decode server within requests": 4,
    "restart the prefill server under its name": 3,
    "freeze the prefill server within requests": 3,
    "freeze the prefill server beyond all patience": 2,
    "freeze the decode server beyond the lease": 3,
    "expire the lease": 3,
    "a prefill that never comes": 2,
    "replay parameters": 3,
    "garbage in parameters": 4,
    "leave within requests": 3,
    "noise at the bootstrap server": 2,
    "noise at the side channel": 3,
    "a bootstrap server that lies": 4,
    **{f"side channel: {fault}": 1 for fault in FAULTS},
    "side channel: garbage": 2,
}
"""How often each occurs in the campaign: 51 in all."""
NOISE = (
    b"",
    b"GET / HTTP/1.0\r\n\r\n",
    b"\x93\xff\xfe",
    sealed("text"),
    sealed({"type": "xfer"}),
    sealed(Heartbeat(remote_session="nobody", remote_tp_size=0, transfer_ids=["x"])),
    sealed(Discard(transfer_ids=["x", ""])),
    sealed(
        Withdrawal(remote_session="nobody", remote_tp_rank=9, remote_tp_size=3, requests={"a": "b"})
    ),
    sealed(
        MooncakeXferMetadata(
            remote_session="nobody",
            remote_tp_rank=0,
            remote_tp_size=1,
            req_blocks={
                "a": Wanted(
                    transfer_id="b", block_ids=[[1]], first_token=0, num_tokens=1, digest=b""
                )
            },
            layout_id="0",
            layout=b"\xc1",
        )
    ),
)


class Campaign(RealCampaign):
    def __init__(self, fleet: Fleet, seed: int, policy: str) -> None:
        side = ("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
        common = {"model": "llama", "connector": "MooncakeConnector", "extra": json.dumps(EXTRA)}
        prefill = Setup(role="kv_producer", name=f"p{seed}", environment=(side, *TIMES), **common)
        # Its prefix cache is emptied in between.
        dev = ("VLLM_SERVER_DEV_MODE", "1")
        decode = Setup(
            role="kv_consumer",
            policy=policy,
            name=f"d{seed}",
            environment=(dev, *TIMES),
            **common,
        )
        limit = LEASE + UNCLAIMED + SILENCE + TRANSFER + 10
        super().__init__(fleet, seed, policy, prefill, decode, limit)
        self.num_transfers = 0
        self.prefills: list[Future[Outcome | None]] = []

    def names(self, prompts: list[list[int]]) -> list[str]:
        self.num_transfers += len(prompts)
        return [f"x{self.num_transfers - i}" for i in range(len(prompts))]

    def prefill(self, prompts: list[list[int]], names: list[str], timeout: float = 30) -> None:
        """Started at the prefill server, all at the same time."""
        p = self.p

        def ask(prompt: list[int], name: str) -> Outcome | None:
            return self.post(p, {**body_of(prompt, 1), "kv_transfer_params": ask_of(name)}, timeout)

        pool = ThreadPoolExecutor(len(prompts))
        self.prefills = [pool.submit(ask, *pair) for pair in zip(prompts, names, strict=True)]
        pool.shutdown(wait=False)

    def params(self, names: list[str], **change: Any) -> list[dict[str, Any]]:
        bootstrap, engine_id = bootstrap_of(self.p), self.prefill_setup.name
        return [fetch_of(name, bootstrap, engine_id) | change for name in names]

    def ask(
        self, prompts: list[list[int]], timeout: float = 30, **change: Any
    ) -> list[Future[Outcome | None]]:
        """Both servers, at the same time; the decoder's answers."""
        names = self.names(prompts)
        params = self.params(names, **change)
        self.prefill(prompts, names, timeout)
        return self.decode(prompts, params, timeout)

    def fetched(self, prompts: list[list[int]]) -> list[Any]:
        """Without a fault: all must be right."""
        outcomes = self.all_answered(self.ask(prompts))
        assert all(status == 200 for status, _ in outcomes), outcomes
        self.judge("without a fault", prompts, outcomes)
        return outcomes

    def forget_prefixes(self) -> None:
        self.d.wait_until_empty(self.settles_within)
        assert self.d.post("/reset_prefix_cache").json() == {"success": True}

    # Faults

    def kill_the_prefill_server_before_the_fetch(self, prompts):
        params = self.params(self.names(prompts))
        self.kill(self.p)
        return self.all_answered(self.decode(prompts, params))

    def kill_the_prefill_server_within_requests(self, prompts):
        futures = self.ask(prompts)
        self.pause()
        self.kill(self.p)
        return self.all_answered(futures)

    def kill_the_decode_server_within_requests(self, prompts):
        futures = self.ask(prompts)
        self.pause()
        self.kill(self.d)
        outcomes = [future.result() for future in futures]
        assert None not in [future.result() for future in self.prefills]
        return outcomes

    def restart_the_prefill_server_under_its_name(self, prompts):
        futures = self.ask(prompts)
        self.pause()
        self.kill(self.p)
        late = self.all_answered(futures)
        self.fleet.get(self.prefill_setup)
        # The decoder may believe the old addresses for a moment; then it finds the new ones.
        self.judge("after a restart", prompts, self.all_answered(self.ask(prompts)))
        self.forget_prefixes()
        self.fetched(prompts)
        return late

    def freeze_the_prefill_server_within_requests(self, prompts):
        futures = self.ask(prompts)
        self.pause()
        self.p.signal(signal.SIGSTOP)
        time.sleep(0.5)
        self.p.signal(signal.SIGCONT)
        return self.all_answered(futures)

    def freeze_the_prefill_server_beyond_all_patience(self, prompts):
        """The decoder answers without it; its blocks come back when it has woken up."""
        params = self.params(self.names(prompts))
        self.p.signal(signal.SIGSTOP)
        try:
            return self.all_answered(self.decode(prompts, params))
        finally:
            self.p.signal(signal.SIGCONT)

    def freeze_the_decode_server_beyond_the_lease(self, prompts):
        futures = self.ask(prompts)
        self.pause()
        self.d.signal(signal.SIGSTOP)
        time.sleep(LEASE + 0.5)
        self.p.wait_until_empty(self.settles_within)
        self.d.signal(signal.SIGCONT)
        return [future.result() for future in futures]

    def expire_the_lease(self, prompts):
        names = self.names(prompts)
        self.prefill(prompts, names)
        assert all(future.result()[0] == 200 for future in self.prefills)
        self.p.wait_until_empty(UNCLAIMED + 10)
        outcomes = self.all_answered(self.decode(prompts, self.params(names)))
        if self.policy == "fail":
            assert all(status == 500 for status, _ in outcomes), outcomes
        return outcomes

    def a_prefill_that_never_comes(self, prompts):
        outcomes = self.all_answered(self.decode(prompts, self.params(self.names(prompts))))
        if self.policy == "fail":
            assert all(status == 500 for status, _ in outcomes), outcomes
        return outcomes

    def replay_parameters(self, prompts):
        names = self.names(prompts)
        self.prefill(prompts, names)
        first = self.all_answered(self.decode(prompts, self.params(names)))
        assert all(status == 200 for status, _ in first), first
        self.judge("before a replay", prompts, first)
        self.forget_prefixes()
        again = self.all_answered(self.decode(prompts, self.params(names)))
        if self.policy == "fail":
            assert all(status == 500 for status, _ in again), again
        return again

    def garbage_in_parameters(self, prompts):
        names = self.names(prompts)
        self.prefill(prompts, names)
        spoilt = []
        for params in self.params(names):
            name = self.rng.choice(sorted(params))
            value = self.rng.choice([None, -1, 1 << 70, "x" * 600, [["a"]], {}, 0.5, True])
            spoilt.append(params | {name: value})
        return self.all_answered(self.decode(prompts, spoilt))

    def leave_within_requests(self, prompts):
        futures = self.ask(prompts, timeout=self.rng.choice((0.01, 0.03, 0.1)))
        return [future.result() for future in futures]

    def noise_at_the_bootstrap_server(self, prompts):
        futures = self.ask(prompts)
        port = self.p.side_port
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(self.rng.randbytes(self.rng.randint(0, 400)))
        for path in ("register", "discard"):
            for body in (b"", b"[1]", b'{"transfer_ids": [5]}', self.rng.randbytes(90)):
                url = f"{bootstrap_of(self.p)}/{path}"
                assert httpx.post(url, content=body).status_code in (400, 422)
        return self.all_answered(futures)

    def noise_at_the_side_channel(self, prompts):
        before = self.p.metric("vllm:kv_refused_notifications_total")
        (address,) = self.addresses().values()
        futures = self.ask(prompts)
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.setsockopt(zmq.LINGER, 1000)
            stranger.connect(address)
            for _ in range(40):
                stranger.send(self.rng.choice((*NOISE, self.rng.randbytes(60))))
            assert stranger.poll(5000), "noise is not answered"
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(self.rng.randbytes(300))
        outcomes = self.all_answered(futures)
        assert all(status == 200 for status, _ in outcomes), outcomes
        wait_for(
            lambda: self.p.metric("vllm:kv_refused_notifications_total") > before,
            "nothing was refused",
        )
        return outcomes

    def addresses(self) -> dict[str, str]:
        """Of the prefill server's workers, by rank."""
        found = httpx.get(f"{bootstrap_of(self.p)}/query").json()["0"]["worker_addr"]
        return {rank: stages["0"] for rank, stages in found.items()}

    def a_bootstrap_server_that_lies(self, prompts):
        name = self.prefill_setup.name
        lie = self.rng.choice(
            (
                b"",
                self.rng.randbytes(100),
                b"[]",
                b'{"0": 5}',
                b'{"0": {"engine_id": "' + b"x" * (1 << 21) + b'"}}',
                entry(name, {"0": {"0": "http://127.0.0.1:80"}}),
                entry(name, {"0": {"0": f"tcp://127.0.0.1:{free_port()}"}}),
                entry(name, {"0": {"0": f"tcp://127.0.0.1:{self.d.side_port}"}}),
                entry(name, {"0": {"0": "tcp://127.0.0.1:1", "1": "tcp://127.0.0.1:2"}}),
                entry(name, {"-1": {"0": "tcp://127.0.0.1:1"}}),
                entry(name, {str(rank): {"0": "tcp://127.0.0.1:1"} for rank in range(3)}),
            )
        )
        with bootstrap_that_says(lie) as address:
            return self.all_answered(self.ask(prompts, remote_bootstrap_addr=address))

    def side_channel(self, prompts, fault):
        (address,) = self.addresses().values()
        port, late = int(address.rpartition(":")[2]), SILENCE + 1.5
        with SideChannelProxy(port, fault, self.rng, late) as proxy:
            there = {"0": {"0": f"tcp://127.0.0.1:{proxy.port}"}}
            with bootstrap_that_says(entry(self.prefill_setup.name, there)) as bootstrap:
                outcomes = self.all_answered(self.ask(prompts, remote_bootstrap_addr=bootstrap))
            assert proxy.num_spoiled
            # What is still owed to the decoder must reach it, as its blocks wait for that.
            proxy.be_honest()
            self.d.wait_until_empty(self.settles_within)
        if fault in ("delay", "duplicate", "reorder"):
            assert all(status == 200 for status, _ in outcomes), outcomes
        return outcomes


def entry(engine_id: str, addresses: dict[str, dict[str, str]]) -> bytes:
    """A bootstrap server's answer."""
    return msgspec.json.encode({"0": {"engine_id": engine_id, "worker_addr": addresses}})


@contextlib.contextmanager
def bootstrap_that_says(answer: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def campaign_of(mooncake_fleet):
    with campaigns(Campaign, mooncake_fleet) as make:
        yield make


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_requests_end_right_or_with_an_error_whatever_happens(campaign_of, policy, part):
    """An eighth of the faults each."""
    campaign = campaign_of(part + (10 if policy == "fail" else 20), policy)
    first = part + (0 if policy == "fail" else 4)
    campaign.run(schedule(KINDS, 7)[first::8])
    campaign.report()
    assert campaign.outcomes["right"] > 0


def test_there_are_at_least_fifty_faults():
    kinds = schedule(KINDS, 7)
    assert len(kinds) >= 50
    assert all(hasattr(Campaign, kind.partition(": ")[0].replace(" ", "_")) for kind in kinds)
