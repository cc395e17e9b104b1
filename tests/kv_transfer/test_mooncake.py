"""Prefill in one engine, decode in another, over real Mooncake in one process."""

from __future__ import annotations

import time
import uuid

import pytest

from tests.engine.conftest import ENGINE_ARGS
from tests.entrypoints.server import PATIENCE, free_port
from tests.kv_transfer.clocks import ThreadsClock
from tests.kv_transfer.conftest import greedy, prompt_of
from tests.kv_transfer.mooncake import own_network, require_mooncake
from vllm import LLM, SamplingParams
from vllm.errors import ConfigError, KVTransferError, VLLMError, VLLMValidationError

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


def prefill_params(transfer_id):
    return {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}


def decode_params(p, transfer_id):
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_bootstrap_addr": p.bootstrap,
        "remote_engine_id": p.engine_id,
        "transfer_id": transfer_id,
    }


def sampling(params, count):
    return SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, extra_args={"kv_transfer_params": params}
    )


def new_ids(prompts):
    return [f"xfer-{uuid.uuid4().hex}" for _ in prompts]


def ask_prefill(p, prompts, ids):
    p.submit(prompts, [sampling(prefill_params(name), 1) for name in ids])


def ask_decode(p, d, prompts, ids, count=8):
    d.submit(prompts, [sampling(decode_params(p, name), count) for name in ids])


def run(*sides, between=lambda: None):
    """Steps of all until their requests have ended."""
    deadline = time.monotonic() + PATIENCE
    while any(None in side.outputs for side in sides):
        assert time.monotonic() < deadline, "requests hang"
        for side in sides:
            side.step()
        between()


def transfer(p, d, prompts, count=8):
    """The concurrent protocol: both are asked at the same time. D's tokens and outputs."""
    d.names.clear()
    ids = new_ids(prompts)
    ask_prefill(p, prompts, ids)
    ask_decode(p, d, prompts, ids, count)
    run(p, d)
    return [list(out.outputs[0].token_ids) for out in d.outputs], d.outputs


def wait_until_free(*sides):
    """Steps of idle engines until no blocks are held."""
    deadline = time.monotonic() + PATIENCE
    while any(side.core.scheduler.kv_cache_manager.usage for side in sides):
        assert time.monotonic() < deadline, "blocks are held"
        for side in sides:
            side.step()
        time.sleep(0.002)
    for side in sides:
        side.core.check_integrity()


def test_tokens_are_those_of_one_engine(make_llm, make_side):
    plain = greedy(make_llm(), PROMPTS)
    p, d = make_side("kv_producer"), make_side("kv_consumer")
    tokens, outputs = transfer(p, d, PROMPTS)
    assert tokens == plain
    assert [out.num_cached_tokens for out in outputs] == [70, 33, 128, 5]
    assert all(out.kv_transfer_params is None for out in p.outputs)
    wait_until_free(p, d)
    # Once more: D has the full blocks of the prompts now and fetches the rest only.
    tokens, _ = transfer(p, d, PROMPTS)
    assert tokens == plain
    wait_until_free(p, d)


@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_either_may_be_asked_long_before_the_other(make_llm, make_side, first):
    plain = greedy(make_llm(), PROMPTS)
    p, d = make_side("kv_producer"), make_side("kv_consumer")
    ids = new_ids(PROMPTS)
    asks = [lambda: ask_prefill(p, PROMPTS, ids), lambda: ask_decode(p, d, PROMPTS, ids)]
    for ask in asks if first == "prefill" else reversed(asks):
        ask()
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            p.step()
            d.step()
    run(p, d)
    assert [list(out.outputs[0].token_ids) for out in d.outputs] == plain
    wait_until_free(p, d)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (("LBHNC", 16), ("BHLNC", 16)),
        (("BHLNC", 16), ("LBNHC", 32)),
        (("BHLNC", 64), ("BHLNC", 16)),
    ],
)
def test_layouts_and_block_sizes_may_differ(make_llm, make_side, monkeypatch, ours, theirs):
    plain = greedy(make_llm(), PROMPTS)
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", theirs[0])
    p = make_side("kv_producer", block_size=theirs[1])
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", ours[0])
    d = make_side("kv_consumer", block_size=ours[1])
    assert transfer(p, d, PROMPTS)[0] == plain
    wait_until_free(p, d)


@pytest.mark.parametrize(
    ("theirs", "ours"), [(2, 1), (1, 2), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_the_numbers_of_ranks_may_differ(make_llm, make_side, theirs, ours):
    plain = greedy(make_llm(), PROMPTS)
    p = make_side("kv_producer", tensor_parallel_size=theirs)
    d = make_side("kv_consumer", tensor_parallel_size=ours, block_size=32)
    tokens, outputs = transfer(p, d, PROMPTS)
    assert tokens == plain
    assert [out.num_cached_tokens for out in outputs] == [70, 33, 128, 5]
    wait_until_free(p, d)


def test_the_bytes_that_were_written_are_the_ones_that_count(make_side, monkeypatch):
    """Otherwise tokens could be right because D computed them itself."""
    monkeypatch.setenv("VLLM_KV_CACHE_DEBUG", "0")
    p, d, plain = make_side("kv_producer"), make_side("kv_consumer"), make_side("kv_consumer")
    ids = new_ids(PROMPTS[:1])
    ask_prefill(p, PROMPTS[:1], ids)
    run(p)
    for cache in p.core.executor.worker.model_runner.kv_caches:
        cache.mul_(-1)
    ask_decode(p, d, PROMPTS[:1], ids)
    run(p, d)
    assert [list(out.outputs[0].token_ids) for out in d.outputs] != greedy(plain.llm, PROMPTS[:1])


def fails(d, *others, match="kv_load_failure_policy"):
    """The request of D fails while the others go on."""
    deadline = time.monotonic() + PATIENCE
    with pytest.raises((KVTransferError, VLLMValidationError), match=match):
        while True:
            assert time.monotonic() < deadline, "the request hangs"
            for side in (*others, d):
                side.step()


def test_prompts_that_differ_are_never_mixed_up(make_side, caplog):
    """The same transfer id, another prompt: of another length, or of other tokens."""
    p, d = make_side("kv_producer"), make_side("kv_consumer")
    for other, reason in ((PROMPTS[1], "33 tokens are asked"), (prompt_of(70, 9), "other tokens")):
        ids = new_ids(PROMPTS[:1])
        ask_prefill(p, PROMPTS[:1], ids)
        run(p)
        ask_decode(p, d, [other], ids)
        fails(d, p)
        assert reason in caplog.text
        wait_until_free(p, d)


def test_what_a_prefill_came_to_is_told_at_once(make_side, caplog):
    p, d = make_side("kv_producer"), make_side("kv_consumer")
    ids = new_ids(PROMPTS[:1])
    ask_prefill(p, PROMPTS[:1], ids)
    ask_decode(p, d, PROMPTS[:1], ids)
    p.llm.llm_engine.abort_request(list(p.names))
    p.core.step()
    fails(d, p)
    assert "its prefill ended as finished_aborted" in caplog.text
    wait_until_free(p, d)


def test_an_aborted_decode_lets_the_blocks_go(make_side):
    p, d = make_side("kv_producer"), make_side("kv_consumer", max_num_seqs=1)
    ids = new_ids(PROMPTS[:2])
    ask_decode(p, d, PROMPTS[:2], ids)
    for _ in range(5):
        d.core.step()
    d.llm.llm_engine.abort_request(list(d.names))
    ask_prefill(p, PROMPTS[:2], ids)
    run(p)
    wait_until_free(p, d)


def test_blocks_that_nobody_fetches_are_freed(make_side, monkeypatch, caplog):
    monkeypatch.setenv("VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT", "0.3")
    p, d = make_side("kv_producer"), make_side("kv_consumer")
    ids = new_ids(PROMPTS[:1])
    ask_prefill(p, PROMPTS[:1], ids)
    run(p)
    wait_until_free(p)
    ask_decode(p, d, PROMPTS[:1], ids)
    fails(d)
    assert "its lease has expired" in caplog.text
    wait_until_free(d)


def test_a_lease_is_prolonged_while_somebody_waits(make_llm, make_side):
    extra = {"kv_lease_duration": 6.0}
    p = make_side("kv_producer", extra)
    # Of its 10 blocks the first request takes 3 or 4, and the second wants 8.
    d = make_side("kv_consumer", extra, max_model_len=160, num_gpu_blocks_override=11)
    transfer(p, d, PROMPTS[:1])
    clock = clock_of(p, d)
    d.names.clear()
    ids = new_ids(PROMPTS[1:3])
    ask_prefill(p, PROMPTS[1:3], ids)
    run(p)
    ask_decode(p, d, PROMPTS[1:3], ids, 30)
    first = next(iter(d.names))
    begin = clock.now

    def go_on():
        # One after the other: the second waits far longer than its lease.
        if d.names[first] is None and clock.now < begin + 20:
            clock.go_on(1.0)
            assert len(transfer_worker(d).receiver._expected) == 1

    run(p, d, between=go_on)
    assert clock.now >= begin + 20
    tokens = [list(out.outputs[0].token_ids) for out in d.outputs]
    assert tokens == greedy(make_llm(), PROMPTS[1:3], count=30)
    wait_until_free(p, d)


def transfer_worker(side):
    return side.core.executor.worker.model_runner._connector._connector._worker


def clock_of(*sides):
    """Of their transfer threads."""
    clock = ThreadsClock(looks=4)
    for side in sides:
        worker = transfer_worker(side)
        parts = [part for part in (worker.sender, worker.receiver) if part is not None]
        for part in (*parts, *(part._directory for part in parts if part is worker.receiver)):
            part._clock = clock
        clock.threads.append(worker._thread)
    return clock


def test_a_prefill_that_never_comes_is_waited_for_so_long(make_llm, make_side, monkeypatch, caplog):
    monkeypatch.setenv("VLLM_MOONCAKE_CONNECTOR_TIMEOUT", "2")
    p, d = make_side("kv_producer"), make_side("kv_consumer", policy="recompute")
    clock = clock_of(p, d)
    ask_decode(p, d, PROMPTS[:1], new_ids(PROMPTS[:1]))

    def go_on():
        if "came within" not in caplog.text:
            clock.go_on(0.25)

    run(d, between=go_on)
    assert [list(out.outputs[0].token_ids) for out in d.outputs] == greedy(make_llm(), PROMPTS[:1])
    assert "came within 2 s (VLLM_MOONCAKE_CONNECTOR_TIMEOUT)" in caplog.text
    wait_until_free(d)


def test_a_producer_that_is_gone_fails_the_request_and_nothing_else(make_llm, make_side):
    p, d = make_side("kv_producer"), make_side("kv_consumer")
    transfer(p, d, PROMPTS[1:2])
    wait_until_free(p, d)
    p.llm.shutdown()
    d.names.clear()
    ask_decode(p, d, PROMPTS[:1], new_ids(PROMPTS[:1]))
    fails(d)
    wait_until_free(d)
    assert greedy(d.llm, PROMPTS[:1]) == greedy(make_llm(), PROMPTS[:1])


def test_models_that_differ_are_refused_at_the_handshake(make_side, caplog):
    p, d = make_side("kv_producer", dtype="bfloat16"), make_side("kv_consumer")
    ids = new_ids(PROMPTS[:1])
    ask_prefill(p, PROMPTS[:1], ids)
    ask_decode(p, d, PROMPTS[:1], ids)
    run(p)
    fails(d)
    assert "dtype: bfloat16 here, float32 there" in caplog.text
    wait_until_free(p, d)


@pytest.fixture(scope="module")
def lone_decoder(network, tiny_model):
    """For requests that it refuses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        options = {**ENGINE_ARGS, "block_size": 16, "kv_transfer_config": config("kv_consumer")}
        llm = LLM(str(tiny_model), **options)
    yield Side(llm, None, None)
    llm.shutdown()


GOOD = {
    "do_remote_prefill": True,
    "transfer_id": "t",
    "remote_engine_id": "e",
    "remote_bootstrap_addr": "http://127.0.0.1:1",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transfer_id": None}, "needs transfer_id"),
        ({"transfer_id": 5}, "transfer_id"),
        ({"transfer_id": "x" * 1000}, "1 to 512 printable characters"),
        ({"transfer_id": "a\ud800"}, "surrogates not allowed"),
        ({"transfer_id": "a\x00"}, "1 to 512 printable characters"),
        ({"remote_engine_id": ""}, "1 to 512 printable characters"),
        ({"remote_engine_id": None}, "needs remote_engine_id"),
        ({"remote_bootstrap_addr": None}, "needs remote_bootstrap_addr"),
        ({"remote_bootstrap_addr": "file:///etc/passwd"}, "must be http://host:port"),
        ({"remote_bootstrap_addr": "http://[::"}, "is no URL|must be http"),
        ({"do_remote_decode": True}, "exclude each other"),
        ({"do_remote_prefill": "yes"}, "do_remote_prefill"),
    ],
)
def test_hostile_parameters_are_refused_before_anything_is_taken(lone_decoder, change, message):
    d = lone_decoder
    d.names.clear()
    with pytest.raises((VLLMError, VLLMValidationError), match=message):
        d.submit(PROMPTS[:1], [sampling({**GOOD, **change}, 4)])
        run(d)
    wait_until_free(d)


def test_bootstrap_servers_that_are_none_are_noticed(make_side):
    p, d = make_side("kv_producer"), make_side("kv_consumer")
    for change in (
        {},
        {"remote_bootstrap_addr": p.bootstrap},
        {"remote_bootstrap_addr": p.bootstrap + "/nowhere"},
        {"remote_bootstrap_addr": p.bootstrap.replace("127.0.0.1", "no-such-host.invalid")},
    ):
        d.names.clear()
        d.submit(PROMPTS[:1], [sampling({**GOOD, **change}, 4)])
        fails(d)
    wait_until_free(d)


def test_roles_and_transfer_ids_are_kept(make_side):
    p, d = make_side("kv_producer"), make_side("kv_consumer")
    with pytest.raises((VLLMError, VLLMValidationError), match="kv_consumer or kv_both"):
        p.submit(PROMPTS[:1], [sampling(GOOD, 4)])
        run(p)
    with pytest.raises((VLLMError, VLLMValidationError), match="kv_producer or kv_both"):
        ask_prefill(d, PROMPTS[:1], ["t"])
        run(d)
    with pytest.raises((VLLMError, VLLMValidationError), match="'t' is another request's"):
        ask_prefill(p, PROMPTS[:2], ["t", "t"])
        run(p)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"lease": 5}, "unknown field `lease`"),
        ({"kv_lease_duration": 0}, "kv_lease_duration must be more than 0"),
        ({"num_workers": 0}, "num_workers must be at least 1"),
        ({"mooncake_protocol": "carrier pigeon"}, "one of rdma, tcp"),
        ({"mooncake_protocol": "rdma"}, 'no RDMA device; .*"mooncake_protocol": "tcp"'),
        ({"bootstrap_server_address": "8998"}, "must be host:port"),
        ({"bootstrap_server_address": "192.0.2.1:8998"}, "cannot listen on 192.0.2.1:8998"),
    ],
)
def test_settings_are_checked(make_side, extra, message):
    with pytest.raises(ConfigError, match=message):
        make_side(extra=extra)


def test_a_buffer_elsewhere_is_refused(make_llm):
    with pytest.raises(ConfigError, match="kv_buffer_device cuda"):
        make_llm(kv_transfer_config={**config(), "kv_buffer_device": "cuda"})
