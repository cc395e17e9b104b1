"""What the engine core asks of a scheduler, for those given by ``scheduler_cls``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs, SchedulerStats
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request, RequestStatus

__all__ = ["GrammarManager", "SchedulerInterface"]


class GrammarManager(Protocol):
    """What the scheduler asks of structured output."""

    def grammar_init(self, request: Request) -> None:
        """Start compiling; sets ``request.structured_output_request``."""

    def grammar_bitmask(
        self, requests: Mapping[str, Request], structured_output_request_ids: Sequence[str]
    ) -> np.ndarray: ...

    def accept_tokens(self, request: Request, token_ids: Sequence[int]) -> bool: ...

    def is_terminated(self, request: Request) -> bool: ...


class SchedulerInterface(ABC):
    """Decides, step by step, which tokens of which requests are computed."""

    @abstractmethod
    def add_request(self, request: Request) -> None:
        """Take a request in.

        Raises:
            QueueFullError: too many requests wait.
            VLLMValidationError: the request could never be served.
        """

    @abstractmethod
    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> None:
        """End requests from outside, without an output; unknown ids are left out.

        ``None`` ends all.
        """

    @abstractmethod
    def schedule(self) -> SchedulerOutput:
        """The next step's work. May hold no tokens, but word of what has ended."""

    @abstractmethod
    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """Masks for the structured requests that sample in this step; None without any."""

    @abstractmethod
    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take in what a step has computed; returns the outputs by client."""

    @abstractmethod
    def has_unfinished_requests(self) -> bool: ...

    @abstractmethod
    def has_finished_requests(self) -> bool:
        """Something has ended that the workers have not been told of."""

    def has_requests(self) -> bool:
        """A step would do something."""
        return self.has_unfinished_requests() or self.has_finished_requests()

    @abstractmethod
    def get_request_counts(self) -> tuple[int, int]:
        """(running, waiting)."""

    @abstractmethod
    def make_stats(self) -> SchedulerStats | None: ...

    @abstractmethod
    def reset_prefix_cache(self) -> bool: ...

    def take_events(self) -> list[Any]:
        """KV events since the last call."""
        return []

    @abstractmethod
    def check_integrity(self) -> None:
        """Raises AssertionError where the bookkeeping contradicts itself."""

    @abstractmethod
    def shutdown(self) -> None: ...
