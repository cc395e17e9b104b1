"""Custom logits processors: loading, batch updates, and partial batches."""

import numpy as np
import pytest
import torch

from vllm.errors import ConfigError
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import (
    BatchUpdateBuilder,
    LogitsProcessor,
    LogitsProcessors,
    MoveDirectionality,
    NullBatchUpdateBuilder,
    load_logits_processors,
)


class AddRowNumber(LogitsProcessor):
    """Adds the row's number to token 0."""

    invariant = False

    def __init__(self, vllm_config=None, device=None, is_pin_memory=False) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(logits.shape))
        logits[:, 0] += torch.arange(logits.shape[0])
        return logits

    def is_argmax_invariant(self) -> bool:
        return self.invariant

    def update_state(self, batch_update) -> None:
        return


class Invariant(AddRowNumber):
    invariant = True


class _Config:
    def __init__(self, *paths: str) -> None:
        self.model_config = self
        self.logits_processors = paths


def test_classes_load_by_either_form_of_path():
    module = AddRowNumber.__module__
    loaded = load_logits_processors(_Config(f"{module}:AddRowNumber", f"{module}.Invariant"))
    assert loaded == [AddRowNumber, Invariant]


@pytest.mark.parametrize(
    "path", ["no.such.module:X", f"{__name__}:Missing", f"{__name__}:pytest", "plain", ""]
)
def test_what_cannot_be_loaded_is_named(path):
    with pytest.raises(ConfigError, match="--logits-processors") as caught:
        load_logits_processors(_Config(path))
    assert caught.value.parameter == "logits_processors"


def test_batch_updates_come_once_and_in_order():
    builder = BatchUpdateBuilder()
    assert builder.take(0) is None
    params = SamplingParams()
    builder.note_removed(1)
    builder.note_removed(4)
    builder.note_added(1, params, [1], [])
    builder.note_moved(5, 4)
    update = builder.take(5)
    assert update is not None
    assert update.batch_size == 5
    assert list(update.removed) == [4, 1]
    assert list(update.added) == [(1, params, [1], [])]
    assert list(update.moved) == [(5, 4, MoveDirectionality.UNIDIRECTIONAL)]
    assert builder.take(5) is None


def test_without_processors_nobody_takes_notes():
    processors = LogitsProcessors()
    assert not processors
    builder = processors.make_batch_update_builder()
    assert isinstance(builder, NullBatchUpdateBuilder)
    builder.note_removed(1)
    assert builder.take(3) is None


def test_processors_see_the_whole_batch_also_where_some_rows_sample():
    processor = AddRowNumber()
    first, second = LogitsProcessors([processor]).edits_for(5, np.array([1, 4]))
    assert first is not None
    logits = first(torch.zeros(2, 3))
    assert processor.shapes == [(5, 3)]
    assert logits.tolist() == [[1.0, 0.0, 0.0], [4.0, 0.0, 0.0]]
    assert second(logits) is logits or torch.equal(second(logits), logits)


def test_invariant_processors_run_after_temperature_only():
    processors = LogitsProcessors([Invariant()])
    first, second = processors.edits_for(2, np.array([0, 1]))
    assert first is None
    assert second(torch.zeros(2, 2)).tolist() == [[0.0, 0.0], [1.0, 0.0]]
