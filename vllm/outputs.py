"""What ``LLM.generate`` and ``AsyncLLM.generate`` hand to the user."""

from dataclasses import dataclass, field
from typing import Any

from vllm.logprobs import PromptLogprobs, SampleLogprobs

__all__ = ["CompletionOutput", "RequestMetrics", "RequestOutput"]


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence of a request.

    With ``RequestOutputKind.DELTA`` ``text``, ``token_ids`` and ``logprobs`` hold what is new
    since the last output; otherwise everything so far.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, in seconds; ``arrival_time`` is wall clock, the rest monotonic."""

    arrival_time: float
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    first_token_latency: float = 0.0
    num_generation_tokens: int = 0
    num_preemptions: int = 0


@dataclass(slots=True)
class RequestOutput:
    """The state of one request: its prompt and one ``CompletionOutput`` per sequence."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None
    kv_transfer_params: dict[str, Any] | None = None
    encoder_prompt_token_ids: list[int] | None = None
    """What the encoder read, where the model has one; the prompt is the decoder's then."""
    extra: dict[str, Any] = field(default_factory=dict)
