"""Starts a prefill server, a decode server and the router on this machine, and asks a question.

    pip install nixl     # or mooncake-transfer-engine-non-cuda, with apt-get install libibverbs1
    python examples/disaggregated/serve.py [MODEL] [--connector mooncake]

Everything ends with Ctrl-C, or at once with ``--once``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx

PREFILL, DECODE, ROUTER, BOOTSTRAP = 8100, 8200, 8000, 8998
CONNECTORS = {
    "nixl": {"kv_connector": "NixlConnector"},
    "mooncake": {
        "kv_connector": "MooncakeConnector",
        "kv_connector_extra_config": {"mooncake_protocol": "tcp"},
    },
}


def transfer_config(connector: str, role: str) -> str:
    return json.dumps({**CONNECTORS[connector], "kv_role": role})


@contextlib.contextmanager
def running(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A ``vllm`` command in a process of its own, ended with the block."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments]
    process = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def wait_for(url: str, *processes: subprocess.Popen[bytes]) -> None:
    while all(process.poll() is None for process in processes):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise SystemExit(f"a server ended before {url} was ready")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--connector", choices=tuple(CONNECTORS), default="nixl")
    parser.add_argument("--kv-cache-memory-bytes", default="1G", help="of each server")
    parser.add_argument("--once", action="store_true", help="end after the answer")
    parser.add_argument("--question", default="What is a KV cache? Answer in one sentence.")
    options = parser.parse_args()
    # By itself, each would take what one machine or GPU has for caches.
    share = ("--kv-cache-memory-bytes", options.kv_cache_memory_bytes)
    # NIXL: each engine answers handshakes on a port of its own. Mooncake: decoders and the router
    # find prefill workers through the bootstrap server of their engine.
    prefill = running(
        *("serve", options.model, "--port", str(PREFILL), *share),
        *("--kv-transfer-config", transfer_config(options.connector, "kv_producer")),
        VLLM_NIXL_SIDE_CHANNEL_PORT="5600",
        VLLM_MOONCAKE_BOOTSTRAP_PORT=str(BOOTSTRAP),
    )
    decode = running(
        *("serve", options.model, "--port", str(DECODE), *share),
        *("--kv-transfer-config", transfer_config(options.connector, "kv_consumer")),
        VLLM_NIXL_SIDE_CHANNEL_PORT="5601",
    )
    router = running(
        *("router", "--port", str(ROUTER), "--connector", options.connector),
        *("--prefill", f"http://127.0.0.1:{PREFILL}", "--decode", f"http://127.0.0.1:{DECODE}"),
        VLLM_MOONCAKE_BOOTSTRAP_PORT=str(BOOTSTRAP),
    )
    with prefill as first, decode as second, router as third:
        wait_for(f"http://127.0.0.1:{ROUTER}/health", first, second, third)
        answer = httpx.post(
            f"http://127.0.0.1:{ROUTER}/v1/chat/completions",
            json={
                "model": options.model,
                "messages": [{"role": "user", "content": options.question}],
                "max_tokens": 64,
                "temperature": 0,
            },
            timeout=300,
        )
        answer.raise_for_status()
        print(options.question)
        print(answer.json()["choices"][0]["message"]["content"])
        if not options.once:
            print(f"The router listens on http://127.0.0.1:{ROUTER}/v1; Ctrl-C ends everything.")
            with contextlib.suppress(KeyboardInterrupt):
                third.wait()


if __name__ == "__main__":
    main()
