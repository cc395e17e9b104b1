"""One request's constraint: first a compilation in flight, then a grammar that follows it."""

from __future__ import annotations

from vllm.errors import EngineGenerateError, VLLMError, VLLMValidationError
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar
from vllm.v1.structured_output.watched_threads import WatchedThreads, Work

__all__ = ["StructuredOutputRequest"]


class StructuredOutputRequest:
    """Held by ``Request.structured_output_request``; lives as long as the request, so that its
    state survives preemption.

    Args:
        compiling: gives the grammar.
        threads: those that ``compiling`` was submitted to.
    """

    __slots__ = ("_compiling", "_failure", "_threads")

    def __init__(self, compiling: Work, threads: WatchedThreads) -> None:
        self._compiling = compiling
        self._threads = threads
        self._failure: BaseException | None = None

    @property
    def is_grammar_ready(self) -> bool:
        """Compiling has ended, well or not."""
        return self._threads.is_over(self._compiling)

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed, in one line for the client; None: all is well."""
        error = self._get_failure()
        if error is None or isinstance(error, VLLMValidationError | VLLMError):
            return None if error is None else str(error)
        return f"structured_outputs: the grammar could not be made: {error}"

    @property
    def error_type(self) -> str | None:
        """Name of the class of ``vllm.errors`` that ``error`` belongs to."""
        error = self._get_failure()
        if error is None:
            return None
        expected = isinstance(error, VLLMValidationError | VLLMError)
        return (type(error) if expected else EngineGenerateError).__name__

    @property
    def grammar(self) -> StructuredOutputGrammar:
        """The compiled grammar; only once ``is_grammar_ready`` and without ``error``."""
        assert self._compiling.done() and self._failure is None
        return self._compiling.result()

    @property
    def can_follow(self) -> bool:
        """``grammar`` may be used; False once following it has failed."""
        return self._failure is None

    def fail(self, error: Exception) -> None:
        """The compiled grammar cannot be followed any further."""
        self._failure = error

    def cancel(self) -> None:
        """The request is gone: don't start compiling, if that has not begun."""
        self._compiling.cancel()

    def _get_failure(self) -> BaseException | None:
        if self._failure is not None or not self._compiling.done():
            return self._failure
        if self._compiling.cancelled():
            return EngineGenerateError("the engine is shutting down")
        return self._compiling.exception()
