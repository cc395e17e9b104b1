"""What handing a request from a prefill to a decode server costs, beyond the copy itself.

    python benchmarks/kv_transfer/handover.py [--repeats 50] [--output FILE]

Two servers of SmolLM2 on this machine with NixlConnector. For each prompt: P computes it, then D
gets it with P's parameters and answers one token. Of D's time, the metrics tell the copy (order
until the lease is confirmed); a step of one token is what D takes for each of more tokens.
Handover is D's whole time without both: HTTP, scheduling, waiting for the transfer to be noticed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from typing import Any

KEEP = {"do_remote_decode": True, "do_remote_prefill": False}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Server:
    def __init__(self, model: str, role: str) -> None:
        self.port = free_port()
        config = {"kv_connector": "NixlConnector", "kv_role": role}
        environment = {
            **os.environ,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
            "UCX_NET_DEVICES": "lo",
            "NIXL_LOG_LEVEL": "ERROR",
        }
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
        command += ["--port", str(self.port), "--max-model-len", "1024"]
        command += ["--kv-cache-memory-bytes", "256M", "--no-enable-prefix-caching"]
        command += ["--kv-transfer-config", json.dumps(config)]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def wait(self) -> None:
        for _ in range(600):
            try:
                self._get("/health")
                return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError("the server did not start")

    def _get(self, path: str) -> str:
        url = f"http://127.0.0.1:{self.port}{path}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())

    def complete(self, prompt: list[int], count: int, params: Any = None) -> tuple[float, Any]:
        """(ms, answer)."""
        body: dict[str, Any] = {"model": "smollm2", "prompt": prompt, "max_tokens": count}
        body |= {"temperature": 0, "ignore_eos": True, "kv_transfer_params": params}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        begin = time.perf_counter()
        with urllib.request.urlopen(request, timeout=120) as answer:
            found = json.load(answer)
        return (time.perf_counter() - begin) * 1e3, found

    def metric(self, name: str) -> float:
        lines = self._get("/metrics").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def measure(p: Server, d: Server, tokens: int, repeats: int) -> dict[str, float]:
    rng = random.Random(1)
    rows: list[tuple[float, float, float, float]] = []
    for repeat in range(repeats + 2):
        prompt = [rng.randrange(10, 40000) for _ in range(tokens)]
        prefill, answer = p.complete(prompt, 1, KEEP)
        before = d.metric("vllm:kv_transfer_seconds_total")
        whole, _ = d.complete(prompt, 1, answer["kv_transfer_params"])
        copy = (d.metric("vllm:kv_transfer_seconds_total") - before) * 1e3
        again = p.complete(prompt, 1, KEEP)[1]["kv_transfer_params"]
        longer, _ = d.complete(prompt, 9, again)
        if repeat >= 2:
            rows.append((prefill, whole, copy, (longer - whole) / 8))
    prefill, whole, copy, step = (statistics.median(column) for column in zip(*rows, strict=True))
    beyond = statistics.median(row[1] - row[2] - row[3] for row in rows)
    return {
        "prompt_tokens": tokens,
        "prefill_ms": round(prefill, 2),
        "d_first_token_ms": round(whole, 2),
        "copy_ms": round(copy, 2),
        "step_ms": round(step, 2),
        "handover_beyond_copy_ms": round(beyond, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--output")
    options = parser.parse_args()
    servers = [Server(options.model, role) for role in ("kv_producer", "kv_consumer")]
    try:
        for server in servers:
            server.wait()
        found = measure(*servers, options.tokens, options.repeats)
    finally:
        for server in servers:
            server.process.terminate()
        for server in servers:
            server.process.wait(20)
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"CPU, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()},
        "command": " ".join(["python", *sys.argv]),
        "repeats": options.repeats,
        **found,
    }
    print(json.dumps(result, indent=2))
    if options.output:
        with open(options.output, "w") as file:
            json.dump(result, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
