"""Messages between the front end and the engine core. msgspec only; no torch, no pickle."""

import enum
import time
from typing import Any

import msgspec

from vllm.sampling_params import SamplingParams

__all__ = [
    "FINISH_REASON_STRINGS",
    "EngineCoreEvent",
    "EngineCoreEventType",
    "EngineCoreOutput",
    "EngineCoreOutputs",
    "EngineCoreRequest",
    "EngineCoreRequestType",
    "EngineFacts",
    "FinishReason",
    "LogprobsRow",
    "SchedulerStats",
    "UtilityOutput",
]

FINISH_REASON_STRINGS = ("stop", "length", "abort", "error")


class FinishReason(enum.IntEnum):
    """Why a request ended. ERROR carries ``EngineCoreOutput.error``."""

    STOP = 0
    LENGTH = 1
    ABORT = 2
    ERROR = 3

    def __str__(self) -> str:
        return FINISH_REASON_STRINGS[self.value]


class EngineCoreRequest(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """One request, tokenised and checked. ``arrival_time`` is ``time.time()``."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    arrival_time: float
    priority: int = 0
    cache_salt: str | None = None
    client_index: int = 0
    kv_transfer_params: dict[str, Any] | None = None
    encoder_token_ids: list[int] | None = None
    """What an encoder reads, where the model has one; the prompt is the decoder's then."""


class EngineCoreEventType(enum.IntEnum):
    QUEUED = 1
    SCHEDULED = 2
    PREEMPTED = 3


class EngineCoreEvent(msgspec.Struct, array_like=True, gc=False):
    """Something that happened to a request; ``timestamp`` is monotonic seconds."""

    type: EngineCoreEventType
    timestamp: float

    @classmethod
    def new_event(
        cls, event_type: EngineCoreEventType, timestamp: float | None = None
    ) -> "EngineCoreEvent":
        return cls(event_type, time.monotonic() if timestamp is None else timestamp)


class LogprobsRow(msgspec.Struct, array_like=True, gc=False):
    """Log-probabilities at one position, on the wire.

    ``token_ids[0]`` is the sampled (or prompt) token and ``rank`` its rank, from 1; the rest
    are the top tokens, best first. ``logprobs`` has the same length.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


class EngineCoreOutput(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """What one step produced for one request.

    ``new_prompt_logprobs`` comes once, when the prompt has been computed, with one row per
    prompt position from the second on. ``error_type`` is the name of a class of
    ``vllm.errors`` (say ``QueueFullError``) when ``finish_reason`` is ERROR.
    """

    request_id: str
    new_token_ids: list[int]
    new_logprobs: list[LogprobsRow] | None = None
    new_prompt_logprobs: list[LogprobsRow] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    events: list[EngineCoreEvent] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    error: str | None = None
    error_type: str | None = None
    num_external_tokens: int = 0
    """Of ``num_cached_tokens``, those that a connector has loaded."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


class UtilityOutput(msgspec.Struct, array_like=True, gc=False):
    """The answer to a utility call; exactly one of the last two is meaningful."""

    call_id: int
    failure_message: str | None = None
    result: Any = None


class SchedulerStats(msgspec.Struct, array_like=True, gc=False, omit_defaults=True):
    """Counters of one step; the ``prefix_cache_*`` and ``num_preemptions`` are increments."""

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    kv_cache_usage: float = 0.0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    external_prefix_cache_queries: int = 0
    external_prefix_cache_hits: int = 0
    num_preemptions: int = 0
    num_scheduled_tokens: int = 0
    num_waiting_by_reason: dict[str, int] = {}
    kv_connector: dict[str, float] = {}
    """Increments of what the connector's worker halves count."""

    def add_increments(self, earlier: "SchedulerStats") -> None:
        """Take in what was counted before; gauges stay as they are."""
        self.prefix_cache_queries += earlier.prefix_cache_queries
        self.prefix_cache_hits += earlier.prefix_cache_hits
        self.external_prefix_cache_queries += earlier.external_prefix_cache_queries
        self.external_prefix_cache_hits += earlier.external_prefix_cache_hits
        self.num_preemptions += earlier.num_preemptions
        self.num_scheduled_tokens += earlier.num_scheduled_tokens
        for name, value in earlier.kv_connector.items():
            self.kv_connector[name] = self.kv_connector.get(name, 0) + value


class EngineCoreOutputs(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """All that one engine step sends to one front end.

    ``outputs`` is what to read. On the wire most requests are no more than a token of
    ``next_tokens``, by id: nothing else has happened to them.
    """

    engine_index: int = 0
    full_outputs: list[EngineCoreOutput] = []
    scheduler_stats: SchedulerStats | None = None
    timestamp: float = 0.0
    utility_output: UtilityOutput | None = None
    finished_requests: set[str] | None = None
    next_tokens: dict[str, int] = {}

    @property
    def outputs(self) -> list[EngineCoreOutput]:
        """One for each request that has got something; may be added to."""
        if self.next_tokens:
            self.full_outputs += [
                EngineCoreOutput(request_id, [token_id])
                for request_id, token_id in self.next_tokens.items()
            ]
            self.next_tokens = {}
        return self.full_outputs


class EngineCoreRequestType(bytes, enum.Enum):
    """First frame of a message to the engine core."""

    ADD = b"\x00"
    ABORT = b"\x01"
    UTILITY = b"\x02"
    SHUTDOWN = b"\x03"
    HELLO = b"\x04"


class EngineFacts(msgspec.Struct, kw_only=True):
    """What the engine found out while it started; sizes in bytes and tokens, times in seconds."""

    num_gpu_blocks: int
    block_size: int
    kv_cache_layout: str
    kv_cache_memory_bytes: int
    kv_cache_size_tokens: int
    kv_cache_max_concurrency: float
    num_kv_cache_groups: int = 1
    startup_seconds: dict[str, float] = {}
