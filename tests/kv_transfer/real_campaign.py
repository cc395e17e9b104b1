"""Prefill and decode servers as processes, what is done to them, and what must be true after it.

Whatever the connector: every request ends with the right tokens or a clear error, no block is lost,
and whoever is left serves at once. Which faults there are, a connector's own campaign says.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx

from tests.kv_transfer.harness import Engine, Fleet, Setup, body_of

SERVES_WITHIN = 2.0
Outcome = tuple[int, Any]
"""Status and body of an answer."""


class RealCampaign:
    """One prefill and one decode server, and what happens to them, by seed.

    A fault is a method that takes prompts (and a detail, behind a colon in the fault's name), asks
    for them, does its harm, and returns what became of each; None is for a connection that broke.

    Args:
        policy: ``kv_load_failure_policy`` of the decoder.
        settles_within: seconds until every block is back, whatever has happened.
    """

    def __init__(
        self,
        fleet: Fleet,
        seed: int,
        policy: str,
        prefill: Setup,
        decode: Setup,
        settles_within: float,
    ) -> None:
        self.fleet, self.policy = fleet, policy
        self.rng = random.Random(seed)
        self.prefill_setup, self.decode_setup = prefill, decode
        self.plain_setup = Setup(model=prefill.model)
        self.settles_within = settles_within
        self.outcomes: Counter[str] = Counter()
        self.by_kind: dict[str, Counter[str]] = {}
        self.slowest = 0.0

    @property
    def p(self) -> Engine:
        return self.fleet.get(self.prefill_setup)

    @property
    def d(self) -> Engine:
        return self.fleet.get(self.decode_setup)

    def prompts(self, count: int) -> list[list[int]]:
        rng = self.rng
        return [[rng.randrange(3, 190) for _ in range(rng.randint(20, 200))] for _ in range(count)]

    def run(self, kinds: Iterable[str]) -> None:
        for kind in kinds:
            # A lease would not outlast a start.
            self.fleet.all_of(self.prefill_setup, self.decode_setup, self.plain_setup)
            what, _, detail = kind.partition(": ")
            fault = getattr(self, what.replace(" ", "_"))
            prompts = self.prompts(self.rng.randint(1, 4))
            outcomes = fault(prompts, *([detail] if detail else []))
            self.judge(kind, prompts, outcomes)
            self.survivors_serve(kind)

    def judge(self, kind: str, prompts: list[list[int]], outcomes: list[Outcome | None]) -> None:
        plain = self.fleet.get(self.plain_setup)
        for prompt, outcome in zip(prompts, outcomes, strict=True):
            if outcome is None:
                self.count(kind, "gone")
                continue
            status, body = outcome
            if status == 200:
                expected = plain.tokens(prompt)
                got = body["choices"][0]["token_ids"]
                assert got == expected, f"{kind}: wrong tokens for {len(prompt)} tokens"
                self.count(kind, "right")
                continue
            assert status in (400, 500, 502, 503), f"{kind}: {status} {body}"
            assert body["error"]["message"], f"{kind}: an error that says nothing"
            self.count(kind, "error")

    def count(self, kind: str, outcome: str) -> None:
        self.outcomes[outcome] += 1
        self.by_kind.setdefault(kind, Counter())[outcome] += 1

    def survivors_serve(self, kind: str) -> None:
        """At once, and with every block given back."""
        (prompt,) = self.prompts(1)
        expected = self.fleet.get(self.plain_setup).tokens(prompt)
        ours = (self.prefill_setup, self.decode_setup)
        running = [self.fleet.running[setup] for setup in ours if setup in self.fleet.running]
        alive = [engine for engine in running if engine.alive]
        for engine in alive:
            begin = time.monotonic()
            try:
                response = engine.complete(prompt, timeout=SERVES_WITHIN)
            except httpx.TimeoutException:
                who = f"{kind}: {engine.setup.role}"
                raise AssertionError(f"{who} has not served in {SERVES_WITHIN:g} s") from None
            self.slowest = max(self.slowest, time.monotonic() - begin)
            assert response.status_code == 200, f"{kind}: {response.text}"
            assert response.json()["choices"][0]["token_ids"] == expected, kind
        for engine in alive:
            engine.wait_until_empty(self.settles_within)

    def report(self) -> None:
        """For whoever runs it with ``-s``."""
        print(self.policy, dict(self.outcomes), f"slowest survivor {self.slowest:.3f} s")
        for kind, outcomes in sorted(self.by_kind.items()):
            print(f"  {kind}: {dict(outcomes)}")

    # Requests

    def decode(
        self, prompts: list[list[int]], params: list[dict[str, Any]], timeout: float = 30
    ) -> list[Future[Outcome | None]]:
        """Started, all at the same time."""
        d = self.d

        def ask(prompt: list[int], given: dict[str, Any]) -> Outcome | None:
            return self.post(d, {**body_of(prompt, 12), "kv_transfer_params": given}, timeout)

        pool = ThreadPoolExecutor(len(prompts))
        futures = [pool.submit(ask, *pair) for pair in zip(prompts, params, strict=True)]
        pool.shutdown(wait=False)
        return futures

    @staticmethod
    def post(engine: Engine, body: dict[str, Any], timeout: float) -> Outcome | None:
        try:
            with httpx.Client(base_url=engine.url, timeout=timeout) as client:
                response = client.post("/v1/completions", json=body)
        except httpx.TransportError:
            return None
        return response.status_code, response.json()

    @staticmethod
    def all_answered(futures: list[Future[Outcome | None]]) -> list[Any]:
        """All must be: nobody has hurt the decoder."""
        outcomes = [future.result() for future in futures]
        assert None not in outcomes, "the decode server broke off an answer"
        return outcomes

    def kill(self, engine: Engine) -> None:
        engine.signal(signal.SIGKILL)
        engine.process.wait()

    def pause(self) -> None:
        time.sleep(self.rng.choice((0.0, 0.01, 0.03, 0.1)))


C = TypeVar("C", bound=RealCampaign)


@contextmanager
def campaigns(kind: type[C], fleet: Fleet) -> Iterator[Callable[..., C]]:
    """Begins campaigns on a fleet; their servers, whatever was done to them, end with it."""
    made: list[C] = []

    def make(*args: Any, **kwargs: Any) -> C:
        made.append(kind(fleet, *args, **kwargs))
        return made[-1]

    yield make
    for campaign in made:
        for setup in (campaign.prefill_setup, campaign.decode_setup):
            if setup in fleet.running:
                fleet.end(setup)


def schedule(kinds: dict[str, int], seed: int) -> list[str]:
    """Every kind as often as it says, in an order by seed."""
    all_of_them = [kind for kind, count in kinds.items() for _ in range(count)]
    random.Random(seed).shuffle(all_of_them)
    return all_of_them
