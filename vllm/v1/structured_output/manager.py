"""The scheduler's door to structured output.

Owns the backend, which is built when the first such request comes, and the threads that compile.
Imports no torch and no grammar library until then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm.errors import QueueFullError, VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.structured_output.backend_types import (
    StructuredOutputBackend,
    StructuredOutputGrammar,
)
from vllm.v1.structured_output.request import StructuredOutputRequest
from vllm.v1.structured_output.watched_threads import WatchedThreads, Work

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

__all__ = ["StructuredOutputManager"]

# A grammar that takes long to compile must not hold up the others.
_COMPILE_WORKERS = 2
_COMPILE_SECONDS = 30.0
# Following a grammar takes microseconds a token, and milliseconds are much. A short ambiguous one
# can take minutes, and all requests wait for it.
_FOLLOW_SECONDS = 1.0
_FOLLOW_SECONDS_WHILE_OTHERS_HANG = 0.2
# Each burns a core until it ends.
_MAX_HANGING = 2


def _too_slow(doing: str, seconds: float) -> Callable[[], Exception]:
    return lambda: VLLMValidationError(
        f"structured_outputs: {doing} took longer than {seconds:g} s; make the constraint simpler "
        "(fewer repetitions inside repetitions and alternatives that begin alike)",
        parameter="structured_outputs",
    )


class StructuredOutputManager:
    """Compiles and follows the grammars of all requests, each within a time limit.

    Clients make grammars up, and some take longer than anybody would wait. Those fail their own
    requests; see ``WatchedThreads`` for what becomes of the work.

    Args:
        tokenizer_factory: makes the model's tokenizer; called once, from a compiling thread.
        compile_seconds: limit of the time that one grammar takes to compile.
        follow_seconds: limit of the time that one token takes to follow.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        tokenizer_factory: Callable[[], Any],
        *,
        compile_seconds: float = _COMPILE_SECONDS,
        follow_seconds: float = _FOLLOW_SECONDS,
    ) -> None:
        self._vllm_config = vllm_config
        self._tokenizer_factory = tokenizer_factory
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        self._backend: StructuredOutputBackend | None = None
        self._backend_lock = threading.Lock()
        self._compile_seconds = compile_seconds
        self._follow_seconds = follow_seconds
        self._compilers = WatchedThreads(_COMPILE_WORKERS, "grammar-compile")
        self._followers = WatchedThreads(1, "grammar-follow")
        self._bitmask = np.empty((0, -(-self._vocab_size // 32)), dtype=np.int32)

    def grammar_init(self, request: Request) -> None:
        """Start compiling the constraint of ``request``, if it has one and none is under way.

        Sets ``request.structured_output_request``. Never raises for what a client did wrong:
        that is in ``StructuredOutputRequest.error`` once compiling has ended.

        Raises:
            QueueFullError: too many grammars have taken too long, and still do.
        """
        if (
            request.sampling_params.structured_outputs is None
            or request.structured_output_request is not None
        ):
            return
        if self._compilers.num_given_up + self._followers.num_given_up >= _MAX_HANGING:
            raise QueueFullError(
                "structured_outputs: the engine is busy with grammars that do not end: try again "
                "later"
            )
        params = request.sampling_params
        compiling = self._compilers.submit(
            lambda _: self._compile(params),
            self._compile_seconds,
            _too_slow("compiling the grammar", self._compile_seconds),
        )
        request.structured_output_request = StructuredOutputRequest(compiling, self._compilers)

    def grammar_bitmask(
        self, requests: Mapping[str, Request], structured_output_request_ids: Sequence[str]
    ) -> np.ndarray:
        """What each of the requests may sample next.

        Args:
            requests: by id; those named have compiled grammars that are not terminated.

        Returns:
            int32 ``(len(ids), ceil(vocab_size / 32))``, bit 1 = allowed; valid until the next call.
            All ones where the grammar took too long: ``accept_tokens`` will be False.
        """
        count = len(structured_output_request_ids)
        if self._bitmask.shape[0] < count:
            self._bitmask = np.empty((count, self._bitmask.shape[1]), dtype=np.int32)
        states = [_state(requests[req_id]) for req_id in structured_output_request_ids]
        begin = 0
        while begin < count:
            begin = self._fill(states, begin)
        return self._bitmask[:count]

    def _fill(self, states: Sequence[StructuredOutputRequest], begin: int) -> int:
        """Fill the rows from ``begin`` on; returns the row after the last that is filled."""
        backend, bitmask = self._backend, self._bitmask
        assert backend is not None

        def fill(work: Work) -> None:
            for row in range(begin, len(states)):
                if not work.begin_part(row):
                    return
                if states[row].can_follow:
                    backend.fill_bitmask([states[row].grammar], bitmask[row : row + 1])
                else:
                    bitmask[row] = -1

        work = self._follow(fill)
        try:
            self._followers.run(work)
        except VLLMValidationError as error:
            states[work.part].fail(error)
            # The thread that was given up may still write to the old one.
            self._bitmask = bitmask.copy()
            self._bitmask[work.part] = -1
            return work.part + 1
        return len(states)

    def _follow(self, call: Callable[[Work], Any]) -> Work:
        seconds = self._follow_seconds
        if self._followers.num_given_up:
            seconds = min(seconds, _FOLLOW_SECONDS_WHILE_OTHERS_HANG)
        return self._followers.submit(call, seconds, _too_slow("following the grammar", seconds))

    def accept_tokens(self, request: Request, token_ids: Sequence[int]) -> bool:
        """Advance the grammar by sampled tokens; False if it does not allow them, or took too
        long: then ``structured_output_request.error`` says so.
        """
        state = _state(request)
        if not state.can_follow:
            return False
        grammar = state.grammar
        try:
            return self._followers.run(self._follow(lambda _: grammar.accept_tokens(token_ids)))
        except VLLMValidationError as error:
            state.fail(error)
            return False

    def is_terminated(self, request: Request) -> bool:
        """True once nothing may follow what ``request`` has generated."""
        return _state(request).grammar.is_terminated()

    def shutdown(self) -> None:
        """Drop what is waiting to be compiled; what is being compiled is not waited for."""
        self._compilers.shutdown()
        self._followers.shutdown()

    def _compile(self, params: SamplingParams) -> StructuredOutputGrammar:
        assert params.structured_outputs is not None
        stop_ids = set(params.all_stop_token_ids).union(params.stop_token_ids or ())
        if params.eos_token_id is not None:
            stop_ids.add(params.eos_token_id)
        return self._get_backend().compile(params.structured_outputs, sorted(stop_ids))

    def _get_backend(self) -> StructuredOutputBackend:
        with self._backend_lock:
            if self._backend is None:
                from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

                self._backend = XgrammarBackend(
                    self._tokenizer_factory(),
                    self._vocab_size,
                    self._vllm_config.structured_outputs_config.disable_any_whitespace,
                )
            return self._backend


def _state(request: Request) -> StructuredOutputRequest:
    state = request.structured_output_request
    assert isinstance(state, StructuredOutputRequest)
    return state
