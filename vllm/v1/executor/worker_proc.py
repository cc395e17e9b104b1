"""A worker as a process of its own, started by ``multiproc_executor``.

Takes messages from the engine's ring one after the other and answers in its own. Where steps
overlap, a step is launched before the result of the one before is asked for and sent.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import pickle
import sys
import traceback
from collections import deque
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.device_communicators.shm_broadcast import RingHandle, RingReader, RingWriter
from vllm.logger import init_logger, set_level
from vllm.utils.import_utils import without_collector
from vllm.utils.processes import adopt_child_manners, end_with_parent
from vllm.v1.engine.failures import failure_of, is_expected
from vllm.v1.engine.serial import EngineStatus, write_status
from vllm.v1.executor.messages import (
    Kind,
    decode_call,
    decode_grammar,
    decode_step,
    encode_answer,
    encode_result,
)
from vllm.v1.outputs import ModelRunnerOutput, PendingModelRunnerOutput

__all__ = ["WorkerLaunch", "WorkerLoop", "main"]

logger = init_logger("vllm.v1.executor.worker_proc")

# A pipe takes 64 KiB at once.
_TRACEBACK_CHARACTERS = 8000


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLaunch:
    """What a worker process is started with; pickled, through an inherited pipe."""

    vllm_config: VllmConfig
    rank: int
    local_rank: int
    distributed_init_method: str
    inbox: RingHandle
    """The engine's ring; this worker is reader number ``local_rank``."""
    outbox: RingHandle
    """This worker's ring, with one reader."""
    spin: float
    """Seconds to look for a message before sleeping."""
    sends_results: bool
    """Whether the engine wants the results of steps from this worker."""


class WorkerLoop:
    """Runs what the engine asks for.

    Args:
        worker: a ``WorkerBase``.
        sends_results: send what a step has computed; else it is dropped here.
    """

    def __init__(
        self, worker: Any, inbox: RingReader, outbox: RingWriter, *, sends_results: bool
    ) -> None:
        self._worker = worker
        self._inbox = inbox
        self._outbox = outbox
        self._sends_results = sends_results
        self._launched: deque[PendingModelRunnerOutput] = deque()

    def run(self) -> None:
        """Until STOP; an exception means that the worker cannot go on."""
        while True:
            message = self._inbox.receive()
            assert message is not None, "nothing interrupts a worker"
            kind, payload = message
            if kind == Kind.EXECUTE:
                step = decode_step(payload)
                self._take(self._worker.execute_model(step))
            elif kind == Kind.SAMPLE:
                self._take(self._worker.sample_tokens(decode_grammar(payload)))
            elif kind == Kind.FLUSH:
                self._finish(keep=0)
            elif kind == Kind.CALL:
                self._finish(keep=0)
                self._outbox.send(Kind.ANSWER, self._call(payload))
            else:
                assert kind == Kind.STOP, kind
                return

    def _take(self, output: ModelRunnerOutput | PendingModelRunnerOutput | None) -> None:
        """``output`` is what a step came to; None where sampling is still to come."""
        if output is None:
            return
        if isinstance(output, PendingModelRunnerOutput):
            self._launched.append(output)
            self._finish(keep=1)
        else:
            self._finish(keep=0)
            self._send(output)

    def _finish(self, keep: int) -> None:
        """Send the results of all launched steps but the last ``keep``."""
        while len(self._launched) > keep:
            self._send(self._launched.popleft().result())

    def _send(self, output: ModelRunnerOutput) -> None:
        if self._sends_results:
            self._outbox.send(Kind.RESULT, encode_result(output))

    def _call(self, payload: bytes) -> bytes:
        method, args, kwargs = decode_call(payload)
        try:
            if isinstance(method, str):
                return encode_answer(getattr(self._worker, method)(*args, **kwargs))
            return encode_answer(method(self._worker, *args, **kwargs))
        except Exception as error:  # noqa: BLE001 - the engine raises it again
            if not is_expected(error):
                logger.error("%s failed:\n%s", method, traceback.format_exc().rstrip())
            return encode_answer(None, failure_of(error))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--config-fd", type=int, required=True)
    parser.add_argument("--status-fd", type=int, required=True)
    parser.add_argument("--directory", required=True)
    return parser.parse_args()


def _serve(config_fd: int) -> None:
    with os.fdopen(config_fd, "rb") as pipe:
        launch: WorkerLaunch = pickle.load(pipe)
    for fd in (*launch.inbox.fds, *launch.outbox.fds):
        os.set_inheritable(fd, False)
    if launch.rank > 0 and logger.isEnabledFor(20):
        # What the first worker says of the model is true of the others.
        set_level("WARNING")
    with without_collector():
        from vllm.plugins import load_general_plugins
        from vllm.v1.executor.uniproc_executor import resolve_worker_class

        load_general_plugins()
        worker_class = resolve_worker_class(launch.vllm_config)
    worker = worker_class(
        launch.vllm_config,
        local_rank=launch.local_rank,
        rank=launch.rank,
        distributed_init_method=launch.distributed_init_method,
        is_driver_worker=launch.rank == 0,
    )
    loop = WorkerLoop(
        worker,
        RingReader(launch.inbox, launch.local_rank, spin=launch.spin),
        RingWriter(launch.outbox),
        sends_results=launch.sends_results,
    )
    try:
        loop.run()
    finally:
        worker.shutdown()


def freeze_garbage(worker: Any) -> None:
    """What start-up made is not looked at again by every collection while serving."""
    gc.collect()
    gc.freeze()


def main() -> None:
    """Run a worker until the engine ends it."""
    arguments = _parse_arguments()
    adopt_child_manners(
        f"VLLM::Worker_TP{arguments.rank}", (arguments.config_fd, arguments.status_fd)
    )
    end_with_parent(arguments.parent, arguments.directory)
    code = 0
    try:
        _serve(arguments.config_fd)
    except BaseException as error:  # noqa: BLE001 - the engine reports it
        code = 1
        failure = failure_of(error)
        if not is_expected(error):
            # Another worker's end may be behind this one: the engine knows, and logs the cause.
            failure.traceback = traceback.format_exc().rstrip()[-_TRACEBACK_CHARACTERS:]
        with contextlib.suppress(OSError):
            write_status(arguments.status_fd, EngineStatus(failure=failure))
    sys.stdout.flush()
    sys.stderr.flush()
    # Collectives of other ranks may still hold threads; nothing of theirs is worth waiting for.
    os._exit(code)
