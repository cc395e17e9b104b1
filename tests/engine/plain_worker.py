"""A worker without a model: answers steps at once, and fails or dies when told to."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from vllm.errors import ConfigError
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput, PendingModelRunnerOutput
from vllm.v1.worker.worker_base import WorkerBase


class _Pending(PendingModelRunnerOutput):
    def __init__(self, finish: Callable[[], ModelRunnerOutput]) -> None:
        self.result = finish  # type: ignore[method-assign]

    def result(self) -> ModelRunnerOutput:
        raise AssertionError("set by the constructor")


class PlainWorker(WorkerBase):
    """Its token for a request is the number of tokens that were scheduled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.events: list[str] = []
        self._open: SchedulerOutput | None = None
        self._fault: str | None = None

    def init_device(self) -> None: ...

    def load_model(self) -> None: ...

    def get_kv_cache_spec(self) -> dict[str, Any]:
        return {f"layer.{self.rank}": None}

    def get_kv_cache_constraints(self) -> dict[str, Any]:
        return {}

    def determine_available_memory(self) -> int:
        return 1000 + self.rank

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        self.events.append(f"config {kv_cache_config}")

    def compile_or_warm_up_model(self) -> None: ...

    def get_model(self) -> Any: ...

    def get_events(self) -> list[str]:
        return self.events

    def echo(self, value: Any, *, twice: bool = False) -> Any:
        return [value, value] if twice else value

    def nap(self, rank: int, until: str) -> str:
        """Sleep until there is a file of this name."""
        while rank == self.rank and not os.path.exists(until):
            time.sleep(0.01)
        return f"awake {self.rank}"

    def pid(self) -> int:
        return os.getpid()

    def fail_on(self, rank: int, how: str) -> None:
        """From now on this rank's steps fail: "raise" or "die"."""
        if rank == self.rank:
            self._fault = how

    def refuse(self, rank: int) -> int:
        if rank == self.rank:
            raise ConfigError("--option cannot be 3; use 4", parameter="option", value=3)
        return self.rank

    def break_down(self) -> None:
        raise ZeroDivisionError("a bug")

    def refuse_and_hang(self) -> None:
        if self.rank == 1:
            raise ConfigError("rank 1 cannot", parameter="option")
        signal.pause()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        if self._fault == "raise":
            raise ZeroDivisionError("a step went wrong")
        if self._fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        self.events.append(f"run {len(scheduler_output.num_scheduled_tokens)}")
        if scheduler_output.has_structured_output_requests:
            self._open = scheduler_output
            return None
        return self._output(scheduler_output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        assert self._open is not None
        assert grammar_output is not None
        assert grammar_output.grammar_bitmask.dtype == np.int32
        self.events.append(f"mask {grammar_output.grammar_bitmask.tolist()}")
        return self._output(self._open)

    def _output(self, scheduled: SchedulerOutput) -> Any:
        def finish() -> ModelRunnerOutput:
            req_ids = list(scheduled.num_scheduled_tokens)
            self.events.append(f"result {len(req_ids)}")
            numbers = np.arange(3, dtype=np.float32).reshape(1, 3)
            row = LogprobsLists(numbers.astype(np.int32), numbers, np.array([1], np.int32))
            return ModelRunnerOutput(
                req_ids,
                {req_id: i for i, req_id in enumerate(req_ids)},
                [[count] for count in scheduled.num_scheduled_tokens.values()],
                logprobs={req_ids[0]: row},
                request_errors={"x": f"from {self.rank}"},
            )

        return _Pending(finish) if self.scheduler_config.async_scheduling else finish()
