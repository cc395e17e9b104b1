"""How steps follow each other: one after the other, or each launched while the last one runs.

Owns the step in flight. Knows nothing of clients, messages or pauses.
"""

from __future__ import annotations

from typing import NamedTuple

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.executor.abstract import Executor
from vllm.v1.outputs import ModelRunnerOutput, PendingModelRunnerOutput

__all__ = ["OverlappedStepping", "Stepping", "make_stepping"]

Outputs = dict[int, EngineCoreOutputs]


class Stepping:
    """Each step ends before the next begins."""

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self._scheduler = scheduler
        self._executor = executor

    @property
    def in_flight(self) -> bool:
        """A step has been launched whose outputs have not been taken in."""
        return False

    def step(self) -> tuple[Outputs, bool]:
        """Schedule and run a step.

        Returns:
            Outputs by client, and whether the next step may find more to do than this one: the
            model ran, or a transfer of KV that a request waited for has ended.
        """
        scheduler_output = self._scheduler.schedule()
        output = self._run(scheduler_output)
        assert isinstance(output, ModelRunnerOutput)
        outputs = self._scheduler.update_from_output(scheduler_output, output)
        return outputs, scheduler_output.total_num_scheduled_tokens > 0 or output.ended_transfers

    def drain(self) -> Outputs:
        """Outputs of the step in flight, once it has ended."""
        return {}

    def _run(
        self, scheduler_output: SchedulerOutput
    ) -> ModelRunnerOutput | PendingModelRunnerOutput:
        output = self._executor.execute_model(scheduler_output)
        if output is None:
            grammar_output = self._scheduler.get_grammar_bitmask(scheduler_output)
            output = self._executor.sample_tokens(grammar_output)
        return output


class _InFlight(NamedTuple):
    scheduler_output: SchedulerOutput
    output: PendingModelRunnerOutput


class OverlappedStepping(Stepping):
    """A step is scheduled and launched before the outputs of the one before are looked at.

    The scheduler counts a token that is on its way as if it were there. Where some request needs
    its tokens before it can go on (a grammar, penalties), the step in flight is waited for first.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        super().__init__(scheduler, executor)
        self._last: _InFlight | None = None

    @property
    def in_flight(self) -> bool:
        return self._last is not None

    def step(self) -> tuple[Outputs, bool]:
        scheduler = self._scheduler
        outputs = self.drain() if scheduler.needs_known_tokens else {}
        scheduler_output = scheduler.schedule()
        output = self._run(scheduler_output)
        _join(outputs, self.drain())
        if isinstance(output, PendingModelRunnerOutput):
            self._last = _InFlight(scheduler_output, output)
            return outputs, True
        _join(outputs, scheduler.update_from_output(scheduler_output, output))
        return outputs, scheduler_output.total_num_scheduled_tokens > 0 or output.ended_transfers

    def drain(self) -> Outputs:
        last, self._last = self._last, None
        if last is None:
            return {}
        return self._scheduler.update_from_output(last.scheduler_output, last.output.result())


def _join(outputs: Outputs, later: Outputs) -> None:
    """Add ``later`` to ``outputs``, whose messages are those of the step before."""
    for client, new in later.items():
        old = outputs.get(client)
        if old is None:
            outputs[client] = new
            continue
        new.outputs[:0] = old.outputs
        if old.finished_requests is not None:
            new.finished_requests = old.finished_requests | (new.finished_requests or set())
        if old.scheduler_stats is not None:
            if new.scheduler_stats is None:
                new.scheduler_stats = old.scheduler_stats
            else:
                new.scheduler_stats.add_increments(old.scheduler_stats)
        outputs[client] = new


def make_stepping(scheduler: Scheduler, executor: Executor, *, overlapped: bool) -> Stepping:
    return (OverlappedStepping if overlapped else Stepping)(scheduler, executor)
