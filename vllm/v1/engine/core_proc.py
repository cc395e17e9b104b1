"""The engine core's own process, started by ``launch``.

The step loop runs in the main thread. One thread receives and decodes, one encodes and sends, one
watches the parent, so a slow socket never holds a step up. Configuration comes by an inherited
pipe, once; what arrives by socket is msgpack and typed. Nothing here reads a pickle from a socket.
"""

import argparse
import contextlib
import gc
import os
import pickle
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import zmq

from vllm.errors import VLLMValidationError
from vllm.logger import init_logger
from vllm.utils.import_utils import without_collector
from vllm.utils.processes import adopt_child_manners, end_with_parent
from vllm.v1.engine import (
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    UtilityOutput,
)
from vllm.v1.engine.failures import failure_of, is_expected
from vllm.v1.engine.serial import (
    UNENCODABLE,
    EngineStatus,
    LaunchConfig,
    decode_call,
    decode_ids,
    decode_request,
    encode,
    write_status,
)

__all__ = ["EngineLoop", "main"]

logger = init_logger("vllm.v1.engine.core_proc")

# A step that computed nothing (all requests wait for a grammar or a transfer) is tried again
# after this many seconds, or as soon as a message arrives or a transfer ends.
_RETRY_SECONDS = 0.001

Message = tuple[EngineCoreRequestType, Any]


class _Undecodable(NamedTuple):
    """A request that failed its checks on arrival."""

    client_index: int
    request_id: str
    error: VLLMValidationError

    @classmethod
    def of(cls, frame: bytes, error: Exception) -> "_Undecodable":
        fields = msgspec.msgpack.decode(frame)
        by_name = dict(zip(EngineCoreRequest.__struct_fields__, fields, strict=False))
        client_index = by_name.get("client_index", 0)
        return cls(client_index, by_name["request_id"], VLLMValidationError(str(error)))


def _sendable(answer: UtilityOutput, method: str) -> UtilityOutput:
    """``answer``, or why its result cannot be sent: methods of workers return anything."""
    try:
        encode(answer)
    except UNENCODABLE as error:
        return UtilityOutput(
            answer.call_id, f"{method}: the result is no plain data and cannot be sent: {error}"
        )
    return answer


class EngineLoop:
    """Takes messages from ``inputs``, runs steps while there is work, and waits otherwise.

    ``inputs`` holds ``(type, payload)`` with payloads as ``EngineCore`` takes them, an exception of
    the receiving thread, or None, which only ends a wait. ``emit(client_index, outputs)`` must not
    block.
    """

    def __init__(
        self,
        core: Any,
        inputs: "queue.SimpleQueue[Message | BaseException | None]",
        emit: Callable[[int, EngineCoreOutputs], None],
    ) -> None:
        self._core = core
        self._inputs = inputs
        self._emit = emit
        self._stopping = False

    def run(self) -> None:
        """Until a SHUTDOWN message; an exception means that the engine cannot go on."""
        core = self._core
        made_progress = True
        while True:
            self._take_messages(made_progress)
            if self._stopping:
                return
            if not core.has_work():
                continue
            outputs, made_progress = core.step()
            for client_index, client_outputs in outputs.items():
                self._emit(client_index, client_outputs)

    def _take_messages(self, made_progress: bool) -> None:
        if not self._core.has_work():
            if self._inputs.empty():
                self._core.on_idle()
            self._handle(self._inputs.get())
        elif not made_progress:
            with contextlib.suppress(queue.Empty):
                self._handle(self._inputs.get(timeout=_RETRY_SECONDS))
        while not self._stopping:
            try:
                self._handle(self._inputs.get_nowait())
            except queue.Empty:
                return

    def _handle(self, message: Message | BaseException | None) -> None:
        if message is None:
            return
        if isinstance(message, BaseException):
            raise message
        kind, payload = message
        if isinstance(payload, _Undecodable):
            self._core.reject(payload.client_index, payload.request_id, payload.error)
        elif kind is EngineCoreRequestType.ADD:
            self._core.add_request(payload)
        elif kind is EngineCoreRequestType.ABORT:
            self._core.abort_requests(payload)
        elif kind is EngineCoreRequestType.UTILITY:
            answer = self._core.call_utility(payload.call_id, payload.method, payload.args)
            answer = _sendable(answer, payload.method)
            self._emit(payload.client_index, EngineCoreOutputs(utility_output=answer))
        elif kind is EngineCoreRequestType.SHUTDOWN:
            self._stopping = True


class _Sender:
    """The sending thread: one PUSH socket per front end.

    Args:
        on_failure: told why the thread has ended, which is the end of the engine: nobody would
            get an answer any more.
    """

    def __init__(
        self,
        context: zmq.Context,
        addresses: list[str],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._context = context
        self._addresses = addresses
        self._on_failure = on_failure
        self._queue: queue.SimpleQueue[tuple[int, EngineCoreOutputs] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine-send", daemon=True)
        self._thread.start()

    def put(self, client_index: int, outputs: EngineCoreOutputs) -> None:
        self._queue.put((client_index, outputs))

    def close(self) -> None:
        """Send what is queued, then end."""
        self._queue.put(None)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            self._send_all()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
            self._on_failure(error)

    def _send_all(self) -> None:
        sockets = []
        for address in self._addresses:
            socket = self._context.socket(zmq.PUSH)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.setsockopt(zmq.LINGER, 4000)
            socket.connect(address)
            sockets.append(socket)
        while (item := self._queue.get()) is not None:
            client_index, outputs = item
            sockets[client_index].send(encode(outputs), copy=False)
        for socket in sockets:
            socket.close()


class _Receiver:
    """The receiving thread: decodes, and hashes the blocks of new prompts."""

    def __init__(
        self,
        context: zmq.Context,
        address: str,
        inputs: "queue.SimpleQueue[Message | BaseException | None]",
    ) -> None:
        self._socket = context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address)
        self._inputs = inputs
        self.hellos = threading.Semaphore(0)
        """Released by each front end's HELLO: its way in works."""
        self._preprocess: Callable[[Any], Any] | None = None
        self._thread = threading.Thread(target=self._run, name="engine-receive", daemon=True)
        self._thread.start()

    def accept_requests(self, preprocess: Callable[[Any], Any]) -> None:
        self._preprocess = preprocess

    def _run(self) -> None:
        try:
            while self._receive():
                pass
        except BaseException as error:  # noqa: BLE001 - handed to the main thread, which raises it
            self._inputs.put(error)
        self._socket.close(linger=0)

    def _receive(self) -> bool:
        frames = self._socket.recv_multipart()
        kind = EngineCoreRequestType(frames[0])
        if kind is EngineCoreRequestType.HELLO:
            self.hellos.release()
            return True
        payload: Any = None
        if kind is EngineCoreRequestType.ADD:
            assert self._preprocess is not None, "a request came before the engine was ready"
            try:
                payload = self._preprocess(decode_request(frames[1]))
            except msgspec.ValidationError as error:
                # The front end has checked it; yet one bad request must not end the others.
                payload = _Undecodable.of(frames[1], error)
        elif kind is EngineCoreRequestType.ABORT:
            payload = decode_ids(frames[1])
        elif kind is EngineCoreRequestType.UTILITY:
            payload = decode_call(frames[1])
        self._inputs.put((kind, payload))
        return kind is not EngineCoreRequestType.SHUTDOWN


class _Arguments(NamedTuple):
    parent: int
    config_fd: int
    status_fd: int
    socket_dir: str


def _parse_arguments() -> _Arguments:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--config-fd", type=int, required=True)
    parser.add_argument("--status-fd", type=int, required=True)
    parser.add_argument("--socket-dir", required=True)
    return _Arguments(**vars(parser.parse_args()))


def _import_early() -> float:
    """What every engine needs, while the parent still resolves the configuration."""
    begin = time.monotonic()
    import torch  # noqa: F401

    from vllm.v1.core.sched import scheduler  # noqa: F401
    from vllm.v1.executor import uniproc_executor  # noqa: F401
    from vllm.v1.structured_output import StructuredOutputManager  # noqa: F401

    return time.monotonic() - begin


def _read_config(fd: int) -> LaunchConfig:
    with os.fdopen(fd, "rb") as pipe:
        return pickle.load(pipe)


def _serve(arguments: _Arguments) -> None:
    from vllm.v1.engine.phases import StartupPhases

    phases = StartupPhases(logger)
    context = zmq.Context()
    inputs: queue.SimpleQueue[Message | BaseException | None] = queue.SimpleQueue()
    receiver = _Receiver(context, f"ipc://{arguments.socket_dir}/in", inputs)
    with phases.phase("importing torch"), without_collector():
        _import_early()
    config = _read_config(arguments.config_fd)

    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.abstract import Executor

    core = EngineCore(
        config.vllm_config,
        Executor.get_class(config.vllm_config),
        log_stats=config.log_stats,
        phases=phases,
    )
    # What start-up made is not looked at again by every collection while serving.
    gc.collect()
    gc.freeze()
    receiver.accept_requests(core.preprocess)
    core.executor.register_failure_callback(inputs.put)
    core.executor.register_transfer_callback(lambda: inputs.put(None))
    sender = _Sender(context, config.output_addresses, inputs.put)
    # An empty message on the way out, so that the front end knows that it works.
    for client_index in range(len(config.output_addresses)):
        sender.put(client_index, EngineCoreOutputs())
    for _ in config.output_addresses:
        receiver.hellos.acquire()
    write_status(arguments.status_fd, EngineStatus(facts=core.facts))
    try:
        EngineLoop(core, inputs, sender.put).run()
    finally:
        sender.close()
    core.shutdown()


def main() -> None:
    """Run an engine until the front end ends it."""
    arguments = _parse_arguments()
    adopt_child_manners("VLLM::EngineCore", (arguments.config_fd, arguments.status_fd))
    end_with_parent(arguments.parent, arguments.socket_dir)
    code = 0
    try:
        _serve(arguments)
    except BaseException as error:  # noqa: BLE001 - the front end raises it again
        code = 1
        if not is_expected(error):
            logger.error("The engine process ends:\n%s", traceback.format_exc().rstrip())
        with contextlib.suppress(OSError):
            write_status(arguments.status_fd, EngineStatus(failure=failure_of(error)))
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads may still wait in sockets; nothing of theirs is worth waiting for.
    os._exit(code)
