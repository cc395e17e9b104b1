"""Servers that speak Mooncake, as processes: their setups, a router before them, and requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.entrypoints.server import PATIENCE
from tests.kv_transfer.harness import (
    STATEFUL,
    Engine,
    Fleet,
    RouterProcess,
    Setup,
    in_parallel,
)

TCP = json.dumps({"mooncake_protocol": "tcp"})


def setup(model: str, **more: Any) -> Setup:
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

    def __enter__(self) -> Cluster:
        self.router.wait()
        return self

    def __exit__(self, *_: Any) -> None:
        self.router.close()

    def settle(self) -> None:
        self.p.wait_until_empty()
        self.d.wait_until_empty()


def compare(cluster: Cluster, asked: Sequence[list[int]]) -> None:
    """Tokens through the router are those of a plain server; nothing is left behind."""
    plain = in_parallel(cluster.plain.tokens, asked)
    before = cluster.d.metric("vllm:kv_transfers_total")
    got = in_parallel(cluster.router.tokens, asked)
    wrong = [index for index, pair in enumerate(zip(got, plain, strict=True)) if pair[0] != pair[1]]
    assert not wrong, f"prompts {wrong} of {len(asked)} differ"
    # Every rank counts its own.
    loaded = cluster.d.metric("vllm:kv_transfers_total") - before
    assert loaded == len(asked) * cluster.d.setup.tp
    cluster.settle()


def prompts(count: int, longest: int = 180) -> list[list[int]]:
    lengths = [2 + (i * 37) % longest for i in range(count)]
    return [
        [3 + (i * 7 + n * 13 + j * (n + 3)) % 90 for j in range(n)] for i, n in enumerate(lengths)
    ]


def bootstrap_of(engine: Engine) -> str:
    return f"http://127.0.0.1:{engine.side_port}"


def engine_id_of(engine: Engine) -> str:
    response = httpx.get(f"{bootstrap_of(engine)}/query", timeout=PATIENCE)
    return response.json()["0"]["engine_id"]


def ask_of(transfer_id: str) -> dict[str, Any]:
    """What the prefill server is asked."""
    return {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}


def fetch_of(transfer_id: str, bootstrap: str, engine_id: str) -> dict[str, Any]:
    """What the decode server is asked."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "transfer_id": transfer_id,
        "remote_bootstrap_addr": bootstrap,
        "remote_engine_id": engine_id,
    }
