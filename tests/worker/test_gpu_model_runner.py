"""The GPU's model runner and overlapped steps, against the CPU's, through the engine core."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tests.effort import by_effort
from tests.worker.driver import VOCAB, make_config, make_hf_model
from tests.worker.interpreted import SHAPE, make_interpreted_config
from vllm.config.kv_transfer import KVTransferConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.worker.kv_hooks import ActiveConnectorStep


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads-of-16")
    make_hf_model(**SHAPE).save_pretrained(folder)
    return folder


@pytest.fixture
def start(monkeypatch):
    """``start(config)``: an engine core that ends with the test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cores = []

    def make(config) -> EngineCore:
        cores.append(EngineCore(config, UniProcExecutor, log_stats=True))
        return cores[-1]

    yield make
    for core in cores:
        core.shutdown()


@pytest.fixture(scope="module")
def overlapped_core(model):
    """Steps that overlap, in blocks of 16: for all tests that leave it as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        config = make_interpreted_config(model, overlapped=True)
        core = EngineCore(config, UniProcExecutor, log_stats=True)
    yield core
    core.shutdown()


BLOCK_BYTES = 2 * 2 * 16 * (2 * 16) * 4
"""Of 16 tokens: layers, KV heads, tokens, content, element."""

Requests = dict[str, tuple[list[int], SamplingParams]]


def add(core: EngineCore, requests: Requests) -> None:
    for name, (prompt, params) in requests.items():
        core.add_request(core.preprocess(EngineCoreRequest(name, prompt, params, 0.0)))


def run(core: EngineCore, requests: Requests, abort_at: dict[int, str] | None = None) -> dict:
    """Tokens and finish reason of each request; ``abort_at`` maps steps to requests to drop."""
    add(core, requests)
    tokens: dict[str, list[int]] = {name: [] for name in requests}
    ended: dict[str, object] = {}
    logprobs: dict[str, list] = {name: [] for name in requests}
    for step in range(2000):
        if not core.has_work():
            break
        name = (abort_at or {}).get(step)
        if name is not None:
            core.abort_requests([name])
        outputs, _ = core.step()
        for output in (o for message in outputs.values() for o in message.outputs):
            assert output.request_id not in ended, "an output after the last one"
            tokens[output.request_id] += output.new_token_ids
            logprobs[output.request_id] += output.new_logprobs or []
            if output.finish_reason is not None:
                ended[output.request_id] = output.finish_reason, output.stop_reason, output.error
    core.check_integrity()
    counts = core.scheduler.kv_cache_manager.block_pool
    assert counts.get_num_free_blocks() == counts.num_usable_blocks
    return {name: (tokens[name], ended.get(name), logprobs[name]) for name in requests}


def some_requests(rng: random.Random, count: int) -> Requests:
    """Requests of every kind that the runner tells apart."""
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 1.1, "seed": 2, "top_k": 7},
        {"temperature": 0.9, "seed": 3, "top_p": 0.8, "frequency_penalty": 0.5},
        {"temperature": 0.0, "logprobs": 2},
        {
            "temperature": 0.0,
            "min_tokens": 4,
            "max_tokens": 6,
            "stop_token_ids": list(range(0, VOCAB, 3)),
        },
        {"temperature": 0.0, "stop_token_ids": list(range(0, VOCAB, 7))},
    ]
    requests = {}
    for i in range(count):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 16, 17, 40]))]
        params = {"max_tokens": rng.choice([1, 2, 6])} | kinds[i % len(kinds)]
        requests[f"r{i}"] = prompt, SamplingParams(**params)
    return requests


def same(ours: dict, theirs: dict) -> None:
    for name, (tokens, end, logprobs) in theirs.items():
        assert ours[name][:2] == (tokens, end), name
        for row, other in zip(ours[name][2], logprobs, strict=True):
            assert row.token_ids == other.token_ids and row.rank == other.rank
            assert row.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_every_kind_of_request_gets_the_cpu_runners_tokens(model, start, overlapped_core) -> None:
    requests = some_requests(random.Random(5), 8)
    theirs = run(start(make_config(model)), requests)
    same(run(overlapped_core, requests), theirs)


def test_steps_one_after_the_other_give_the_same(model, start) -> None:
    requests = some_requests(random.Random(6), by_effort(4, 8))
    theirs = run(start(make_config(model, block_size=32)), requests)
    config = make_interpreted_config(model, overlapped=False, block_size=32)
    same(run(start(config), requests), theirs)


def test_chunks_preemption_and_few_rows_change_no_token(model, start, monkeypatch) -> None:
    requests = some_requests(random.Random(18), 8)
    theirs = run(start(make_config(model)), requests)
    # Eight blocks, which some requests outgrow, and prompts in chunks.
    config = make_interpreted_config(
        model, overlapped=True, max_num_seqs=5, kv_cache_memory_bytes=9 * BLOCK_BYTES
    )
    scheduler = replace(config.scheduler_config, max_num_batched_tokens=24)
    core = start(replace(config, scheduler_config=scheduler))
    preempt, preempted = core.scheduler.preempt, []

    def note_and_preempt(request, **options):
        preempted.append(request.request_id)
        preempt(request, **options)

    monkeypatch.setattr(core.scheduler, "preempt", note_and_preempt)
    same(run(core, requests), theirs)
    assert preempted


@pytest.mark.parametrize("blocks", [9, 64], ids=["preemption", "room"])
def test_steps_that_are_captured_give_the_same(model, start, blocks) -> None:
    """Graphs of 1 and 2 decodes and of 4, 20 and 28 tokens, which most steps fill in part."""
    requests = some_requests(random.Random(blocks), 8)
    theirs = run(start(make_config(model)), requests)
    config = make_interpreted_config(
        model, overlapped=True, captured=True, max_num_seqs=5,
        kv_cache_memory_bytes=blocks * BLOCK_BYTES,
    )  # fmt: skip
    core = start(config)
    runner = core.executor.worker.model_runner
    runner._graphs.replayed.clear()
    runner._prompt_graphs.replayed.clear()
    same(run(core, requests), theirs)
    assert 2 in runner._graphs.replayed
    assert 28 in runner._prompt_graphs.replayed


@pytest.fixture
def _unwritten_is_nan():
    """What was not written and is read shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_unwritten_is_nan")
def test_captured_layers_with_and_without_a_window_write_their_own_blocks(
    start, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("VLLM_KV_CACHE_DEBUG", "1")
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    shape = {**SHAPE, "vocab_size": VOCAB, "intermediate_size": 96, "head_dim": 16}
    config = Gemma3TextConfig(
        **shape, num_hidden_layers=2, layer_types=kinds, sliding_window=9,
        max_position_embeddings=256, initializer_range=0.3, query_pre_attn_scalar=16,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    requests = some_requests(random.Random(3), by_effort(4, 8))
    theirs = run(start(make_config(tmp_path)), requests)
    config = make_interpreted_config(
        tmp_path, overlapped=True, captured=True, max_tokens=20, max_num_seqs=3
    )
    core = start(config)
    assert len(core.executor.worker.model_runner.batch.block_table.tables) == 2
    same(run(core, requests), theirs)


def test_graphs_are_there_again_after_the_deepest_sleep(model, start) -> None:
    requests = {
        f"r{i}": ([7 * i + 5, 3, 9, 9, i], SamplingParams(temperature=0.0, max_tokens=3))
        for i in range(2)
    }
    config = make_interpreted_config(
        model, overlapped=True, captured=True, max_tokens=4, max_num_seqs=2
    )
    model_config = replace(config.model_config, enable_sleep_mode=True)
    core = start(replace(config, model_config=model_config))
    runner = core.executor.worker.model_runner
    # What prepares their inputs ran before any request came.
    assert (set(runner._prompt_graphs.replayed), runner._graphs.replayed) == ({4}, [2])
    theirs = run(core, requests)
    core.sleep(2)
    assert not runner._graphs and not runner._prompt_graphs
    core.wake_up()
    replayed = len(runner._prompt_graphs.replayed)
    same(run(core, requests), theirs)
    assert len(runner._prompt_graphs.replayed) > replayed


def test_a_start_without_room_for_a_warm_up_keeps_its_connector(model, start) -> None:
    config = make_interpreted_config(model, overlapped=True, max_tokens=1, max_num_seqs=1)
    transfer = KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"num_cpu_blocks": 4},
    )
    core = start(replace(config, kv_transfer_config=transfer))
    runner = core.executor.worker.model_runner
    assert isinstance(runner._connector, ActiveConnectorStep)


@pytest.mark.parametrize(
    "name",
    [pytest.param("int8_per_token_head", marks=pytest.mark.slow), "int4_per_token_head"],
)
def test_quantised_caches_give_the_tokens_of_the_plain_formula(model, start, name) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4)
    requests = {f"r{i}": ([i + 1, 7, 3 * i] * (i + 2), params) for i in range(3)}
    found = []
    for config in (make_config(model), make_interpreted_config(model, overlapped=True)):
        cache = replace(config.cache_config, cache_dtype=name)
        outputs = run(start(replace(config, cache_config=cache)), requests)
        found.append({key: value[:2] for key, value in outputs.items()})
    assert found[0] == found[1]


def test_requests_that_are_dropped_while_a_step_runs_leave_nothing(
    model, start, overlapped_core
) -> None:
    plain = {"temperature": 0.0, "max_tokens": 7}
    requests = {f"r{i}": ([i + 1] * (i + 1), SamplingParams(**plain)) for i in range(5)}
    theirs = run(start(make_config(model)), requests)
    ours = run(overlapped_core, requests, abort_at={2: "r1", 3: "r4", 6: "r0"})
    for name in ("r2", "r3"):
        assert ours[name] == theirs[name]
    for name in ("r0", "r1", "r4"):
        tokens, end, _ = ours[name]
        assert end is None and tokens == theirs[name][0][: len(tokens)]


def test_a_step_is_launched_before_the_last_ones_tokens_are_known(
    overlapped_core, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = overlapped_core
    execute, launched = core.executor.execute_model, []

    def note_and_execute(scheduler_output):
        launched.append(scheduler_output.total_num_scheduled_tokens)
        return execute(scheduler_output)

    monkeypatch.setattr(core.executor, "execute_model", note_and_execute)
    params = SamplingParams(temperature=0.0, max_tokens=3)
    add(core, {"a": ([1, 2, 3], params)})
    answered = []
    while core.has_work():
        outputs, _ = core.step()
        answered.append(sum(len(o.new_token_ids) for m in outputs.values() for o in m.outputs))
    assert answered[:4] == [0, 1, 1, 1]
    # Prompt; first decode; second decode; no fourth token is computed.
    assert launched[:3] == [3, 1, 1] and not any(launched[3:])


def test_a_request_that_needs_its_tokens_is_waited_for(overlapped_core) -> None:
    core = overlapped_core
    params = SamplingParams(temperature=0.0, max_tokens=3, presence_penalty=1.0)
    add(core, {"a": ([1, 2, 3], params)})
    assert core.scheduler.needs_known_tokens
    while core.has_work():
        launched = (
            core.scheduler.requests["a"].num_expected_tokens if core.scheduler.requests else 0
        )
        core.step()
        # One token more than was known, never two.
        assert not core.scheduler.requests or (
            core.scheduler.requests["a"].num_expected_tokens <= launched + 1
        )
    assert not core.scheduler.needs_known_tokens
