"""The engine in its own process: same answers, clean ends, errors that arrive."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.engine.conftest import ENGINE_ARGS
from vllm import LLM, SamplingParams
from vllm.errors import (
    CapacityError,
    ConfigError,
    EngineDeadError,
    EngineGenerateError,
    VLLMValidationError,
)
from vllm.utils.system import raise_open_files_limit, wake_on_time
from vllm.v1.engine import EngineCoreOutputs, UtilityOutput
from vllm.v1.engine.core_client import SyncMPClient
from vllm.v1.engine.core_proc import _Sender
from vllm.v1.worker.cpu_worker import CPUWorker

PROMPTS = ["The quick brown", "def main", [7, 8, 9] * 20]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=16, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=3, n=2, max_tokens=16, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=16, prompt_logprobs=1, ignore_eos=True),
]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_gone(pid: int) -> bool:
    deadline = time.monotonic() + 120
    while is_alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def client_of(llm: LLM) -> SyncMPClient:
    client = llm.llm_engine.client
    assert isinstance(client, SyncMPClient)
    return client


@contextlib.contextmanager
def started(model: Path, **kwargs: Any) -> Iterator[LLM]:
    with LLM(str(model), **{**ENGINE_ARGS, **kwargs}) as llm:
        yield llm


def summary(llm: LLM) -> list[Any]:
    return [
        [
            (c.token_ids, c.text, c.finish_reason, c.cumulative_logprob, c.logprobs)
            for c in out.outputs
        ]
        + [out.prompt_logprobs, out.prompt_token_ids]
        for out in llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    ]


def test_a_process_gives_the_same_and_its_clean_end_leaves_nothing(
    tiny_model: Path, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with started(tiny_model) as other:
        client = client_of(other)
        assert is_alive(client.pid)
        # The sockets' directory is gone as soon as both sides are connected.
        assert list(tmp_path.iterdir()) == []
        assert client.facts.num_gpu_blocks > 1
        assert other.collective_rpc("check_health", timeout=60) == [None]
        assert other.collective_rpc("sleep", args=(1,)) == [None]
        assert other.collective_rpc("wake_up", kwargs={"tags": ["kv_cache"]}) == [None]
        with pytest.raises(VLLMValidationError, match="functions are not sent to the engine's"):
            other.collective_rpc(len)
        assert other.reset_prefix_cache()
        assert summary(other) == summary(llm)
        # Ctrl-C and SIGTERM reach the whole group: only the front end acts on them.
        for signum in (signal.SIGINT, signal.SIGTERM):
            os.kill(client.pid, signum)
        assert summary(other) == summary(llm)

        client.call_utility("pause")
        other.llm_engine.add_request("a", "x", SamplingParams(max_tokens=4, ignore_eos=True))
        assert client.call_utility("is_paused") is True
        assert not any(outputs.outputs for outputs in client._buffered)
        client.call_utility("resume")
        while not (outputs := other.llm_engine.step()):
            pass
        assert len(outputs[0].outputs[0].token_ids) >= 1
    assert not is_alive(client.pid)
    with pytest.raises(EngineDeadError, match="shut down"):
        other.generate("x", use_tqdm=False)


def test_many_open_files_do_not_hide_the_engines_end(tiny_model: Path) -> None:
    """A server with 1,024 connections has descriptors that select() refuses."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    raised = raise_open_files_limit()
    assert raised >= limits[0]
    with contextlib.ExitStack() as files:
        for _ in range(min(1100, raised - 200)):
            files.enter_context(open(os.devnull))
        files.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        with started(tiny_model) as llm:
            assert llm.generate("x", SamplingParams(max_tokens=2), use_tqdm=False)
            os.kill(client_of(llm).pid, signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="SIGKILL"):
                llm.generate("x", use_tqdm=False)


def test_a_killed_engine_is_reported_and_leaves_no_process(tiny_model: Path) -> None:
    with started(tiny_model) as llm:
        pid = client_of(llm).pid
        llm.llm_engine.add_request("a", "x", SamplingParams(max_tokens=200, ignore_eos=True))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            while True:
                llm.llm_engine.step()
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            llm.generate("x", use_tqdm=False)
    assert wait_gone(pid)


def test_an_exception_in_the_engine_is_logged_once_and_reaches_the_caller(
    tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with started(tiny_model) as llm:
        pid = client_of(llm).pid
        # A worker that has given back what it holds cannot run a step.
        llm.collective_rpc("shutdown")
        with pytest.raises(EngineDeadError, match="the engine process failed") as caught:
            llm.generate("x", use_tqdm=False)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err.count("Traceback") == 1
    assert wait_gone(pid)


class OddWorker(CPUWorker):
    """Has methods that no engine expects."""

    def get_something(self) -> object:
        return object()

    def get_much(self) -> int:
        return 2**80

    def fail(self) -> None:
        raise KeyError("nothing there")


def test_calls_of_workers_that_go_wrong_end_no_engine(tiny_model: Path) -> None:
    worker_cls = f"{OddWorker.__module__}.{OddWorker.__qualname__}"
    with started(tiny_model, worker_cls=worker_cls) as llm:
        for method in ("get_something", "get_much", "get_model"):
            with pytest.raises(EngineGenerateError, match="the result is no plain data"):
                llm.collective_rpc(method)
        with pytest.raises(EngineGenerateError, match=r"^KeyError: 'nothing there'$"):
            llm.collective_rpc("fail")
        for wrong in (object(), 2**80, "\ud800"):
            with pytest.raises(VLLMValidationError, match="args and kwargs must be plain data"):
                llm.collective_rpc("check_health", args=(wrong,))
        with pytest.raises(VLLMValidationError, match="timeout must be"):
            llm.collective_rpc("check_health", timeout=1e300)
        assert llm.collective_rpc("check_health") == [None]
        assert llm.generate("x", SamplingParams(max_tokens=2), use_tqdm=False)


def test_a_message_that_cannot_be_sent_ends_the_engine(tmp_path: Path) -> None:
    """Nobody would get an answer any more, so nobody must go on waiting for one."""
    failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    context = zmq.Context()
    sender = _Sender(context, [f"ipc://{tmp_path}/out"], failures.put)
    sender.put(0, EngineCoreOutputs(utility_output=UtilityOutput(1, None, object())))
    assert isinstance(failures.get(timeout=20), TypeError)
    sender.close()
    context.destroy(linger=0)


SCRIPT = """
import sys
from vllm import LLM
llm = LLM({model!r}, dtype="float32", kv_cache_memory_bytes=1 << 22)
print(llm.llm_engine.client.pid, flush=True)
out = llm.generate("The quick", use_tqdm=False)
print(len(out[0].outputs[0].token_ids), flush=True)
sys.stdin.read()
"""


FORK = """
import os
from vllm import LLM, SamplingParams
from vllm.errors import EngineDeadError
llm = LLM({model!r}, dtype="float32", kv_cache_memory_bytes=1 << 22)
if os.fork() == 0:
    try:
        llm.generate("The quick", use_tqdm=False)
    except EngineDeadError as error:
        print(error, flush=True)
    del llm
    os._exit(0)
os.wait()
out = llm.generate("The quick", SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
print(len(out[0].outputs[0].token_ids), flush=True)
"""


def test_a_fork_is_told_whose_the_engine_is(tiny_model: Path) -> None:
    """It would wait for answers that its parent gets, and end its parent's engine with itself."""
    done = subprocess.run(
        [sys.executable, "-c", FORK.format(model=str(tiny_model))],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    told, count = done.stdout.splitlines()
    assert re.fullmatch(r"this engine belongs to process (\d+), of which process (\d+) is .*", told)
    assert count == "3"


@pytest.fixture
def script(tiny_model: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A program without a ``__main__`` guard that waits, its engine running."""
    path = tmp_path / "program.py"
    path.write_text(SCRIPT.format(model=str(tiny_model)))
    process = subprocess.Popen(
        [sys.executable, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    yield process
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_the_engine_dies_with_its_parent(script: subprocess.Popen[str], tmp_path: Path) -> None:
    assert script.stdout is not None
    pid = int(script.stdout.readline())
    assert int(script.stdout.readline()) > 0
    assert is_alive(pid)
    script.send_signal(signal.SIGKILL)
    assert wait_gone(pid)
    assert [path.name for path in tmp_path.iterdir()] == ["program.py"]


def test_a_program_that_just_ends_leaves_no_engine(script: subprocess.Popen[str]) -> None:
    assert script.stdout is not None
    assert script.stdin is not None
    pid = int(script.stdout.readline())
    script.stdin.close()
    assert script.wait(timeout=120) == 0
    assert wait_gone(pid)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"kv_cache_memory_bytes": 1 << 12}, CapacityError, "--max-model-len"),
        ({"worker_cls": "nowhere.Worker"}, ConfigError, "--worker-cls nowhere.Worker"),
    ],
)
def test_a_failure_to_start_arrives_as_it_was_raised(
    tiny_model: Path,
    kwargs: dict[str, Any],
    error: type[Exception],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(error, match=message) as caught, started(tiny_model, **kwargs):
        pass
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_the_queue_limit(tiny_model: Path) -> None:
    from vllm.errors import QueueFullError

    with started(tiny_model, max_num_queued_reqs=2, max_num_seqs=1) as llm:
        with pytest.raises(QueueFullError):
            llm.generate(["x"] * 12, SamplingParams(max_tokens=50, ignore_eos=True), use_tqdm=False)
        assert not llm.llm_engine.has_unfinished_requests()
        assert len(llm.generate("x", use_tqdm=False)) == 1


def test_a_thread_that_asks_for_it_is_woken_on_time() -> None:
    """Of the kernel: how late it may wake this thread, in nanoseconds (PR_GET_TIMERSLACK)."""
    library = ctypes.CDLL(None)

    def allowed() -> list[int]:
        before = library.prctl(30, 0, 0, 0, 0)
        wake_on_time()
        return [before, library.prctl(30, 0, 0, 0, 0)]

    with ThreadPoolExecutor(1) as pool:
        before, after = pool.submit(allowed).result()
    assert after == 1000 < before
    assert library.prctl(30, 0, 0, 0, 0) == before
