"""Prefill in one engine, decode in another, over real Mooncake in one process."""

from __future__ import annotations

import uuid

import pytest

from tests.entrypoints.server import free_port
from tests.kv_transfer.conftest import greedy, prompt_of
from tests.kv_transfer.mooncake import own_network, require_mooncake
from vllm import SamplingParams

PROMPTS = [prompt_of(70, 1), prompt_of(33, 2), prompt_of(128, 3), prompt_of(5, 4)]


@pytest.fixture(autouse=True, scope="module")
def network():
    require_mooncake()
    with pytest.MonkeyPatch.context() as patch, own_network():
        patch.setenv("GLOG_minloglevel", "3")
        yield


def config(role="kv_both", engine_id=None, policy="fail", **extra):
    given = {} if engine_id is None else {"engine_id": engine_id}
    return {
        "kv_connector": "MooncakeConnector",
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {"mooncake_protocol": "tcp", **extra},
        **given,
    }


class Side:
    """An engine, and where it is found if it prefills."""

    def __init__(self, llm, engine_id, bootstrap):
        self.llm, self.engine_id, self.bootstrap = llm, engine_id, bootstrap
        self.core = llm.llm_engine.client._core
        self.names = {}

    def submit(self, prompts, params):
        """Add requests without waiting; their outputs are collected by ``run``."""
        for prompt, param in zip(prompts, params, strict=True):
            name = uuid.uuid4().hex
            self.names[name] = None
            self.llm.llm_engine.add_request(name, prompt, param)

    def step(self):
        engine = self.llm.llm_engine
        if engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    self.names[output.request_id] = output
        elif self.core.has_work():
            self.core.step()

    @property
    def outputs(self):
        return list(self.names.values())


@pytest.fixture
def make_side(make_llm, monkeypatch):
    def make(role="kv_both", extra=None, policy="fail", **kwargs):
        port = free_port()
        monkeypatch.setenv("VLLM_MOONCAKE_BOOTSTRAP_PORT", str(port))
        engine_id = uuid.uuid4().hex
        given = config(role, engine_id, policy, **(extra or {}))
        llm = make_llm(kv_transfer_config=given, **kwargs)
        return Side(llm, engine_id, f"http://127.0.0.1:{port}")

    return make


def ask_both(p, d, prompts, count=8):
    """The concurrent protocol: both are asked at the same time, under one transfer id."""
    ids = [f"xfer-{uuid.uuid4().hex}" for _ in prompts]
    p.submit(
        prompts,
        [
            SamplingParams(
                temperature=0,
                max_tokens=1,
                extra_args={
                    "kv_transfer_params": {
                        "do_remote_decode": True,
                        "do_remote_prefill": False,
                        "transfer_id": name,
                    }
                },
            )
            for name in ids
        ],
    )
    d.submit(
        prompts,
        [
            SamplingParams(
                temperature=0,
                max_tokens=count,
                ignore_eos=True,
                extra_args={
                    "kv_transfer_params": {
                        "do_remote_prefill": True,
                        "do_remote_decode": False,
                        "remote_bootstrap_addr": p.bootstrap,
                        "remote_engine_id": p.engine_id,
                        "transfer_id": name,
                    }
                },
            )
            for name in ids
        ],
    )
    return ids


def run(*sides, seconds=30):
    import time

    deadline = time.monotonic() + seconds
    while any(None in side.outputs for side in sides):
        assert time.monotonic() < deadline, "requests hang"
        for side in sides:
            side.step()
    return [side.outputs for side in sides]


def test_tokens_are_those_of_one_engine(make_llm, make_side):
    plain = greedy(make_llm(), PROMPTS)
    p, d = make_side("kv_producer"), make_side("kv_consumer")
    ask_both(p, d, PROMPTS)
    _, outputs = run(p, d)
    assert [list(out.outputs[0].token_ids) for out in outputs] == plain


def wait_until_free(*sides, seconds=5):
    """Steps of idle engines until no blocks are held."""
    import time

    deadline = time.monotonic() + seconds
    while any(side.core.scheduler.kv_cache_manager.usage for side in sides):
        assert time.monotonic() < deadline, "blocks are held"
        for side in sides:
            side.step()
        time.sleep(0.002)
    for side in sides:
        side.core.check_integrity()
