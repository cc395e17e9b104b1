"""When a request is done, and log-probabilities as they go to the front end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.engine import LogprobsRow
from vllm.v1.request import Request, RequestStatus

if TYPE_CHECKING:
    from vllm.v1.outputs import LogprobsLists

__all__ = ["check_stop", "logprobs_rows"]


def check_stop(request: Request) -> bool:
    """End ``request`` if its last token ends it; stop strings are the front end's.

    EOS and stop token ids count from ``min_tokens`` output tokens on, and before length: a
    request whose last permitted token is EOS has stopped. Lengths always count.
    """
    params = request.sampling_params
    last = request.all_token_ids[-1]
    if last in request.stop_ids and request.num_output_tokens >= params.min_tokens:
        request.status = RequestStatus.FINISHED_STOPPED
        # As in vLLM: EOS says nothing, a stop token id says which.
        if last != params.eos_token_id or params.ignore_eos:
            request.stop_reason = last
        return True
    if request.num_tokens >= request.max_total_tokens:
        request.status = RequestStatus.FINISHED_LENGTH_CAPPED
        return True
    return False


def logprobs_rows(logprobs: LogprobsLists) -> list[LogprobsRow]:
    """One row per position."""
    return [
        LogprobsRow(token_ids, values, rank)
        for token_ids, values, rank in zip(
            logprobs.logprob_token_ids.tolist(),
            logprobs.logprobs.tolist(),
            logprobs.sampled_token_ranks.tolist(),
            strict=True,
        )
    ]
