"""Workers as processes of this host: started, told what to do through shared memory, watched.

A worker that dies or fails in a step ends the engine: the others could only wait for it. The
first cause is what is reported.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.device_communicators.shm_broadcast import RingHandle, RingReader, RingWriter
from vllm.errors import WorkerError
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.processes import describe_end, private_directory, start_child
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.engine.failures import EngineFailure, exception_of
from vllm.v1.engine.serial import read_status
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.messages import (
    Kind,
    decode_answer,
    decode_result,
    encode_call,
    encode_grammar,
    encode_step,
)
from vllm.v1.executor.worker_proc import WorkerLaunch, freeze_garbage
from vllm.v1.outputs import ModelRunnerOutput, PendingModelRunnerOutput

__all__ = ["MultiprocExecutor"]

logger = init_logger(__name__)

_ENTRY = "vllm.v1.executor.worker_proc:main"
# Looking costs a core; sleeping costs some 50 us. Steps of a device follow each other faster than
# that matters, steps of the CPU need all cores for themselves.
_SPIN_SECONDS = 1e-3
_STOP_SECONDS = 3.0
# A worker that is killed takes others with it, whose own words may arrive first.
_CAUSE_SECONDS = 1.0


class _WorkerProcess:
    """One worker, from its start to its end."""

    def __init__(self, launch: WorkerLaunch, directory: str, env: dict[str, str]) -> None:
        self.rank = launch.rank
        config_read, config_write = os.pipe()
        self.status_fd, status_write = os.pipe()
        """Readable once the process has ended or failed."""
        arguments = [
            f"--parent={os.getpid()}",
            f"--rank={launch.rank}",
            f"--config-fd={config_read}",
            f"--status-fd={status_write}",
            f"--directory={directory}",
        ]
        fds = (config_read, status_write, *launch.inbox.fds, *launch.outbox.fds)
        try:
            self._process = start_child(_ENTRY, arguments, fds, env)
        except BaseException:
            os.close(config_write)
            os.close(self.status_fd)
            raise
        finally:
            os.close(config_read)
            os.close(status_write)
        # A worker that is gone already is noticed by whoever watches it.
        with contextlib.suppress(BrokenPipeError), os.fdopen(config_write, "wb") as pipe:
            pickle.dump(launch, pipe)

    def read_failure(self) -> tuple[bool, str, str | None]:
        """Whether it was ended from outside, what became of it, and the stack of its exception;
        once ``status_fd`` is readable.
        """
        status = read_status(self.status_fd)
        if status is not None and status.failure is not None:
            failure = status.failure
            return False, f"worker {self.rank} failed: {failure}", failure.traceback
        return True, f"worker {self.rank} has died ({describe_end(self._process)})", None

    def stop(self, deadline: float) -> None:
        """Wait until ``deadline`` for the process to end, then kill it."""
        with contextlib.suppress(Exception):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self.status_fd)


class _Awaited(PendingModelRunnerOutput):
    """The result of a step that workers have been told to run."""

    __slots__ = ("_executor", "_number")

    def __init__(self, executor: MultiprocExecutor, number: int) -> None:
        self._executor = executor
        self._number = number

    def result(self) -> ModelRunnerOutput:
        return self._executor.result_of_step(self._number)


class MultiprocExecutor(Executor):
    """Tells all workers the same; results of steps come from the first one.

    Where a KV connector is configured every worker sends its results, and
    ``kv_output_aggregator`` makes one of them.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__(vllm_config)
        world_size = vllm_config.parallel_config.world_size
        self._directory = private_directory()
        """Where the workers meet, at the start and whenever they make a group: NCCL connects ranks
        at their first sum. Gone with them."""
        self._overlaps = vllm_config.scheduler_config.async_scheduling
        self._failure: WorkerError | None = None
        self._on_failure: Callable[[Exception], None] | None = None
        self._closing = False
        self._closed = False
        self._failed_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._stop_read, self._stop_write = os.pipe()
        self._num_steps = 0
        self._next_result = 0
        gathers = vllm_config.kv_transfer_config is not None
        beside_host = current_platform.runs_beside_host
        spin = _SPIN_SECONDS if beside_host else 0.0
        inbox = RingHandle.create(world_size)
        outboxes = [RingHandle.create(1) for _ in range(world_size)]
        self._ring = RingWriter(inbox, self._check)
        self._readers = [
            RingReader(outbox, 0, spin=spin, interrupt_fd=self._failed_fd) for outbox in outboxes
        ]
        self._result_ranks = list(range(world_size)) if gathers else [0]
        self._results: list[deque[ModelRunnerOutput]] = [deque() for _ in range(world_size)]
        self._unread = [0] * world_size
        """Answers to come, by rank, to calls for which nobody waits any more."""
        self._handles = [inbox, *outboxes]
        self._workers: list[_WorkerProcess] = []
        env = _worker_environment()
        try:
            for rank in range(world_size):
                launch = WorkerLaunch(
                    vllm_config=vllm_config,
                    rank=rank,
                    local_rank=rank,
                    distributed_init_method=f"file://{self._directory}/rendezvous",
                    inbox=inbox,
                    outbox=outboxes[rank],
                    spin=spin,
                    sends_results=rank in self._result_ranks,
                )
                self._workers.append(_WorkerProcess(launch, self._directory, env))
        except BaseException:
            self.shutdown()
            raise
        self._watcher = threading.Thread(target=self._watch, name="worker-watch", daemon=True)
        self._watcher.start()

    # Failures

    def register_failure_callback(self, callback: Callable[[Exception], None]) -> None:
        self._on_failure = callback
        if self._failure is not None:
            callback(self._failure)

    def _watch(self) -> None:
        """Thread: until a worker ends or the executor is shut down."""
        poller = select.poll()
        poller.register(self._stop_read, select.POLLIN)
        by_fd = {worker.status_fd: worker for worker in self._workers}
        for fd in by_fd:
            poller.register(fd, select.POLLIN)
        ended = {fd for fd, _ in poller.poll()}
        if self._stop_read in ended or self._closing:
            return
        first, stack = "", None
        deadline = time.monotonic() + _CAUSE_SECONDS
        while True:
            for fd in ended & by_fd.keys():
                from_outside, message, traceback = by_fd.pop(fd).read_failure()
                poller.unregister(fd)
                if not first or from_outside:
                    first, stack = message, traceback
                if from_outside:
                    deadline = 0.0
            left = deadline - time.monotonic()
            if left <= 0 or not by_fd:
                break
            ended = {fd for fd, _ in poller.poll(left * 1000)}
            if self._stop_read in ended:
                break
        if stack is not None:
            logger.error("%s\n%s", first, stack)
        self._failure = WorkerError(first)
        os.eventfd_write(self._failed_fd, 1)
        if self._on_failure is not None and not self._closing:
            self._on_failure(self._failure)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def check_health(self) -> None:
        self.collective_rpc("check_health")

    # Calls

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
    ) -> list[Any]:
        self._check()
        self._ring.send(Kind.CALL, encode_call(method, args, kwargs or {}))
        answers = self._receive_answers(timeout)
        if timeout is not None and len(answers) < len(self._workers):
            late = [rank for rank in range(len(self._workers)) if rank not in answers]
            if all(failure is None for _, failure in answers.values()):
                for rank in late:
                    self._unread[rank] += 1
                raise TimeoutError(
                    f"{_name_of(method)}: no answer within {timeout:g} s from workers "
                    f"{', '.join(map(str, late))}"
                )
        for rank, (_, failure) in sorted(answers.items()):
            if failure is not None:
                error = exception_of(failure, WorkerError(f"worker {rank}: {failure}"))
                if len(answers) < len(self._workers):
                    # The others wait for this one, and nothing will bring them back.
                    self._failure = WorkerError(str(error))
                raise error
        return [answers[rank][0] for rank in range(len(self._workers))]

    def _receive_answers(
        self, timeout: float | None
    ) -> dict[int, tuple[Any, EngineFailure | None]]:
        """By rank; of all, unless one has failed and the others do not answer for a while, or
        ``timeout`` seconds are over.
        """
        answers: dict[int, tuple[Any, EngineFailure | None]] = {}
        poller = select.poll()
        poller.register(self._failed_fd, select.POLLIN)
        missing = dict(enumerate(self._readers))
        for reader in missing.values():
            poller.register(reader.wake_fd, select.POLLIN)
        deadline = None if timeout is None else time.monotonic() + timeout
        has_failed = False
        while missing:
            ready = [rank for rank, reader in missing.items() if reader.has_message]
            for rank in ready:
                payload = self._receive_one(rank, Kind.ANSWER)
                if payload is None:
                    continue
                answer = answers[rank] = decode_answer(payload)
                poller.unregister(missing.pop(rank).wake_fd)
                if answer[1] is not None and not has_failed:
                    has_failed, deadline = True, time.monotonic() + _CAUSE_SECONDS
            if ready:
                continue
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            if not poller.poll(left):
                break
            self._check()
            for reader in missing.values():
                reader.forget_wakeups()
        return answers

    def _receive(self, rank: int, wanted: Kind) -> bytes:
        """The next message of ``wanted`` from a worker; see ``_receive_one``."""
        while (payload := self._receive_one(rank, wanted)) is None:
            pass
        return payload

    def _receive_one(self, rank: int, wanted: Kind) -> bytes | None:
        """The next message from a worker, or None where it is not ``wanted``.

        Results that come first are kept; answers for which nobody waits any more are dropped.
        """
        message = self._readers[rank].receive()
        if message is None:
            self._check()
            raise AssertionError("interrupted without a failure")
        kind, payload = message
        if kind == Kind.ANSWER and self._unread[rank]:
            self._unread[rank] -= 1
            return None
        if kind == wanted:
            return payload
        assert kind == Kind.RESULT, kind
        self._results[rank].append(decode_result(payload))
        return None

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        self.collective_rpc(_initialize_worker, (kv_cache_configs,))

    def compile_or_warm_up_model(self) -> None:
        super().compile_or_warm_up_model()
        self.collective_rpc(freeze_garbage)

    # Steps

    def execute_model(
        self, scheduler_output: SchedulerOutput
    ) -> ModelRunnerOutput | PendingModelRunnerOutput | None:
        self._check()
        self._ring.send(Kind.EXECUTE, encode_step(scheduler_output))
        if scheduler_output.has_structured_output_requests:
            # The masks are made while the workers compute.
            return None
        return self._step_output()

    def sample_tokens(
        self, grammar_output: GrammarOutput | None
    ) -> ModelRunnerOutput | PendingModelRunnerOutput:
        self._ring.send(Kind.SAMPLE, encode_grammar(grammar_output))
        return self._step_output()

    def _step_output(self) -> ModelRunnerOutput | PendingModelRunnerOutput:
        number = self._num_steps
        self._num_steps += 1
        awaited = _Awaited(self, number)
        return awaited if self._overlaps else awaited.result()

    def result_of_step(self, number: int) -> ModelRunnerOutput:
        """What step ``number`` has computed; steps are asked for in order."""
        assert number == self._next_result, "steps end in the order in which they began"
        self._next_result += 1
        if self._overlaps and number == self._num_steps - 1:
            self._ring.send(Kind.FLUSH, b"")
        outputs = [self._result_from(rank) for rank in self._result_ranks]
        if len(outputs) == 1:
            return outputs[0]
        assert self.kv_output_aggregator is not None, "nobody joins what workers' connectors say"
        return self.kv_output_aggregator.aggregate(outputs, output_rank=0)

    def _result_from(self, rank: int) -> ModelRunnerOutput:
        kept = self._results[rank]
        return kept.popleft() if kept else decode_result(self._receive(rank, Kind.RESULT))

    # The end

    def shutdown(self) -> None:
        if self._closed:
            return
        self._closed = self._closing = True
        os.write(self._stop_write, b"x")
        deadline = 0.0
        if self._failure is None:
            # A ring that is full has readers that will not stop in time anyway.
            with contextlib.suppress(WorkerError):
                self._ring.send(Kind.STOP, b"")
            deadline = time.monotonic() + _STOP_SECONDS
        for worker in self._workers:
            worker.stop(deadline)
        watcher = getattr(self, "_watcher", None)
        if watcher is not None and watcher is not threading.current_thread():
            watcher.join()
        self._ring.close()
        for reader in self._readers:
            reader.close()
        for handle in self._handles:
            handle.close()
        for fd in (self._failed_fd, self._stop_read, self._stop_write):
            os.close(fd)
        shutil.rmtree(self._directory, ignore_errors=True)


def _name_of(method: str | Callable[..., Any]) -> str:
    return method if isinstance(method, str) else getattr(method, "__name__", repr(method))


def _initialize_worker(worker: Any, kv_cache_configs: list[Any]) -> None:
    """Called on every worker with the plans of all."""
    worker.initialize_from_config(kv_cache_configs[worker.rank])


def _worker_environment() -> dict[str, str]:
    """The workers' environment: they meet on this host, whatever its name resolves to."""
    env = dict(os.environ)
    if os.path.exists("/sys/class/net/lo"):
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return env
