"""CPU time that the server's processes spend on a streamed token, with a model that does nothing.

``vllm serve`` runs with ``host_cost``'s stub, which here waits before each step, so that the API
server keeps up and sends every token by itself. What is counted is CPU time of the processes, which
other work on the machine disturbs less than it does times: the API server takes tokens in, makes
text, counts, and writes an event to a socket; the engine schedules and sends.

python benchmarks/http_cost.py [--streams 256] [--chat] [--output FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from host_cost import StubModel
from machine import cpu_name, num_cores
from server import Server, serve

from vllm.v1.worker.cpu_worker import CPUWorker

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

HERE = str(Path(__file__).resolve().parent)
# Ids of SmolLM2's vocabulary that are pieces of words: each shows as text at once.
FIRST_TOKEN = 300
NUM_TOKENS = 16
STEP_SECONDS = 0.05


class PacedWorker(CPUWorker):
    """The stub, with logits that choose words, and no more than a step in ``STEP_SECONDS``."""

    def load_model(self) -> None:
        config = self.vllm_config
        model = StubModel(config, config.scheduler_config.max_num_batched_tokens)
        others = torch.zeros(model.logits.shape[0], FIRST_TOKEN)
        model.logits = torch.cat((others, model.logits[:, :NUM_TOKENS]), dim=1).contiguous()
        self.model_runner.vocab_size = FIRST_TOKEN + NUM_TOKENS
        self.model_runner.set_model(model)

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        time.sleep(STEP_SECONDS)
        return super().execute_model(scheduler_output)


async def stream(address: tuple[str, int], path: str, body: bytes) -> int:
    """Events of one streamed answer, read without looking at them."""
    reader, writer = await asyncio.open_connection(*address)
    head = f"POST {path} HTTP/1.1\r\nHost: {address[0]}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    events = 0
    while piece := await reader.read(1 << 16):
        events += piece.count(b"data: ")
    writer.close()
    return events


def run(server: Server, args: argparse.Namespace) -> dict[str, float]:
    """One round of ``--streams`` requests: microseconds of CPU a token, by process."""
    body: dict[str, Any] = {"model": args.model, "max_tokens": args.tokens, "ignore_eos": True}
    body |= {"temperature": 0, "stream": True}
    if args.chat:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": "Tell me of the sea"}]
    else:
        path, body["prompt"] = "/v1/completions", "The sea is"
    url = urlsplit(server.url)
    assert url.hostname and url.port
    address, content = (url.hostname, url.port), json.dumps(body).encode()

    async def all_streams() -> list[int]:
        streams = (stream(address, path, content) for _ in range(args.streams))
        return await asyncio.gather(*streams)

    def seconds() -> list[float]:
        times = [process.cpu_times() for process in server.processes()[:2]]
        return [each.user + each.system for each in times]

    before = seconds()
    events = asyncio.run(all_streams())
    api, engine = (end - begin for begin, end in zip(before, seconds(), strict=True))
    tokens = args.streams * args.tokens
    return {
        "api_server_us": round(1e6 * api / tokens, 2),
        "engine_us": round(1e6 * engine / tokens, 2),
        "events_per_token": round(sum(events) / tokens, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--output", type=Path, help="also write this JSON file")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH"))))
    flags = ["--worker-cls", "http_cost.PacedWorker", "--max-num-seqs", str(args.streams)]
    flags += ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(2 << 30)]
    with serve(args.model, *flags) as server:
        run(server, args)
        rounds = [run(server, args) for _ in range(args.rounds)]
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"{cpu_name()}, {num_cores()} cores",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "command": f"python benchmarks/http_cost.py {' '.join(sys.argv[1:])}".strip(),
        "streams": args.streams,
        "cpu_per_token": {name: median(part[name] for part in rounds) for name in rounds[0]},
        "rounds": rounds,
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
