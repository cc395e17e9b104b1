"""A request with ``n > 1``: one engine request per sequence, and their outputs put together."""

import copy
from typing import Any

from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest

__all__ = ["ParentRequest"]


_INT64 = 1 << 63


def _child_seed(seed: int, index: int) -> int:
    """``seed + index`` within 64 bits; -1 would mean no seed at all."""
    wrapped = (seed + index + _INT64) % (2 * _INT64) - _INT64
    return wrapped if wrapped != -1 else -1 - _INT64 // 2


def _share(given: dict[str, Any] | None, n: int, index: int) -> dict[str, Any] | None:
    """The ``kv_transfer_params`` of sequence ``index``.

    One sequence keeps a prefill for a decoder elsewhere; a decoder's sequences all fetch the same,
    which must stay until the last one has it.
    """
    if given is not None and given.get("do_remote_prefill"):
        return {**given, "num_readers": n}
    if given is not None and given.get("do_remote_decode") and index:
        return None
    return given


class ParentRequest:
    """Keeps the sequences of one user request together.

    DELTA passes each sequence's news on as it comes; CUMULATIVE shows the latest state of all
    sequences that have begun; FINAL_ONLY shows nothing before the last one has ended.
    """

    def __init__(self, request_id: str, params: SamplingParams) -> None:
        self.request_id = request_id
        self.params = params
        self.child_ids: list[str] = []
        self.max_num_generation_tokens = 0
        self.kv_transfer_params: dict[str, Any] | None = None
        """Of whichever sequence has some: one answer is given for all."""
        self._unfinished = set(range(params.n))
        self._latest: dict[int, CompletionOutput] = {}

    @property
    def finished(self) -> bool:
        return not self._unfinished

    def child_request(self, request: EngineCoreRequest, index: int) -> EngineCoreRequest:
        """The engine's request for sequence ``index``; its seed is seed + index."""
        params = copy.copy(self.params)
        params.n = 1
        if params.seed is not None:
            params.seed = _child_seed(params.seed, index)
        child = copy.copy(request)
        child.request_id = f"{index}_{self.request_id}"
        child.sampling_params = params
        child.kv_transfer_params = _share(request.kv_transfer_params, self.params.n, index)
        self.child_ids.append(child.request_id)
        return child

    def add(self, output: CompletionOutput, num_generation_tokens: int) -> list[CompletionOutput]:
        """Take in a sequence's output; returns what to show now, perhaps nothing."""
        self.max_num_generation_tokens = max(self.max_num_generation_tokens, num_generation_tokens)
        if output.finish_reason is not None:
            self._unfinished.discard(output.index)
        kind = self.params.output_kind
        if kind is RequestOutputKind.DELTA:
            return [output]
        self._latest[output.index] = output
        if kind is RequestOutputKind.FINAL_ONLY and self._unfinished:
            return []
        return [self._latest[index] for index in sorted(self._latest)]
