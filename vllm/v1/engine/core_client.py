"""Front ends' ways to an engine core: in place, in a process and waiting, in a process and async.

Every client sends requests, gets ``EngineCoreOutputs`` back and calls utilities. None of them
knows text or ``RequestOutput``.
"""

from abc import ABC, abstractmethod
from collections import deque
from typing import Any

from vllm.config import VllmConfig
from vllm.errors import EngineGenerateError
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineFacts
from vllm.v1.engine.phases import StartupPhases

__all__ = ["EngineCoreClient", "InprocClient"]


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
        """End the engine; may be called twice."""


class InprocClient(EngineCoreClient):
    """An engine core in this process: ``get_output`` runs the steps."""

    def __init__(self, vllm_config: VllmConfig, *, log_stats: bool, phases: StartupPhases) -> None:
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.executor.abstract import Executor

        self._core = EngineCore(
            vllm_config, Executor.get_class(vllm_config), log_stats=log_stats, phases=phases
        )
        self.facts = self._core.facts
        self._pending: deque[EngineCoreOutputs] = deque()
        self._closed = False

    def add_request(self, request: EngineCoreRequest) -> None:
        self._core.add_request(self._core.preprocess(request))

    def abort_requests(self, request_ids: list[str]) -> None:
        if request_ids:
            self._core.abort_requests(request_ids)

    def get_output(self) -> EngineCoreOutputs:
        if not self._core.has_work():
            self._core.on_idle()
            return EngineCoreOutputs()
        outputs, _ = self._core.step()
        return outputs.get(0) or EngineCoreOutputs()

    def call_utility(self, method: str, *args: Any) -> Any:
        answer = self._core.call_utility(0, method, list(args))
        if answer.failure_message is not None:
            raise EngineGenerateError(answer.failure_message)
        return answer.result

    def shutdown(self, timeout: float = 5.0) -> None:
        if not self._closed:
            self._closed = True
            self._core.shutdown()
