"""The interface of custom logits processors; vLLM's, so that its plug-ins work here."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = [
    "AddedRequest",
    "BatchUpdate",
    "LogitsProcessor",
    "MoveDirectionality",
    "MovedRequest",
    "RemovedRequest",
]


class MoveDirectionality(enum.Enum):
    """UNIDIRECTIONAL: the request at the first row now lies at the second. SWAP: both changed."""

    UNIDIRECTIONAL = enum.auto()
    SWAP = enum.auto()


RemovedRequest = int
"""The row that became empty."""
AddedRequest = tuple[int, SamplingParams, list[int] | None, list[int]]
"""Row, parameters, prompt token ids, output token ids (a list that grows as tokens come)."""
MovedRequest = tuple[int, int, MoveDirectionality]
"""From row, to row, how."""


@dataclass(frozen=True)
class BatchUpdate:
    """Changes of the persistent batch; take them in as removed, then added, then moved."""

    batch_size: int
    removed: Sequence[RemovedRequest]
    added: Sequence[AddedRequest]
    moved: Sequence[MovedRequest]


class LogitsProcessor(ABC):
    """Changes the logits of a batch before sampling."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError if a request's parameters (``extra_args``) cannot be used."""
        return

    @abstractmethod
    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool
    ) -> None: ...

    @abstractmethod
    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The changed logits, float32 ``(batch rows, V)``; may be changed in place."""

    @abstractmethod
    def is_argmax_invariant(self) -> bool:
        """True if the best token of a row never changes; greedy batches then skip it."""

    @abstractmethod
    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called before each forward pass, with None where the batch is as it was."""
