"""The scheduler's door to structured output.

Owns the backend, which is built when the first such request comes, and the threads that compile.
Imports no torch and no grammar library until then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm.sampling_params import SamplingParams
from vllm.v1.structured_output.backend_types import (
    StructuredOutputBackend,
    StructuredOutputGrammar,
)
from vllm.v1.structured_output.request import StructuredOutputRequest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

__all__ = ["StructuredOutputManager"]

# A grammar that takes long to compile must not hold up the others.
_COMPILE_WORKERS = 2


class StructuredOutputManager:
    """Compiles and follows the grammars of all requests.

    Args:
        tokenizer_factory: makes the model's tokenizer; called once, from a compiling thread.
    """

    def __init__(self, vllm_config: VllmConfig, tokenizer_factory: Callable[[], Any]) -> None:
        self._vllm_config = vllm_config
        self._tokenizer_factory = tokenizer_factory
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        self._backend: StructuredOutputBackend | None = None
        self._backend_lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._bitmask = np.empty((0, -(-self._vocab_size // 32)), dtype=np.int32)

    def grammar_init(self, request: Request) -> None:
        """Start compiling the constraint of ``request``, if it has one and none is under way.

        Sets ``request.structured_output_request``. Never raises for what a client did wrong:
        that is in ``StructuredOutputRequest.error`` once compiling has ended.
        """
        if (
            request.sampling_params.structured_outputs is None
            or request.structured_output_request is not None
        ):
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_COMPILE_WORKERS, thread_name_prefix="grammar")
        future = self._pool.submit(self._compile, request.sampling_params)
        request.structured_output_request = StructuredOutputRequest(future)

    def grammar_bitmask(
        self, requests: Mapping[str, Request], structured_output_request_ids: Sequence[str]
    ) -> np.ndarray:
        """What each of the requests may sample next.

        Args:
            requests: by id; those named have compiled grammars that are not terminated.

        Returns:
            int32 ``(len(ids), ceil(vocab_size / 32))``, bit 1 = allowed; valid until the next call.
        """
        count = len(structured_output_request_ids)
        if self._bitmask.shape[0] < count:
            self._bitmask = np.empty((count, self._bitmask.shape[1]), dtype=np.int32)
        bitmask = self._bitmask[:count]
        if count:
            assert self._backend is not None
            self._backend.fill_bitmask(
                [_grammar(requests[req_id]) for req_id in structured_output_request_ids], bitmask
            )
        return bitmask

    def accept_tokens(self, request: Request, token_ids: Sequence[int]) -> bool:
        """Advance the grammar by sampled tokens; False if it does not allow them."""
        return _grammar(request).accept_tokens(token_ids)

    def is_terminated(self, request: Request) -> bool:
        """True once nothing may follow what ``request`` has generated."""
        return _grammar(request).is_terminated()

    def shutdown(self) -> None:
        """Drop what is waiting to be compiled; what is being compiled is not waited for."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

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


def _grammar(request: Request) -> StructuredOutputGrammar:
    state = request.structured_output_request
    assert isinstance(state, StructuredOutputRequest)
    return state.grammar
