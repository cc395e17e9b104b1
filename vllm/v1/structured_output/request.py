"""One request's constraint: first a compilation in flight, then a grammar that follows it."""

from __future__ import annotations

from concurrent.futures import Future

from vllm.errors import EngineGenerateError, VLLMValidationError
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

__all__ = ["StructuredOutputRequest"]


class StructuredOutputRequest:
    """Held by ``Request.structured_output_request``; lives as long as the request, so that its
    state survives preemption.
    """

    __slots__ = ("_future",)

    def __init__(self, future: Future[StructuredOutputGrammar]) -> None:
        self._future = future

    @property
    def is_grammar_ready(self) -> bool:
        """Compiling has ended, well or not."""
        return self._future.done()

    @property
    def error(self) -> str | None:
        """Why there is no grammar, in one line for the client; None while all is well."""
        error = self._failure()
        if error is None or isinstance(error, VLLMValidationError):
            return None if error is None else str(error)
        return f"structured_outputs: the grammar could not be made: {error}"

    @property
    def error_type(self) -> str | None:
        """Name of the class of ``vllm.errors`` that ``error`` belongs to."""
        error = self._failure()
        if error is None:
            return None
        expected = isinstance(error, VLLMValidationError)
        return (type(error) if expected else EngineGenerateError).__name__

    @property
    def grammar(self) -> StructuredOutputGrammar:
        """The compiled grammar; only once ``is_grammar_ready`` and without ``error``."""
        assert self._future.done()
        return self._future.result()

    def cancel(self) -> None:
        """The request is gone: don't start compiling, if that has not begun."""
        self._future.cancel()

    def _failure(self) -> BaseException | None:
        if not self._future.done():
            return None
        if self._future.cancelled():
            return EngineGenerateError("the engine is shutting down")
        return self._future.exception()
