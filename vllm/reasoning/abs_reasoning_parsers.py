"""What a reasoning parser is.

The interface is vLLM's; ``begin``, ``constraint_after`` and ``finish_streaming`` have defaults, so
that a plug-in need not know them. Parsers of this package derive from ``ScanningReasoningParser``:
one scanner serves whole answers and streams, so both give the same. Knows nothing of HTTP.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.openai.protocol import ChatCompletionRequest, DeltaMessage
from vllm.reasoning.manager import ReasoningParserManager
from vllm.sampling_params import StructuredOutputsParams

__all__ = ["ReasoningParser", "ReasoningParserManager", "ScanningReasoningParser"]


class ReasoningParser:
    """Splits an answer into reasoning and content; one object per sequence of a stream."""

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        self.model_tokenizer = tokenizer

    @property
    def vocab(self) -> dict[str, int]:
        return self.model_tokenizer.get_vocab()

    def adjust_request(self, request: ChatCompletionRequest) -> ChatCompletionRequest:
        """The request, changed so that reasoning can be told apart."""
        return request

    def begin(self, prompt: str) -> None:
        """Learn how the prompt ends, which may have begun or ended the reasoning."""

    def constraint_after(
        self, constraint: StructuredOutputsParams
    ) -> StructuredOutputsParams | None:
        """``constraint`` for the content alone, reasoning before it; None if that cannot be said.

        To be asked after ``begin``.
        """
        return None

    @abstractmethod
    def extract_reasoning(
        self, model_output: str, request: ChatCompletionRequest
    ) -> tuple[str | None, str | None]:
        """(reasoning, content) of a whole answer."""

    @abstractmethod
    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        """What to send for ``delta_text``; None: nothing yet."""

    def finish_streaming(self) -> DeltaMessage | None:
        """What is left to send when the model has ended."""
        return None


class ScanningReasoningParser(ReasoningParser):
    """A parser that takes text as it comes and says of each piece what it is."""

    @abstractmethod
    def feed(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that ``text``, the next of the answer, settles."""

    @abstractmethod
    def finish(self) -> tuple[str, str]:
        """(reasoning, content) that is left at the end of the answer."""

    def extract_reasoning(
        self, model_output: str, request: ChatCompletionRequest
    ) -> tuple[str | None, str | None]:
        parts = [self.feed(model_output), self.finish()]
        reasoning, content = ("".join(texts) for texts in zip(*parts, strict=True))
        # An answer that ends within its reasoning has no content; an empty answer has an empty one.
        return reasoning or None, content or (None if reasoning else "")

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        return _delta(*self.feed(delta_text))

    def finish_streaming(self) -> DeltaMessage | None:
        return _delta(*self.finish())


def _delta(reasoning: str, content: str) -> DeltaMessage | None:
    if not reasoning and not content:
        return None
    return DeltaMessage(reasoning=reasoning or None, content=content or None)
