"""Sends requests when they are due, from one process or several, and gathers what came of them.

Knows HTTP servers and samples; nothing of datasets, tokenizers or statistics.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

import httpx
import numpy as np
from tqdm import tqdm

import vllm.envs as envs
from vllm.benchmarks.args import ServeArgs
from vllm.benchmarks.client import Connections, Outcome, request_body, send
from vllm.benchmarks.datasets import Sample
from vllm.errors import ConfigError, VLLMError
from vllm.utils.processes import child_command

__all__ = ["Load", "Target", "client_main", "due_times", "pairs", "send_all"]

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "logprobs")
_READY_PAUSE = 0.5
# Until the clock starts once all clients are there: none may be late.
_HEAD_START = 0.05
_START = struct.Struct("d")


def pairs(option: str, items: Sequence[str] | None) -> dict[str, str]:
    """KEY=VALUE items as a dictionary.

    Raises:
        ConfigError: an item without "=".
    """
    result = {}
    for item in items or ():
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{option} takes KEY=VALUE, not {item!r}", parameter=option)
        result[key] = value
    return result


class Target:
    """Where requests go, and what every one of them holds."""

    def __init__(self, args: ServeArgs) -> None:
        base = args.base_url or f"http://{args.host}:{args.port}"
        if not base.startswith(("http://", "https://")):
            raise ConfigError(
                f"--base-url must begin with http:// or https://, not {base!r}",
                parameter="base_url",
                value=base,
            )
        self.base = base.rstrip("/")
        self.chat = args.backend == "openai-chat"
        default = "/v1/chat/completions" if self.chat else "/v1/completions"
        self.endpoint = args.endpoint or default
        if self.chat != self.endpoint.rstrip("/").endswith("chat/completions"):
            raise ConfigError(
                f"--backend {args.backend} does not fit --endpoint {self.endpoint}; use {default}",
                parameter="endpoint",
                value=self.endpoint,
            )
        self.url = self.base + "/" + self.endpoint.lstrip("/")
        self.headers = pairs("--header", args.header)
        # The pieces of a stream are timed as they come off the wire, so none may be compressed.
        self.headers["Accept-Encoding"] = "identity"
        if envs.VLLM_API_KEY:
            self.headers.setdefault("Authorization", f"Bearer {envs.VLLM_API_KEY}")
        self.sampling = {
            name: value for name in _SAMPLING if (value := getattr(args, name)) is not None
        }
        if args.ignore_eos:
            self.sampling["ignore_eos"] = True
        self.sampling |= args.extra_body
        self.model = args.served_model_name or args.model or ""

    async def send(self, connections: Connections, sample: Sample) -> Outcome:
        body = request_body(sample, chat=self.chat, model=self.model, sampling=self.sampling)
        with connections.one() as client:
            return await send(client, self.url, sample, body)

    async def wait_until_ready(self, connections: Connections, timeout: float) -> None:
        """Ask for the models until the server answers; takes the first for ``model`` if unset.

        Raises:
            VLLMError: no answer within ``timeout`` seconds, or one that names no model.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                with connections.one() as client:
                    answer = await client.get(f"{self.base}/v1/models")
                if answer.status_code == 200:
                    break
                problem = f"status {answer.status_code}: {answer.text.strip()}"
                if 400 <= answer.status_code < 500:
                    raise VLLMError(f"{self.base}/v1/models answered {problem}")
            except httpx.HTTPError as error:
                problem = str(error) or type(error).__name__
            if time.monotonic() >= deadline:
                raise VLLMError(f"no server is ready at {self.base}: {problem} (--base-url)")
            await asyncio.sleep(_READY_PAUSE)
        if not self.model:
            models = answer.json().get("data", [])
            if not models:
                raise VLLMError(f"the server at {self.base} serves no model")
            self.model = models[0]["id"]


def due_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which each request is due: gaps are gamma distributed, 1 / rate on
    average; an infinite rate has none.
    """
    if rate == float("inf"):
        return [0.0] * count
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), count)
    return (np.cumsum(gaps) - gaps[0]).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one client process sends: samples, when each is due, and how many at once."""

    samples: Sequence[Sample]
    dues: Sequence[float]
    max_concurrency: int | None
    shows_progress: bool

    def share(self, index: int, count: int) -> Load:
        """Every ``count``-th request from ``index`` on, and that share of what may be in flight."""
        limit = self.max_concurrency
        return replace(
            self,
            samples=self.samples[index::count],
            dues=self.dues[index::count],
            max_concurrency=None if limit is None else limit // count + (index < limit % count),
            shows_progress=False,
        )

    async def run(self, target: Target, connections: Connections, start: float) -> list[Outcome]:
        """All outcomes in the order of the samples; ``start`` is a ``time.perf_counter``."""
        limit: contextlib.AbstractAsyncContextManager[Any] = (
            asyncio.Semaphore(self.max_concurrency)
            if self.max_concurrency
            else contextlib.nullcontext()
        )
        progress = tqdm(total=len(self.samples), disable=not self.shows_progress, unit="req")

        async def one(sample: Sample) -> Outcome:
            async with limit:
                outcome = await target.send(connections, sample)
            progress.update()
            return outcome

        tasks = []
        for sample, due in zip(self.samples, self.dues, strict=True):
            if (early := start + due - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            tasks.append(asyncio.create_task(one(sample)))
        outcomes = await asyncio.gather(*tasks)
        progress.close()
        return list(outcomes)


async def _run_alone(target: Target, load: Load, start: float) -> list[Outcome]:
    async with contextlib.aclosing(Connections(target.headers)) as connections:
        return await load.run(target, connections, start)


def send_all(target: Target, load: Load, num_processes: int) -> tuple[list[Outcome], float]:
    """Send ``load`` from ``num_processes`` processes; all outcomes in the order of the samples,
    and the seconds they took together.

    Raises:
        VLLMError: a client process ended without its outcomes.
    """
    num_processes = min(num_processes, len(load.samples), load.max_concurrency or sys.maxsize)
    if num_processes == 1:
        start = time.perf_counter()
        outcomes = asyncio.run(_run_alone(target, load, start))
        return outcomes, time.perf_counter() - start
    command = child_command("vllm.benchmarks.load:client_main")
    clients = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(num_processes)
    ]
    try:
        for index, client in enumerate(clients):
            _tell(client, pickle.dumps((target, load.share(index, num_processes))))
        for client in clients:
            _hear(client)
        start = time.perf_counter() + _HEAD_START
        for client in clients:
            _tell(client, _START.pack(start))
        parts: list[list[Outcome]] = [_hear(client) for client in clients]
    finally:
        for client in clients:
            client.kill()
            client.communicate()
    outcomes = [parts[i % num_processes][i // num_processes] for i in range(len(load.samples))]
    ends = [outcome.end for outcome in outcomes if outcome.end]
    return outcomes, max(ends, default=time.perf_counter()) - start


def _tell(client: subprocess.Popen[bytes], message: bytes) -> None:
    assert client.stdin is not None
    # One that has ended is noticed when its answer is read.
    with contextlib.suppress(BrokenPipeError):
        client.stdin.write(message)
        client.stdin.flush()


def _hear(client: subprocess.Popen[bytes]) -> Any:
    assert client.stdout is not None
    try:
        return pickle.load(client.stdout)
    except EOFError:
        status = client.wait()
        raise VLLMError(f"a client process of the benchmark ended with status {status}") from None


def client_main() -> None:
    """A client process: says when it is ready, is told when to start, answers its outcomes."""
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    target, load = pickle.load(stdin)
    _answer(stdout, "ready")
    (start,) = _START.unpack(stdin.read(_START.size))
    _answer(stdout, asyncio.run(_run_alone(target, load, start)))


def _answer(stdout: IO[bytes], message: Any) -> None:
    pickle.dump(message, stdout)
    stdout.flush()
