"""Prefill, decode and plain servers as processes over tiny checkpoints, and the router.

A ``Setup`` says what a server is; a ``Fleet`` starts it, keeps it for the next test that wants the
same, and ends all by process id. Any connector may be named.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from safetensors.torch import load_file, save_file

from tests.entrypoints.server import BRIEF, PATIENCE, Server, free_port
from tests.models.checkpoints import make_hf_model, save
from tests.models.linear_attention_checkpoints import make_linear_model
from tests.models.state_checkpoints import make_state_model

KEY = "join me"
MAX_MODEL_LEN = 256
SMOLLM2 = "smollm2"
CHECKPOINTS: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(),
    "mamba 2 and attention": lambda: make_state_model("bamba"),
    "gated delta net and attention": lambda: make_linear_model("qwen3_next"),
    "latent attention": lambda: make_hf_model("deepseek_v3"),
    "sliding windows": lambda: make_hf_model("mistral", sliding_window=24),
}
"""SmolLM2 comes from its package; the others are made once a session."""
MODELS = (SMOLLM2, *CHECKPOINTS)
SCALED = "llama with cache scales"
SCALES = (0.03, 0.07)
"""Of K and V of its cache, where that has one scale a side."""
STATEFUL = ("mamba 2 and attention", "gated delta net and attention")
ASK = {"do_remote_decode": True, "do_remote_prefill": False}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What distinguishes one server from another."""

    model: str
    role: str | None = None
    """None: a plain server, without connector."""
    connector: str = "NixlConnector"
    module_path: str | None = None
    """Of a connector that is not ours."""
    tp: int = 1
    block_size: int = 16
    layout: str | None = None
    """None: what the engine chooses."""
    policy: str = "fail"
    extra: str = "{}"
    """``kv_connector_extra_config`` as JSON."""
    buffer_device: str | None = None
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    name: str = ""
    """Of otherwise equal servers; their engine id."""

    def transfer_config(self) -> dict[str, Any]:
        config = {
            "kv_connector": self.connector,
            "kv_role": self.role,
            "kv_load_failure_policy": self.policy,
            "kv_connector_extra_config": json.loads(self.extra),
            "kv_buffer_device": self.buffer_device,
        }
        if self.module_path is not None:
            config["kv_connector_module_path"] = self.module_path
        return config | ({"engine_id": self.name} if self.name else {})


class Engine(Server):
    """A running server, spoken to in token ids."""

    def __init__(self, setup: Setup, model: str, log: Path, **environment: str) -> None:
        self.setup = setup
        fixed = dict(setup.environment).get("VLLM_NIXL_SIDE_CHANNEL_PORT")
        self.side_port = int(fixed or free_port())
        options = [
            *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN)),
            *("--kv-cache-memory-bytes", "128M" if setup.model == SMOLLM2 else "16M"),
            *("--tensor-parallel-size", str(setup.tp), "--block-size", str(setup.block_size)),
            *setup.options,
        ]
        if setup.model != SMOLLM2:
            options.append("--skip-tokenizer-init")
        if setup.role is not None:
            options += ["--kv-transfer-config", json.dumps(setup.transfer_config())]
        given = {
            "OMP_NUM_THREADS": "1",
            "UCX_NET_DEVICES": "lo",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(self.side_port),
            "VLLM_MOONCAKE_BOOTSTRAP_PORT": str(self.side_port),
            **environment,
            **dict(setup.environment),
        }
        if setup.layout is not None:
            given["VLLM_KV_CACHE_LAYOUT"] = setup.layout
        super().__init__(log, *options, model=model, environment=given)

    def tokens(
        self, prompt: Sequence[int], count: int = 12, params: dict[str, Any] | None = None
    ) -> list[int]:
        """Greedy tokens after ``prompt``; ``params`` are the ``kv_transfer_params``."""
        return tokens_of(self.complete(prompt, count, params))

    def complete(
        self,
        prompt: Sequence[int],
        count: int = 12,
        params: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> httpx.Response:
        body = body_of(prompt, count)
        if params is not None:
            body["kv_transfer_params"] = params
        return self.post("/v1/completions", body, **kwargs)

    def prefill(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Compute ``prompt`` here, for a decoder elsewhere; the parameters for that one."""
        response = self.complete(prompt, 1, ASK)
        assert response.status_code == 200, response.text
        return response.json()["kv_transfer_params"]

    def wait_until_empty(self, seconds: float = PATIENCE) -> None:
        """Until no block is held. With VLLM_KV_CACHE_DEBUG the engine checks its pool as well."""
        wait_for(lambda: self.metric("vllm:kv_cache_usage_perc") == 0, "blocks are held", seconds)

    def signal(self, number: int) -> None:
        """To every process of the server."""
        os.killpg(self.process.pid, number)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        """As a context manager does; its other processes too, however it ended."""
        others = []
        with contextlib.suppress(psutil.NoSuchProcess):
            others = self.children()
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGCONT)
        self.__exit__()
        for process in others:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class RouterProcess:
    """``vllm router`` on a free port; servers join with ``KEY``."""

    def __init__(self, log: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "router"]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [
                    *command,
                    *("--port", str(self.port), "--admin-key", KEY),
                    # A server that has much to do on a busy machine is not taken for a frozen one.
                    *("--health-interval", "0.2", "--health-timeout", "30", *options),
                ],
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.log = log
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE, limits=BRIEF)
        self.answers()

    def answers(self) -> None:
        wait_for(lambda: self._status() is not None, "the router does not answer")

    def wait(self, status: int = 200) -> None:
        wait_for(lambda: self._status() == status, f"the router did not come to {status}")

    def _status(self) -> int | None:
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/health").status_code
        return None

    def join(self, kind: str, url: str) -> dict[str, Any]:
        response = self.http.post(
            f"/servers/{kind}", json={"url": url}, headers={"authorization": f"Bearer {KEY}"}
        )
        assert response.status_code == 200, response.text
        return response.json()

    def leave(self, kind: str, url: str) -> None:
        response = self.http.delete(
            f"/servers/{kind}", params={"url": url}, headers={"authorization": f"Bearer {KEY}"}
        )
        assert response.status_code == 200, response.text

    @contextlib.contextmanager
    def with_servers(self, prefill: Iterable[Engine], decode: Iterable[Engine]) -> Any:
        """These servers, and no others, for a while."""
        joined = [("prefill", engine.url) for engine in prefill]
        joined += [("decode", engine.url) for engine in decode]
        for kind, url in joined:
            assert self.join(kind, url)["healthy"], f"{url} is not healthy"
        try:
            yield
        finally:
            for kind, url in joined:
                self.leave(kind, url)

    def complete(self, prompt: Sequence[int], count: int = 12, **more: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={**body_of(prompt, count), **more})

    def tokens(self, prompt: Sequence[int], count: int = 12) -> list[int]:
        return tokens_of(self.complete(prompt, count))

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(PATIENCE)


class StartError(AssertionError):
    """A server refused to start; the text is its log."""


@dataclass
class Fleet:
    """Servers by setup. More than ``room`` of them are never alive: the oldest goes."""

    folder: Path
    room: int = 4
    debug: bool = True
    """Engines check after every step that only the right bytes have changed."""
    running: OrderedDict[Setup, Engine] = field(default_factory=OrderedDict)
    num_started: int = 0
    _router: RouterProcess | None = None
    _checkpoints: dict[str, str] = field(default_factory=dict)

    def checkpoint(self, model: str) -> str:
        """The model argument of a server."""
        if model == SMOLLM2:
            return model
        if model not in self._checkpoints:
            folder = self.folder / model.replace(" ", "-")
            folder.mkdir()
            if model == SCALED:
                save_with_scales(folder, num_hidden_layers=1, head_dim=16)
            else:
                save(CHECKPOINTS[model](), folder)
            self._checkpoints[model] = str(folder)
        return self._checkpoints[model]

    def get(self, setup: Setup) -> Engine:
        """The server of ``setup``, started if need be."""
        return self.all_of(setup)[0]

    def all_of(self, *setups: Setup) -> list[Engine]:
        """The servers of several setups, started side by side.

        Raises:
            StartError: one of them refuses to start.
        """
        for setup, engine in list(self.running.items()):
            if not engine.alive:
                self.end(setup)
        missing = [setup for setup in dict.fromkeys(setups) if setup not in self.running]
        spare = [setup for setup in self.running if setup not in setups]
        for setup in spare[: max(0, len(self.running) + len(missing) - self.room)]:
            self.end(setup)
        models = {setup.model: self.checkpoint(setup.model) for setup in missing}
        started = [self._start(setup, models[setup.model]) for setup in missing]
        with ThreadPoolExecutor(max(1, len(started))) as pool:
            errors = list(pool.map(self._wait, started))
        for setup, engine, error in zip(missing, started, errors, strict=True):
            if error is None:
                self.running[setup] = engine
            else:
                engine.end()
        for error in errors:
            if error is not None:
                raise error
        for setup in setups:
            self.running.move_to_end(setup)
        return [self.running[setup] for setup in setups]

    def _start(self, setup: Setup, model: str) -> Engine:
        self.num_started += 1
        log = self.folder / f"{self.num_started}-{setup.role or 'plain'}.log"
        return Engine(setup, model, log, VLLM_KV_CACHE_DEBUG=str(int(self.debug)))

    @staticmethod
    def _wait(engine: Engine) -> StartError | None:
        try:
            engine.__enter__()
        except AssertionError as error:
            return StartError(str(error))
        return None

    def pair(self, prefill: Setup, decode: Setup) -> tuple[Engine, Engine, Engine]:
        """P, D, and a plain server of the same model."""
        plain = Setup(model=prefill.model)
        p, d, one = self.all_of(
            replace(prefill, role="kv_producer"), replace(decode, role="kv_consumer"), plain
        )
        return p, d, one

    @property
    def router(self) -> RouterProcess:
        if self._router is None:
            self._router = RouterProcess(self.folder / "router.log")
        return self._router

    def end(self, setup: Setup) -> None:
        self.running.pop(setup).end()

    def close(self) -> None:
        if self._router is not None:
            self._router.close()
        for setup in list(self.running):
            self.end(setup)


def save_with_scales(folder: Path, **overrides: Any) -> None:
    """A llama with 8 query and 4 KV heads whose checkpoint says how to scale its cache."""
    save(llama(**overrides), folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("k_proj.weight")]:
        owner = name.removesuffix(".k_proj.weight")
        for side, scale in zip("kv", SCALES, strict=True):
            tensors[f"{owner}.{side}_scale"] = torch.tensor(scale)
    save_file(tensors, file, {"format": "pt"})


def llama(**overrides: Any) -> Any:
    given = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return make_hf_model("llama", **{**given, **overrides})


def body_of(prompt: Sequence[int], count: int) -> dict[str, Any]:
    return {
        "prompt": list(prompt),
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


def tokens_of(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


def wait_for(condition: Callable[[], bool], complaint: str, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:g} s {complaint}"
        time.sleep(0.05)


def in_parallel(call: Callable[[Any], Any], items: Iterable[Any], width: int = 4) -> list[Any]:
    with ThreadPoolExecutor(width) as pool:
        return list(pool.map(call, items))
