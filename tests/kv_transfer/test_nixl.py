"""Prefill in one engine, decode in another, over real NIXL in one process."""

import importlib.util
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from tests.engine.conftest import ENGINE_ARGS
from tests.entrypoints.server import PATIENCE, free_port
from tests.kv_transfer.clocks import ThreadsClock
from tests.kv_transfer.conftest import greedy, prompt_of
from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.side_channel import ask_handshake
from vllm.errors import ConfigError, KVTransferError, VLLMError, VLLMValidationError

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl", "nixl_cu12", "nixl_cu13")),
    reason="needs nixl: pip install 'vllm[nixl]'",
)
PROMPTS = [prompt_of(70, 1), prompt_of(33, 2), prompt_of(128, 3), prompt_of(5, 4)]
ASK = {"do_remote_decode": True, "do_remote_prefill": False}


def config(role="kv_both", **extra):
    policy = extra.pop("policy", "fail")
    found = {
        "kv_connector": extra.pop("connector", "NixlConnector"),
        "kv_role": role,
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": extra,
    }
    if "buffer" in extra:
        found["kv_buffer_device"] = extra.pop("buffer")
    return found


@pytest.fixture
def make_nixl(make_llm, monkeypatch):
    def make(role="kv_both", extra=None, **kwargs):
        monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
        return make_llm(kv_transfer_config=config(role, **(extra or {})), **kwargs)

    return make


def prefill(llm, prompts, ask=None):
    """What P answers: the parameters for D."""
    params = SamplingParams(
        temperature=0, max_tokens=1, extra_args={"kv_transfer_params": ask or ASK}
    )
    answers = [out.kv_transfer_params for out in llm.generate(prompts, params, use_tqdm=False)]
    # An engine of its own process goes on stepping; that is how its worker hears of leases.
    if core_of(llm).has_work():
        core_of(llm).step()
    return answers


def decode(llm, prompts, answers, count=8):
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=count,
            ignore_eos=True,
            extra_args={"kv_transfer_params": answer},
        )
        for answer in answers
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in outputs], outputs


def core_of(llm):
    return llm.llm_engine.client._core


def wait_until_free(llm):
    """Steps of an idle engine until no blocks are held."""
    core = core_of(llm)
    deadline = time.monotonic() + PATIENCE
    while core.scheduler.kv_cache_manager.usage and time.monotonic() < deadline:
        if core.has_work():
            core.step()
        time.sleep(0.002)
    assert core.scheduler.kv_cache_manager.usage == 0
    core.check_integrity()


def test_tokens_are_those_of_one_engine(make_llm, make_nixl):
    plain = greedy(make_llm(), PROMPTS)
    p, d = make_nixl("kv_producer"), make_nixl("kv_consumer")
    answers = prefill(p, PROMPTS)
    assert all(answer["do_remote_prefill"] for answer in answers)
    tokens, outputs = decode(d, PROMPTS, answers)
    assert tokens == plain
    assert [out.num_cached_tokens for out in outputs] == [70, 33, 128, 5]
    wait_until_free(p)
    wait_until_free(d)
    # Once more: D has the full blocks of the prompts now and fetches the rest only.
    tokens, outputs = decode(d, PROMPTS, prefill(p, PROMPTS))
    assert tokens == plain
    wait_until_free(p)
    wait_until_free(d)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (("LBHNC", 16), ("BHLNC", 16)),
        (("BHLNC", 16), ("LBNHC", 32)),
        (("LBNHC", 32), ("BLHNC", 16)),
        (("BHLNC", 64), ("BHLNC", 16)),
    ],
)
def test_layouts_and_block_sizes_may_differ(make_llm, make_nixl, monkeypatch, ours, theirs):
    plain = greedy(make_llm(), PROMPTS)
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", theirs[0])
    p = make_nixl("kv_producer", block_size=theirs[1])
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", ours[0])
    d = make_nixl("kv_consumer", block_size=ours[1])
    tokens, _ = decode(d, PROMPTS, prefill(p, PROMPTS))
    assert tokens == plain
    wait_until_free(p)
    wait_until_free(d)


STAGED = {"transfer_path": "staging", "staging_slot_bytes": 1 << 14}
PUSHED = {"connector": "NixlPushConnector"}
WAYS = {
    "staged": STAGED,
    "pushed": {**PUSHED, "transfer_path": "descriptors"},
    "pushed and staged": {**PUSHED, **STAGED},
    "host buffer": {"buffer": "cpu"},
    "host buffer, pushed": {"buffer": "cpu", **PUSHED},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_brings_the_same_tokens(make_llm, make_nixl, monkeypatch, way):
    """Layouts and block sizes differ, so that a block is many runs; chunks are small."""
    plain = greedy(make_llm(), PROMPTS)
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBNHC")
    p = make_nixl("kv_producer", dict(WAYS[way]), block_size=32)
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "BHLNC")
    d = make_nixl("kv_consumer", dict(WAYS[way]))
    for _ in range(2):
        tokens, outputs = decode(d, PROMPTS, prefill(p, PROMPTS))
        assert tokens == plain
        assert [out.num_cached_tokens for out in outputs] == [70, 33, 128, 5]
        wait_until_free(p)
        wait_until_free(d)
    worker = worker_of(d)
    took = "descriptors" if way == "pushed" else "staging"
    assert worker.ways == {took}
    # A host buffer is all that peers can reach.
    assert worker.registers_blocks is not way.startswith("host")


def worker_of(llm):
    """What D's transfer thread has done."""
    worker = transfer_worker(llm)
    return SimpleNamespace(
        ways=set(worker.loads.ways_taken), registers_blocks=worker._local.registers_blocks
    )


def transfer_worker(llm):
    return core_of(llm).executor.worker.model_runner._connector._connector._worker


@pytest.mark.parametrize(
    ("theirs", "ours"), [("auto", "fp8"), ("fp8", "auto"), ("auto", "fp8_e5m2")]
)
def test_numbers_are_converted_by_the_receiver(make_nixl, theirs, ours):
    """What D then holds is what it would have stored of P's numbers, to the bit."""
    extra = {"staging_slot_bytes": 1 << 14}
    given = {"attention_config": {"backend": "TORCH_REF"}}
    p = make_nixl("kv_producer", extra, kv_cache_dtype=theirs, **given)
    d = make_nixl("kv_consumer", extra, kv_cache_dtype=ours, block_size=32, **given)
    answers = prefill(p, PROMPTS)
    rows = [answer["remote_block_ids"][0] for answer in answers]
    there = [layer_tokens(p, rows[0], 16, 70, index) for index in (0, 1)]
    tokens, outputs = decode(d, PROMPTS, answers, count=1)
    assert [out.num_cached_tokens for out in outputs] == [70, 33, 128, 5]
    assert all(tokens)
    dtypes = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
    cached = core_of(d).scheduler.kv_cache_manager
    block_ids = [block.block_id for block in cached.block_pool.blocks if block.block_hash]
    for index, numbers in enumerate(there):
        if theirs == "auto":
            expected = numbers.to(dtypes[ours]).view(torch.uint8)
        else:
            expected = numbers.view(dtypes[theirs]).float()
        held = core_of(d).executor.worker.model_runner.kv_caches[index]
        found = held[block_ids].transpose(1, 2).flatten(0, 1)
        # Two full blocks of 32 tokens of the first prompt are among what D keeps.
        wanted = expected[:64].reshape(2, -1)
        blocks = found.reshape(len(block_ids), -1)
        for block in wanted:
            assert any(torch.equal(block, own) for own in blocks)


def layer_tokens(llm, row, block_size, count, index):
    """``(tokens, heads, content)`` of a layer."""
    token = torch.arange(count)
    cache = core_of(llm).executor.worker.model_runner.kv_caches[index]
    return cache[torch.tensor(row)[token // block_size], :, token % block_size].clone()


def test_formats_without_a_conversion_are_refused_with_both(make_nixl, caplog):
    given = {"attention_config": {"backend": "TORCH_REF"}}
    p = make_nixl("kv_producer", kv_cache_dtype="fp8_e5m2", **given)
    d = make_nixl("kv_consumer", kv_cache_dtype="fp8", **given)
    with pytest.raises(KVTransferError, match="kv_load_failure_policy"):
        decode(d, PROMPTS[:1], prefill(p, PROMPTS[:1]))
    assert "--kv-cache-dtype is fp8_e4m3 here and fp8_e5m2 there" in caplog.text


def test_scales_that_were_found_on_both_sides_are_the_same(make_llm, make_nixl):
    given = {"kv_cache_dtype": "fp8", "calculate_kv_scales": True}
    p, d = (make_nixl(role, **given) for role in ("kv_producer", "kv_consumer"))
    tokens, outputs = decode(d, PROMPTS, prefill(p, PROMPTS))
    assert [out.num_cached_tokens for out in outputs] == [70, 33, 128, 5]
    assert tokens == greedy(make_llm(**given), PROMPTS)


@pytest.mark.parametrize("there", ["fp8", "auto"])
def test_numbers_under_other_scales_are_refused(make_nixl, caplog, there):
    p = make_nixl("kv_producer", kv_cache_dtype="fp8", calculate_kv_scales=True)
    d = make_nixl("kv_consumer", kv_cache_dtype=there)
    with pytest.raises(KVTransferError, match="kv_load_failure_policy"):
        decode(d, PROMPTS[:1], prefill(p, PROMPTS[:1]))
    assert "kv_scales: none here, " in caplog.text
    assert "(--calculate-kv-scales) there" in caplog.text


@pytest.mark.parametrize(
    ("theirs", "ours"), [(2, 1), (1, 2), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_the_numbers_of_ranks_may_differ(make_llm, make_nixl, theirs, ours):
    plain = greedy(make_llm(), PROMPTS)
    p = make_nixl("kv_producer", tensor_parallel_size=theirs)
    d = make_nixl("kv_consumer", tensor_parallel_size=ours, block_size=32)
    tokens, outputs = decode(d, PROMPTS, prefill(p, PROMPTS))
    assert tokens == plain
    assert [out.num_cached_tokens for out in outputs] == [70, 33, 128, 5]
    wait_until_free(p)
    wait_until_free(d)


def test_the_bytes_that_were_fetched_are_the_ones_that_count(make_nixl, monkeypatch):
    """Otherwise tokens could be right because D computed them itself."""
    monkeypatch.setenv("VLLM_KV_CACHE_DEBUG", "0")
    p, d = make_nixl("kv_producer"), make_nixl("kv_consumer")
    answers = prefill(p, PROMPTS[:1])
    for cache in core_of(p).executor.worker.model_runner.kv_caches:
        cache.mul_(-1)
    tokens, _ = decode(d, PROMPTS[:1], answers)
    assert tokens != greedy(make_nixl(), PROMPTS[:1])


def test_an_expired_lease_frees_the_blocks_and_a_late_reader_sees_it(make_nixl):
    p = make_nixl("kv_producer", {"kv_lease_duration": 0.2})
    d = make_nixl("kv_consumer")
    again = make_nixl("kv_consumer", {"policy": "recompute"})
    answers = prefill(p, PROMPTS[:1])
    time.sleep(0.5)
    wait_until_free(p)
    with pytest.raises(KVTransferError, match="kv_load_failure_policy"):
        decode(d, PROMPTS[:1], answers)
    wait_until_free(d)
    tokens, (out,) = decode(again, PROMPTS[:1], answers)
    assert out.num_cached_tokens == 0
    assert tokens == greedy(make_nixl(), PROMPTS[:1])
    wait_until_free(again)


def test_a_lease_is_prolonged_while_somebody_waits(make_nixl):
    p = make_nixl("kv_producer", {"kv_lease_duration": 6.0})
    # Of its 10 blocks the first request takes 3 or 4, and the second wants 8.
    d = make_nixl("kv_consumer", max_model_len=160, num_gpu_blocks_override=11)
    clock = ThreadsClock(looks=30)
    for worker in (transfer_worker(p), transfer_worker(d)):
        worker._clock = clock
        clock.threads.append(worker._thread)
    first = prefill(p, PROMPTS[:1])
    decode(d, PROMPTS[:1], first)
    answers = prefill(p, PROMPTS[1:3])
    engine, ended = d.llm_engine, {}
    for name, prompt, answer in zip("ab", PROMPTS[1:3], answers, strict=True):
        extra = {"kv_transfer_params": answer}
        params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, extra_args=extra)
        engine.add_request(name, prompt, params)
    begin = clock.now
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                ended[output.request_id] = list(output.outputs[0].token_ids)
            elif not ended:
                # One after the other: the second waits far longer than its lease.
                clock.go_on(1.0)
                assert len(transfer_worker(d).notices.expected) == 1
    assert clock.now - begin > 3 * 6.0
    assert [ended["a"], ended["b"]] == greedy(make_nixl(), PROMPTS[1:3], count=30)
    wait_until_free(p)


def test_an_aborted_decode_lets_the_blocks_go(make_nixl):
    p, d = make_nixl("kv_producer"), make_nixl("kv_consumer", max_num_seqs=1)
    answers = prefill(p, PROMPTS[:2])
    engine = d.llm_engine
    for index, answer in enumerate(answers):
        params = SamplingParams(max_tokens=50, extra_args={"kv_transfer_params": answer})
        engine.add_request(str(index), PROMPTS[index], params)
    engine.step()
    engine.abort_request(["0", "1"])
    while engine.has_unfinished_requests():
        engine.step()
    wait_until_free(d)
    wait_until_free(p)


def test_a_producer_that_is_gone_fails_the_request_and_nothing_else(make_nixl):
    p, d = make_nixl("kv_producer"), make_nixl("kv_consumer", {"handshake_timeout": 0.5})
    answers = prefill(p, PROMPTS[:1])
    p.shutdown()
    with pytest.raises(KVTransferError, match="kv_load_failure_policy"):
        decode(d, PROMPTS[:1], answers)
    wait_until_free(d)
    assert greedy(d, PROMPTS[:1]) == greedy(make_nixl(), PROMPTS[:1])


def test_models_that_differ_are_refused_at_the_handshake(make_nixl, caplog):
    p = make_nixl("kv_producer", dtype="bfloat16")
    d = make_nixl("kv_consumer")
    with pytest.raises(KVTransferError, match="kv_load_failure_policy"):
        decode(d, PROMPTS[:1], prefill(p, PROMPTS[:1]))
    assert "dtype: float32 here, bfloat16 there" in caplog.text


@pytest.fixture(scope="module")
def lone_decoder(tiny_model):
    """For requests that it refuses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        options = {**ENGINE_ARGS, "block_size": 16, "kv_transfer_config": config("kv_consumer")}
        llm = LLM(str(tiny_model), **options)
    yield llm
    llm.shutdown()


GOOD = {
    "do_remote_prefill": True,
    "remote_engine_id": "e",
    "remote_request_id": "r",
    "remote_host": "127.0.0.1",
    "remote_port": 1,
    "remote_block_ids": [[1, 2, 3, 4, 5]],
    "remote_num_tokens": 70,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remote_host": None}, "needs remote_host"),
        ({"remote_port": "5"}, "remote_port"),
        ({"remote_port": 70000}, "1 to 65535"),
        ({"remote_block_ids": "all"}, "remote_block_ids"),
        ({"remote_block_ids": [[-1]]}, "no block id"),
        ({"remote_block_ids": [[1 << 70]]}, "remote_block_ids|int"),
        ({"remote_block_ids": [[]] * 100}, "1 to 64 groups"),
        ({"do_remote_decode": True}, "exclude each other"),
        ({"tp_size": 0}, "tp_size"),
        ({"remote_engine_id": "x" * 1000}, "1 to 512 characters"),
        ({"remote_num_tokens": 0}, "remote_num_tokens"),
        ({"remote_lease_slot": -1}, "negative"),
    ],
)
def test_hostile_parameters_are_refused_before_anything_is_taken(lone_decoder, change, message):
    d = lone_decoder
    with pytest.raises((VLLMError, VLLMValidationError), match=message):
        decode(d, PROMPTS[:1], [{**GOOD, **change}])
    wait_until_free(d)
    assert len(greedy(d, PROMPTS[:1])[0]) == 8


def test_block_ids_of_others_are_refused(make_nixl):
    """Ids that the peer does not have, too few of them, slots that it does not have."""
    p, d = make_nixl("kv_producer"), make_nixl("kv_consumer")
    (answer,) = prefill(p, PROMPTS[:1])
    for change in (
        {"remote_block_ids": [[1 << 30] * 5]},
        {"remote_block_ids": [[1]]},
        {"remote_block_ids": [[0, 0, 0, 0, 0]]},
        {"remote_block_ids": [[1] * 5, [1] * 5]},
        {"remote_lease_slot": 1 << 30},
        {"remote_lease_generation": 7},
        {"remote_engine_id": "somebody else"},
        {"tp_size": 2},
    ):
        with pytest.raises(KVTransferError, match="could not be loaded"):
            decode(d, PROMPTS[:1], [{**answer, **change}])
    wait_until_free(d)


def test_roles_are_kept(make_nixl):
    p, d = make_nixl("kv_producer"), make_nixl("kv_consumer")
    with pytest.raises((VLLMError, VLLMValidationError), match="kv_consumer or kv_both"):
        decode(p, PROMPTS[:1], [GOOD])
    with pytest.raises((VLLMError, VLLMValidationError), match="kv_producer or kv_both"):
        prefill(d, PROMPTS[:1])


def test_the_side_channel_answers_handshakes_only(make_nixl, monkeypatch):
    import msgspec
    import zmq

    p = make_nixl("kv_producer")
    port = core_of(p).scheduler.kv_transfer.connector._scheduler.port
    assert ask_handshake("127.0.0.1", port, 0, PATIENCE)
    with pytest.raises(KVTransferError, match=r"no 'get_meta_msg' of rank \(0, 3\)"):
        ask_handshake("127.0.0.1", port, 3, PATIENCE)
    context = zmq.Context()
    socket = context.socket(zmq.REQ)
    socket.connect(f"tcp://127.0.0.1:{port}")
    socket.send(b"\x80\x04pickle")
    assert socket.poll(1000 * PATIENCE)
    assert msgspec.msgpack.decode(socket.recv())["error"] == "not a handshake request"
    context.destroy(linger=0)
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(port))
    with pytest.raises(ConfigError, match=f"PORT {port} cannot be bound"):
        make_nixl_on_port(make_nixl, monkeypatch, port)


def make_nixl_on_port(make_nixl, monkeypatch, port):
    import tests.kv_transfer.test_nixl as module

    monkeypatch.setattr(module, "free_port", lambda: port)
    return make_nixl("kv_producer")


def test_a_buffer_elsewhere_is_refused(make_llm):
    given = {**config(), "kv_buffer_device": "cuda"}
    with pytest.raises(ConfigError, match="kv_buffer_device cuda"):
        make_llm(kv_transfer_config=given)


def test_settings_are_checked(make_nixl):
    with pytest.raises(ConfigError, match="unknown field `lease`"):
        make_nixl(extra={"lease": 5})
    with pytest.raises(ConfigError, match="kv_lease_duration must be more than 0"):
        make_nixl(extra={"kv_lease_duration": 0})
    with pytest.raises(ConfigError, match="no backends"):
        make_nixl(extra={"backends": ["NOSUCH"]})
    with pytest.raises(ConfigError, match="transfer_path must be one of auto"):
        make_nixl(extra={"transfer_path": "pigeons"})
    with pytest.raises(ConfigError, match="staging_slot_bytes must be a power of two"):
        make_nixl(extra={"staging_slot_bytes": 10000})
    with pytest.raises(ConfigError, match="the buffer is the staging ring"):
        make_nixl(extra={"staging_slots": 0, "buffer": "cpu"})


def test_an_engine_that_waits_for_kv_is_told_when_it_has_come(make_llm, make_nixl):
    """No clock wakes it: only what the transfer thread says, and each step says what it changed."""
    prompt = [prompt_of(70, 1)]
    plain = greedy(make_llm(), prompt, 1)
    p, d = make_nixl("kv_producer"), make_nixl("kv_consumer")
    core, told = core_of(d), threading.Semaphore(0)
    core.executor.register_transfer_callback(told.release)
    (answer,) = prefill(p, prompt)
    params = SamplingParams(temperature=0, max_tokens=1, extra_args={"kv_transfer_params": answer})
    d.llm_engine.add_request("waits", prompt[0], params)
    _, made_progress = core.step()
    assert not made_progress
    assert told.acquire(timeout=20)
    # The load has ended: the step that hears of it runs no model, yet the next one may.
    outputs, made_progress = core.step()
    assert made_progress and not any(part.outputs for part in outputs.values())
    outputs, made_progress = core.step()
    (found,) = outputs.values()
    assert made_progress and [list(row.new_token_ids) for row in found.outputs] == plain
    wait_until_free(d)
