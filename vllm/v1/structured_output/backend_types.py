"""What a structured-output backend offers: compiled grammars that follow one request each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from vllm.sampling_params import StructuredOutputsParams

__all__ = ["StructuredOutputBackend", "StructuredOutputGrammar"]


class StructuredOutputGrammar(ABC):
    """The state of one request's grammar. Not thread-safe."""

    @abstractmethod
    def accept_tokens(self, tokens: Sequence[int]) -> bool:
        """Advance by ``tokens``; False, and no change, if the grammar does not allow them."""

    @abstractmethod
    def is_terminated(self) -> bool:
        """True once a stop token was accepted: nothing may follow."""

    @abstractmethod
    def rollback(self, num_tokens: int) -> None:
        """Take back the last ``num_tokens`` accepted tokens."""


class StructuredOutputBackend(ABC):
    """Compiles grammars for one tokenizer, and says which tokens they allow next."""

    @abstractmethod
    def compile(
        self, params: StructuredOutputsParams, stop_token_ids: Sequence[int]
    ) -> StructuredOutputGrammar:
        """A fresh grammar; takes up to seconds, so never on the step loop. Thread-safe.

        Args:
            stop_token_ids: tokens that may end the output where the grammar is complete.

        Raises:
            VLLMValidationError: the constraint is malformed or cannot be expressed.
        """

    @abstractmethod
    def fill_bitmask(
        self, grammars: Sequence[StructuredOutputGrammar], bitmask: np.ndarray
    ) -> None:
        """Write to row ``i`` of ``bitmask`` (int32 ``(n, ceil(V / 32))``) what ``grammars[i]``
        allows next, 1 meaning allowed.
        """
