"""Front ends' ways to an engine core: in place, in a process and waiting, in a process and async.

Every client sends requests, gets ``EngineCoreOutputs`` back and calls utilities. None of them
knows text or ``RequestOutput``, and only the in-place one imports torch.
"""

import asyncio
import itertools
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from vllm.config import VllmConfig
from vllm.errors import EngineDeadError, EngineGenerateError, VLLMValidationError
from vllm.v1.engine import (
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    EngineFacts,
    UtilityOutput,
)
from vllm.v1.engine.attached import AttachedEngine
from vllm.v1.engine.launch import EngineProcess
from vllm.v1.engine.phases import StartupPhases
from vllm.v1.engine.serial import UNENCODABLE, UtilityCall, decode_outputs, encode

__all__ = [
    "AsyncMPClient",
    "EngineCoreClient",
    "InprocClient",
    "SyncMPClient",
    "rpc_arguments",
]

_HELLO_TIMEOUT_MS = 10_000
_MESSAGES_PER_TURN = 4
_RETRY_SECONDS = 0.001
# Eleven days; poll() takes no more than 24.
_MAX_RPC_SECONDS = 1_000_000


class EngineCoreClient(ABC):
    """What ``LLMEngine`` needs."""

    facts: EngineFacts

    @abstractmethod
    def add_request(self, request: EngineCoreRequest) -> None:
        """Hand a request to the engine."""

    @abstractmethod
    def abort_requests(self, request_ids: list[str]) -> None:
        """Have the engine drop requests; unknown ids do no harm."""

    @abstractmethod
    def get_output(self) -> EngineCoreOutputs:
        """Outputs of the next step that has any, once there is one.

        Raises:
            EngineDeadError: the engine has ended.
        """

    @abstractmethod
    def call_utility(self, method: str, *args: Any) -> Any:
        """Call a utility of the engine core and wait for its answer.

        Raises:
            EngineGenerateError: the call failed.
            EngineDeadError: the engine has ended.
        """

    @abstractmethod
    def shutdown(self, timeout: float = 5.0) -> None:
        """End the engine within ``timeout`` seconds; may be called twice."""


class InprocClient(EngineCoreClient):
    """An engine core in this process: ``get_output`` runs the steps."""

    def __init__(self, vllm_config: VllmConfig, *, log_stats: bool, phases: StartupPhases) -> None:
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.executor.abstract import Executor

        self._core = EngineCore(
            vllm_config, Executor.get_class(vllm_config), log_stats=log_stats, phases=phases
        )
        self.facts = self._core.facts
        self._closed = False

    def add_request(self, request: EngineCoreRequest) -> None:
        self._core.add_request(self._core.preprocess(request))

    def abort_requests(self, request_ids: list[str]) -> None:
        if request_ids:
            self._core.abort_requests(request_ids)

    def get_output(self) -> EngineCoreOutputs:
        outputs: EngineCoreOutputs | None = None
        if self._core.has_work():
            by_client, made_progress = self._core.step()
            outputs = by_client.get(0)
            if not made_progress:
                time.sleep(_RETRY_SECONDS)
        if not self._core.has_work():
            self._core.on_idle()
        return outputs or EngineCoreOutputs()

    def call_utility(self, method: str, *args: Any) -> Any:
        return _result_of(self._core.call_utility(0, method, list(args)))

    def shutdown(self, timeout: float = 5.0) -> None:
        if not self._closed:
            self._closed = True
            self._core.shutdown()


def rpc_arguments(
    method: Any,
    timeout: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None,
    *,
    takes_functions: bool,
) -> tuple[Any, float | None, list[Any], dict[str, Any]]:
    """What a caller says of a ``collective_rpc``, checked, in the form of the utility call.

    Raises:
        VLLMValidationError: naming what is wrong.
    """
    if not isinstance(method, str) and not (takes_functions and callable(method)):
        raise VLLMValidationError(
            "collective_rpc: method must be the name of a worker's method: functions are not sent "
            "to the engine's process (give it a method by --worker-cls, or set "
            "VLLM_ENABLE_V1_MULTIPROCESSING=0)",
            parameter="method",
        )
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if timeout is not None and not (is_number and 0 < timeout <= _MAX_RPC_SECONDS):
        raise VLLMValidationError(
            f"collective_rpc: timeout must be a number of seconds above 0 (and at most "
            f"{_MAX_RPC_SECONDS}), not {timeout!r}",
            parameter="timeout",
        )
    call = method, timeout, list(args), dict(kwargs or {})
    if not takes_functions:
        try:
            encode(call)
        except UNENCODABLE as error:
            raise VLLMValidationError(
                f"collective_rpc: method, args and kwargs must be plain data: {error}",
                parameter="args",
            ) from None
    return call


def _result_of(answer: UtilityOutput) -> Any:
    if answer.failure_message is not None:
        raise EngineGenerateError(answer.failure_message)
    return answer.result


class _Connection:
    """The two sockets to an engine process, and its end."""

    def __init__(self, process: EngineProcess | AttachedEngine, client_index: int = 0) -> None:
        self.process = process
        self._owner = os.getpid()
        self.error: EngineDeadError | None = None
        self._closed = False
        self._context = zmq.Context()
        self.output = self._context.socket(zmq.PULL)
        self.output.setsockopt(zmq.RCVHWM, 0)
        self.output.bind(process.output_address(client_index))
        self.output_fd = int(self.output.getsockopt(zmq.FD))
        self._input = self._context.socket(zmq.PUSH)
        self._input.setsockopt(zmq.SNDHWM, 0)
        self._input.setsockopt(zmq.LINGER, 0)
        self._input.connect(process.input_address)
        self._send(EngineCoreRequestType.HELLO)

    def wait_ready(self) -> EngineFacts:
        facts = self.process.wait_ready()
        if not self.output.poll(_HELLO_TIMEOUT_MS):
            raise EngineDeadError("the engine is ready but its socket stays silent")
        self.output.recv()
        self.process.forget_sockets()
        return facts

    def _send(self, kind: EngineCoreRequestType, payload: Any = None) -> None:
        # With no high-water mark the socket queues and never blocks.
        frames = [kind.value] if payload is None else [kind.value, encode(payload)]
        self._input.send_multipart(frames)

    def send(self, kind: EngineCoreRequestType, payload: Any) -> None:
        self._check_owner()
        if self.error is not None:
            raise self.error
        self._send(kind, payload)

    def _check_owner(self) -> None:
        """A fork has copies of the sockets, which answer its parent alone."""
        if os.getpid() != self._owner:
            raise EngineDeadError(
                f"this engine belongs to process {self._owner}, of which process {os.getpid()} is "
                "a fork: start an engine in the process that uses it"
            )

    def receive(self) -> EngineCoreOutputs | None:
        """A message that has arrived, or None."""
        try:
            return decode_outputs(self.output.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def is_dead(self) -> bool:
        if self.error is None and not self._closed:
            self._note_death(timeout=0)
        return self.error is not None

    def _note_death(self, timeout: float | None) -> None:
        if self.process.has_status(timeout):
            self.die()

    def die(self) -> EngineDeadError:
        """The process's end has been seen."""
        if self.error is None:
            self.error = self.process.death_error()
        return self.error

    def close(self, timeout: float) -> None:
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        if self.error is None:
            if self.process.ends_with_client:
                self._send(EngineCoreRequestType.SHUTDOWN)
            self.error = EngineDeadError("the engine has been shut down")
        else:
            timeout = 0
        self.process.shutdown(timeout)
        self._input.close()
        self.output.close(linger=0)
        self._context.term()


class SyncMPClient(EngineCoreClient):
    """An engine process and a caller that waits for it. For one thread at a time."""

    def __init__(self, process: EngineProcess) -> None:
        self._connection = _Connection(process)
        self._poller = zmq.Poller()
        self._poller.register(self._connection.output, zmq.POLLIN)
        self._poller.register(process.status_fd, zmq.POLLIN)
        self._buffered: deque[EngineCoreOutputs] = deque()
        self._call_ids = itertools.count()

    @property
    def pid(self) -> int:
        return self._connection.process.pid

    def wait_ready(self) -> None:
        """Wait until the engine can take requests; raises why it cannot."""
        self.facts = self._connection.wait_ready()

    def add_request(self, request: EngineCoreRequest) -> None:
        self._connection.send(EngineCoreRequestType.ADD, request)

    def abort_requests(self, request_ids: list[str]) -> None:
        if request_ids and not self._connection.is_dead():
            self._connection.send(EngineCoreRequestType.ABORT, request_ids)

    def get_output(self) -> EngineCoreOutputs:
        return self._buffered.popleft() if self._buffered else self._receive()

    def _receive(self) -> EngineCoreOutputs:
        while self._connection.error is None:
            self._poller.poll()
            outputs = self._connection.receive()
            if outputs is not None:
                return outputs
            self._connection.is_dead()
        raise self._connection.error

    def call_utility(self, method: str, *args: Any) -> Any:
        call_id = next(self._call_ids)
        call = UtilityCall(0, call_id, method, list(args))
        self._connection.send(EngineCoreRequestType.UTILITY, call)
        while True:
            outputs = self._receive()
            answer = outputs.utility_output
            if answer is None:
                self._buffered.append(outputs)
            elif answer.call_id == call_id:
                return _result_of(answer)

    def shutdown(self, timeout: float = 5.0) -> None:
        self._connection.close(timeout)


class AsyncMPClient:
    """An engine process and an event loop.

    Outputs go to ``on_outputs`` and the engine's end to ``on_death``, both called in the loop.
    The socket's file descriptor is read straight from the loop: one callback a step, no task.

    Args:
        client_index: which of the engine's front ends this is.
    """

    def __init__(self, process: EngineProcess | AttachedEngine, client_index: int = 0) -> None:
        self.client_index = client_index
        self._connection = _Connection(process, client_index)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count()
        self._on_outputs: Callable[[EngineCoreOutputs], None] | None = None
        self._on_death: Callable[[EngineDeadError], None] | None = None

    facts: EngineFacts

    @property
    def pid(self) -> int:
        return self._connection.process.pid

    def wait_ready(self) -> None:
        """Wait until the engine can take requests; raises why it cannot."""
        self.facts = self._connection.wait_ready()

    def set_callbacks(
        self,
        on_outputs: Callable[[EngineCoreOutputs], None],
        on_death: Callable[[EngineDeadError], None],
    ) -> None:
        self._on_outputs = on_outputs
        self._on_death = on_death

    def attach(self) -> None:
        """Read in the running event loop from now on; cheap when it does already."""
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return
        self._detach()
        self._loop = loop
        if self._connection.error is None:
            loop.add_reader(self._connection.output_fd, self._drain)
            loop.add_reader(self._connection.process.status_fd, self._died)
            # The descriptor signals changes only: look at what is there already.
            loop.call_soon(self._drain)

    def _detach(self) -> None:
        loop, self._loop = self._loop, None
        if loop is None or loop.is_closed():
            return
        loop.remove_reader(self._connection.output_fd)
        loop.remove_reader(self._connection.process.status_fd)

    def _drain(self) -> None:
        """Take in what has arrived: some of it, so that readers of the streams get a turn."""
        for _ in range(_MESSAGES_PER_TURN):
            if not self._take_one():
                return
        if self._loop is not None:
            self._loop.call_soon(self._drain)

    def _take_one(self) -> bool:
        """Take in a message; False where there is none."""
        assert self._on_outputs is not None
        outputs = self._connection.receive() if self._loop is not None else None
        if outputs is None:
            return False
        answer = outputs.utility_output
        if answer is None:
            self._on_outputs(outputs)
            return True
        future = self._calls.pop(answer.call_id, None)
        if future is None or future.done():
            return True
        if answer.failure_message is not None:
            future.set_exception(EngineGenerateError(answer.failure_message))
        else:
            future.set_result(answer.result)
        return True

    def _died(self) -> None:
        assert self._on_death is not None
        # What the engine sent before it ended is still good.
        while self._take_one():
            pass
        error = self._connection.die()
        self._detach()
        self._fail_calls(error)
        self._on_death(error)

    def _fail_calls(self, error: EngineDeadError) -> None:
        calls, self._calls = self._calls, {}
        for future in calls.values():
            if not future.done():
                future.set_exception(error)

    @property
    def dead_error(self) -> EngineDeadError | None:
        """Why the engine is gone, or None while it lives."""
        self._connection.is_dead()
        return self._connection.error

    def add_request(self, request: EngineCoreRequest) -> None:
        self._connection.send(EngineCoreRequestType.ADD, request)

    def abort_requests(self, request_ids: list[str]) -> None:
        if request_ids and not self._connection.is_dead():
            self._connection.send(EngineCoreRequestType.ABORT, request_ids)

    async def call_utility(self, method: str, *args: Any) -> Any:
        """As ``EngineCoreClient.call_utility``."""
        self.attach()
        call_id = next(self._call_ids)
        call = UtilityCall(self.client_index, call_id, method, list(args))
        self._connection.send(EngineCoreRequestType.UTILITY, call)
        future = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            return await future
        finally:
            self._calls.pop(call_id, None)

    def shutdown(self, timeout: float = 5.0) -> None:
        """End the engine within ``timeout`` seconds; may be called twice, from any thread once
        the event loop no longer runs."""
        self._detach()
        self._connection.close(timeout)
        if self._connection.error is not None:
            self._fail_calls(self._connection.error)
