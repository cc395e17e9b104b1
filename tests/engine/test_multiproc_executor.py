"""Workers as processes: told the same, heard in order, and the end of one is the end of all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.engine.conftest import ENGINE_ARGS
from tests.engine.test_process import wait_gone
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.errors import ConfigError, EngineDeadError, WorkerError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.output import (
    CachedRequestData,
    GrammarOutput,
    NewRequestData,
    SchedulerOutput,
)
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import PendingModelRunnerOutput

WORKER = "tests.engine.plain_worker.PlainWorker"
ROOT = Path(__file__).resolve().parents[2]


def make_config(model: Path, *, overlapped: bool = False, **kwargs: Any) -> VllmConfig:
    args = EngineArgs(model=str(model), **{**ENGINE_ARGS, **kwargs})
    config = args.create_engine_config()
    scheduler = dataclasses.replace(config.scheduler_config, async_scheduling=overlapped)
    return dataclasses.replace(config, scheduler_config=scheduler)


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> VllmConfig:
    return make_config(tiny_model, worker_cls=WORKER, tensor_parallel_size=2)


@pytest.fixture
def executor(config: VllmConfig) -> Iterator[MultiprocExecutor]:
    executor = MultiprocExecutor(config)
    yield executor
    executor.shutdown()


def make_step(*counts: int, structured: bool = False, metadata: Any = None) -> SchedulerOutput:
    params = SamplingParams(temperature=0.5, stop_token_ids=[3], logit_bias={4: 1.5})
    names = [f"r{index}" for index in range(len(counts))]
    return SchedulerOutput(
        scheduled_new_reqs=[NewRequestData(names[0], [1, 2, 3], params, ([1, 2], []), 0)],
        scheduled_cached_reqs=CachedRequestData(
            req_ids=names[1:],
            resumed_req_ids=set(names[2:]),
            new_block_ids=[None if i % 2 else ([7], []) for i in range(len(counts) - 1)],
            num_computed_tokens=[5] * (len(counts) - 1),
            num_output_tokens=[1] * (len(counts) - 1),
        ),
        num_scheduled_tokens=dict(zip(names, counts, strict=True)),
        total_num_scheduled_tokens=sum(counts),
        num_common_prefix_blocks=[0],
        finished_req_ids={"gone"},
        has_structured_output_requests=structured,
        kv_connector_metadata=metadata,
        blocks_arriving=[5],
    )


# Messages


def test_messages_arrive_as_they_were_sent():
    from vllm.v1.executor import messages

    step = make_step(1, 2, 3, metadata={"any": Path("object")})
    assert messages.decode_step(messages.encode_step(step)) == step
    assert step.kv_connector_metadata == {"any": Path("object")}
    grammar = GrammarOutput(["a"], np.array([[1, -5]], np.int32))
    got = messages.decode_grammar(messages.encode_grammar(grammar))
    assert got is not None
    assert got.structured_output_request_ids == ["a"]
    np.testing.assert_array_equal(got.grammar_bitmask, grammar.grammar_bitmask)
    assert messages.decode_grammar(messages.encode_grammar(None)) is None


# Calls and steps


def test_every_worker_answers_a_call(executor: MultiprocExecutor):
    executor.init_device()
    assert executor.get_kv_cache_specs() == [{"layer.0": None}, {"layer.1": None}]
    assert executor.determine_available_memory() == [1000, 1001]
    executor.initialize_from_config(["first", "second"])
    assert executor.collective_rpc("get_events") == [["config first"], ["config second"]]
    executor.compile_or_warm_up_model()
    assert executor.collective_rpc("echo", ({1: (2,)},), {"twice": True}) == [[{1: (2,)}] * 2] * 2
    large = bytes(10 << 20)
    assert executor.collective_rpc("echo", (large,)) == [large, large]
    executor.check_health()


def test_results_of_steps_come_from_the_first_worker(executor: MultiprocExecutor):
    output = executor.execute_model(make_step(4, 2))
    assert output.req_ids == ["r0", "r1"]
    assert output.req_id_to_index == {"r0": 0, "r1": 1}
    assert output.sampled_token_ids == [[4], [2]]
    assert output.request_errors == {"x": "from 0"}
    row = output.logprobs["r0"]
    assert row.logprobs.dtype == np.float32
    assert row.logprob_token_ids.tolist() == [[0, 1, 2]]

    step = make_step(1, structured=True)
    assert executor.execute_model(step) is None
    mask = GrammarOutput(["r0"], np.array([[3]], np.int32))
    assert executor.sample_tokens(mask).sampled_token_ids == [[1]]
    assert (
        executor.collective_rpc("get_events")
        == [["run 2", "result 2", "run 1", "mask [[3]]", "result 1"]] * 2
    )


def test_overlapped_steps_are_launched_before_the_last_result(tiny_model: Path):
    executor = MultiprocExecutor(
        make_config(tiny_model, worker_cls=WORKER, tensor_parallel_size=2, overlapped=True)
    )
    try:
        first, second = (executor.execute_model(make_step(*[1] * n)) for n in (1, 2))
        assert isinstance(first, PendingModelRunnerOutput)
        assert first.result().req_ids == ["r0"]
        # Nothing follows the second: it is finished all the same.
        assert second.result().req_ids == ["r0", "r1"]
        third = executor.execute_model(make_step(1, 1, 1))
        events = ["run 1", "run 2", "result 1", "result 2", "run 3", "result 3"]
        # A call lets the steps before it end; their results are not lost.
        assert executor.collective_rpc("get_events") == [events] * 2
        assert len(third.result().req_ids) == 3
    finally:
        executor.shutdown()


# Failures


def test_an_error_in_a_call_keeps_its_class_and_the_workers_go_on(
    config: VllmConfig, capfd: pytest.CaptureFixture[str]
):
    executor = MultiprocExecutor(config)
    try:
        with pytest.raises(ConfigError, match="use 4") as caught:
            executor.collective_rpc("refuse", (1,))
        assert caught.value.parameter == "option"
        assert "Traceback" not in capfd.readouterr().err
        with pytest.raises(WorkerError, match="worker 0: ZeroDivisionError: a bug"):
            executor.collective_rpc("break_down")
        assert capfd.readouterr().err.count("Traceback") == 2
        assert executor.collective_rpc("echo", (1,)) == [1, 1]
    finally:
        executor.shutdown()


def test_workers_that_wait_for_one_that_has_refused_are_given_up(executor: MultiprocExecutor):
    with pytest.raises(ConfigError, match="rank 1 cannot"):
        executor.collective_rpc("refuse_and_hang")
    with pytest.raises(WorkerError, match="rank 1 cannot"):
        executor.collective_rpc("echo", (1,))


def test_an_answer_that_comes_too_late_is_nobodys(executor: MultiprocExecutor, tmp_path: Path):
    for turn, rank in enumerate((1, 0, 1)):
        morning = tmp_path / str(turn)
        with pytest.raises(TimeoutError, match=f"nap: no answer within 0.1 s from .*{rank}"):
            executor.collective_rpc("nap", (rank, str(morning)), timeout=0.1)
        morning.touch()
    # Steps and calls get what is theirs.
    assert executor.execute_model(make_step(4)).sampled_token_ids == [[4]]
    assert executor.collective_rpc("echo", (1,), timeout=120) == [1, 1]
    awake = executor.collective_rpc("nap", (0, str(tmp_path)), timeout=120)
    assert awake == ["awake 0", "awake 1"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "worker 1 failed: ZeroDivisionError: a step went wrong"),
        ("die", r"worker 1 has died \(killed by SIGKILL\)"),
    ],
)
def test_a_step_that_ends_a_worker_ends_the_engine(
    executor: MultiprocExecutor, how: str, message: str
):
    heard: list[Exception] = []
    called = threading.Event()

    def callback(error: Exception) -> None:
        heard.append(error)
        called.set()

    executor.register_failure_callback(callback)
    pids = executor.collective_rpc("pid")
    executor.collective_rpc("fail_on", (1, how))
    # The first worker answers; whether it is heard before the other's end is a matter of luck.
    with contextlib.suppress(WorkerError):
        executor.execute_model(make_step(1))
    assert called.wait(120)
    with pytest.raises(WorkerError, match=message):
        executor.execute_model(make_step(1))
    assert str(heard[0]) == str(executor._failure)
    executor.shutdown()
    assert all(wait_gone(pid) for pid in pids)


def test_the_first_workers_end_is_noticed_while_its_result_is_waited_for(
    executor: MultiprocExecutor,
):
    executor.collective_rpc("fail_on", (0, "die"))
    with pytest.raises(WorkerError, match="worker 0 has died"):
        executor.execute_model(make_step(1))


PARENT = """
import signal, sys
from pathlib import Path
from tests.engine.test_multiproc_executor import WORKER, MultiprocExecutor, make_config
config = make_config(Path(sys.argv[1]), worker_cls=WORKER, tensor_parallel_size=2)
executor = MultiprocExecutor(config)
print(executor._directory, *executor.collective_rpc("pid"), flush=True)
signal.pause()
"""


def test_workers_leave_with_their_parent(tiny_model: Path):
    """However it ends: here it is killed."""
    command = [sys.executable, "-c", PARENT, str(tiny_model)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        directory, *pids = parent.stdout.readline().split()
        parent.kill()
    workers = [int(number) for number in pids]
    assert len(workers) == 2
    assert all(wait_gone(worker) for worker in workers)
    assert not Path(directory).exists()


def test_a_signal_to_the_group_is_left_to_the_parent(executor: MultiprocExecutor):
    for pid in executor.collective_rpc("pid"):
        for signum in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, signum)
    assert executor.collective_rpc("echo", (1,)) == [1, 1]


# Options


def test_the_backend_follows_from_the_number_of_workers(tiny_model: Path, config: VllmConfig):
    assert Executor.get_class(make_config(tiny_model)) is UniProcExecutor
    assert Executor.get_class(config) is MultiprocExecutor
    one = make_config(tiny_model, distributed_executor_backend="mp")
    assert Executor.get_class(one) is MultiprocExecutor
    with pytest.raises(ConfigError, match=r"uni runs one worker.*use mp"):
        make_config(tiny_model, distributed_executor_backend="uni", tensor_parallel_size=2)


def test_heads_that_cannot_be_shared_out_are_refused_with_the_sizes_that_work(tiny_model: Path):
    with pytest.raises(ConfigError, match=r"4 attention heads and 2 KV heads.*can: 1, 2, 4$"):
        make_config(tiny_model, tensor_parallel_size=3)


# With a model


PROMPTS = ["The quick brown", "def main", [7, 8, 9] * 20]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, logprobs=5),
    SamplingParams(temperature=0.9, seed=5, n=2, max_tokens=24, ignore_eos=True, logprobs=0),
    SamplingParams(temperature=0, max_tokens=24, prompt_logprobs=2, ignore_eos=True),
]


def rows(outputs: list[Any]) -> list[list[dict[int, float]]]:
    """All log-probabilities, of prompts and of outputs."""
    parts = [c.logprobs for out in outputs for c in out.outputs]
    parts += [[row for row in out.prompt_logprobs or () if row] for out in outputs]
    return [
        [{token: entry.logprob for token, entry in row.items()} for row in part or ()]
        for part in parts
    ]


def sum_of_a_late_group(worker: Any) -> int:
    import torch
    import torch.distributed as dist

    ranks = torch.tensor(worker.rank + 1)
    dist.all_reduce(ranks, group=dist.new_group())
    return int(ranks)


def test_workers_meet_again_after_the_start(tiny_model: Path):
    """NCCL connects the ranks of a group at its first sum, through what they met by."""
    executor = MultiprocExecutor(make_config(tiny_model, tensor_parallel_size=2))
    try:
        executor.init_device()
        assert executor.collective_rpc(sum_of_a_late_group, timeout=60) == [3, 3]
        directory = Path(executor._directory)
        assert directory.exists()
    finally:
        executor.shutdown()
    assert not directory.exists()


def test_two_workers_give_the_tokens_of_one_until_one_is_killed(tiny_model: Path, llm: LLM):
    structured = SamplingParams(
        temperature=0, max_tokens=12, structured_outputs=StructuredOutputsParams(regex="[ab]{8}")
    )
    with LLM(str(tiny_model), **ENGINE_ARGS, tensor_parallel_size=2) as two:
        expected = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        got = two.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert [[c.token_ids for c in out.outputs] for out in got] == [
            [c.token_ids for c in out.outputs] for out in expected
        ]
        ours, theirs = rows(got), rows(expected)
        assert sum(len(part) for part in ours) > 100
        for part, other in zip(ours, theirs, strict=True):
            for row, wanted in zip(part, other, strict=True):
                assert row == pytest.approx(wanted, abs=1e-4)
        text = two.generate("x", structured, use_tqdm=False)[0].outputs[0].text
        assert text == llm.generate("x", structured, use_tqdm=False)[0].outputs[0].text
        assert len(text) == 8
        # Each caches its own KV head: half the bytes a block.
        assert two.collective_rpc("determine_available_memory") == [4 << 20] * 2
        facts = two.llm_engine.client.facts
        assert facts.num_gpu_blocks == 2 * llm.llm_engine.client.facts.num_gpu_blocks

        engine = psutil.Process(two.llm_engine.client.pid)
        workers = engine.children()
        assert len(workers) == 2
        workers[1].kill()
        with pytest.raises(EngineDeadError, match=r"worker 1 has died \(killed by SIGKILL\)"):
            two.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert all(wait_gone(process.pid) for process in (engine, *workers))
