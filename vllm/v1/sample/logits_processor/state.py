"""Custom logits processors of one engine: loading them, and telling them of batch changes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm.errors import ConfigError
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.interface import (
    AddedRequest,
    BatchUpdate,
    LogitsProcessor,
    MoveDirectionality,
    MovedRequest,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = [
    "ENTRY_POINT_GROUP",
    "BatchUpdateBuilder",
    "LogitsProcessors",
    "NullBatchUpdateBuilder",
    "load_logits_processors",
]

LogitsEdit = Callable[[torch.Tensor], torch.Tensor]
ENTRY_POINT_GROUP = "vllm.logits_processors"


class BatchUpdateBuilder:
    """Gathers what happens to the rows between two steps."""

    def __init__(self) -> None:
        self._removed: list[int] = []
        self._added: list[AddedRequest] = []
        self._moved: list[MovedRequest] = []

    def note_added(
        self, row: int, params: SamplingParams, prompt: list[int], output: list[int]
    ) -> None:
        self._added.append((row, params, prompt, output))

    def note_removed(self, row: int) -> None:
        self._removed.append(row)

    def note_moved(self, source: int, target: int) -> None:
        self._moved.append((source, target, MoveDirectionality.UNIDIRECTIONAL))

    def take(self, batch_size: int) -> BatchUpdate | None:
        """The changes since the last call; None where there were none."""
        if not (self._removed or self._added or self._moved):
            return None
        update = BatchUpdate(
            batch_size=batch_size,
            removed=sorted(self._removed, reverse=True),
            added=self._added,
            moved=self._moved,
        )
        self._removed, self._added, self._moved = [], [], []
        return update


class NullBatchUpdateBuilder(BatchUpdateBuilder):
    """Takes no notes: nobody asks."""

    def note_added(
        self, row: int, params: SamplingParams, prompt: list[int], output: list[int]
    ) -> None:
        return

    def note_removed(self, row: int) -> None:
        return

    def note_moved(self, source: int, target: int) -> None:
        return


class LogitsProcessors:
    """The processors that were loaded, in order; empty by default."""

    def __init__(self, processors: Iterable[LogitsProcessor] = ()) -> None:
        self.all = tuple(processors)
        self.argmax_invariant = tuple(p for p in self.all if p.is_argmax_invariant())
        self.non_argmax_invariant = tuple(p for p in self.all if not p.is_argmax_invariant())

    def __bool__(self) -> bool:
        return bool(self.all)

    def make_batch_update_builder(self) -> BatchUpdateBuilder:
        return BatchUpdateBuilder() if self.all else NullBatchUpdateBuilder()

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        for processor in self.all:
            processor.update_state(batch_update)

    def edits_for(self, batch_size: int, rows: np.ndarray) -> tuple[LogitsEdit | None, LogitsEdit]:
        """The two edits that the sampler makes to the logits of ``rows`` of the batch.

        The first may change a row's best token and is None where nothing does; the second never
        does. Processors always see the whole batch, also where only some rows sample.
        """

        def edit(processors: tuple[LogitsProcessor, ...], logits: torch.Tensor) -> torch.Tensor:
            if rows.size != batch_size:
                index = torch.from_numpy(rows).to(logits.device)
                whole = logits.new_zeros((batch_size, logits.shape[-1]))
                whole[index] = logits
                for processor in processors:
                    whole = processor.apply(whole)
                return whole[index]
            for processor in processors:
                logits = processor.apply(logits)
            return logits

        first = partial(edit, self.non_argmax_invariant) if self.non_argmax_invariant else None
        return first, partial(edit, self.argmax_invariant)


def _load_class(path: str) -> type[LogitsProcessor]:
    module_name, _, name = path.partition(":")
    if not name:
        module_name, _, name = path.rpartition(".")
    try:
        value = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"--logits-processors: cannot load {path!r} ({error}); write module.path:ClassName",
            parameter="logits_processors",
            value=path,
        ) from error
    if not (isinstance(value, type) and issubclass(value, LogitsProcessor)):
        raise ConfigError(
            f"--logits-processors: {path!r} is not a subclass of "
            "vllm.v1.sample.logits_processor.LogitsProcessor",
            parameter="logits_processors",
            value=path,
        )
    return value


def load_logits_processors(vllm_config: VllmConfig) -> list[type[LogitsProcessor]]:
    """Classes from the entry points ``vllm.logits_processors``, then those of the config.

    Raises:
        ConfigError: a name cannot be imported, or is no ``LogitsProcessor``.
    """
    paths = [point.value for point in entry_points(group=ENTRY_POINT_GROUP)]
    paths += vllm_config.model_config.logits_processors
    return [_load_class(path) for path in paths]
