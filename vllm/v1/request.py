"""One request as the engine core tracks it: its tokens, its progress and why it ended.

Plain state with the few methods that keep it consistent; the scheduler decides, the KV cache
manager allocates. No torch, and no knowledge of blocks beyond the hashes of its own tokens.
"""

from __future__ import annotations

import enum
import time
from typing import TYPE_CHECKING, Any, Protocol

from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreRequest, FinishReason

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

__all__ = ["BlockHasher", "Request", "RequestStatus", "StructuredOutputState"]


class RequestStatus(enum.IntEnum):
    """Where a request stands. Everything after ``PREEMPTED`` is final."""

    WAITING = 0
    WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR = 1
    WAITING_FOR_REMOTE_KVS = 2
    RUNNING = 3
    PREEMPTED = 4
    FINISHED_STOPPED = 5
    FINISHED_LENGTH_CAPPED = 6
    FINISHED_ABORTED = 7
    FINISHED_IGNORED = 8
    FINISHED_ERROR = 9

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def is_finished(status: RequestStatus) -> bool:
        return status > RequestStatus.PREEMPTED

    @staticmethod
    def get_finished_reason(status: RequestStatus) -> FinishReason | None:
        """What the client is told; None while the request is not finished."""
        return _FINISH_REASONS.get(status)


_FINISH_REASONS = {
    RequestStatus.FINISHED_STOPPED: FinishReason.STOP,
    RequestStatus.FINISHED_LENGTH_CAPPED: FinishReason.LENGTH,
    RequestStatus.FINISHED_ABORTED: FinishReason.ABORT,
    RequestStatus.FINISHED_IGNORED: FinishReason.LENGTH,
    RequestStatus.FINISHED_ERROR: FinishReason.ERROR,
}


class StructuredOutputState(Protocol):
    """What the scheduler asks of a request's grammar, which is compiled elsewhere.

    ``error`` is None, or one line for the client once compiling or following the grammar has
    failed; it is read after ``is_grammar_ready`` has turned True.
    """

    @property
    def is_grammar_ready(self) -> bool: ...

    @property
    def error(self) -> str | None: ...

    @property
    def error_type(self) -> str | None:
        """Name of the class of ``vllm.errors`` that ``error`` belongs to."""

    def cancel(self) -> None:
        """The request is gone; compiling need not begin any more."""


class BlockHasher(Protocol):
    """Hashes the full blocks, of ``block_size`` tokens, that a request has gained."""

    @property
    def block_size(self) -> int: ...

    def __call__(self, request: Request, /) -> list[bytes]: ...


class Request:
    """A request inside the engine core.

    ``all_token_ids`` is prompt then output; treat it as read-only and add tokens with
    ``append_output_token_ids``. ``num_computed_tokens`` counts tokens whose KV is in the cache
    or is being computed by a step already scheduled. ``num_expected_tokens`` is ``num_tokens``
    and the tokens that such steps are going to sample, where the next one is scheduled before
    they are known. ``block_hashes`` holds the hash of each full block of ``all_token_ids``, at
    the granularity of the block hasher.
    """

    __slots__ = (
        "_block_hasher",
        "_next_hash_at",
        "all_token_ids",
        "arrival_time",
        "block_hashes",
        "cache_salt",
        "client_index",
        "encoder_token_ids",
        "error",
        "error_type",
        "events",
        "kv_capacity",
        "kv_transfer_params",
        "max_tokens",
        "max_total_tokens",
        "needs_known_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_expected_tokens",
        "num_external_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_tokens",
        "priority",
        "prompt_token_ids",
        "request_id",
        "sampling_params",
        "skip_reading_prefix_cache",
        "status",
        "stop_ids",
        "stop_reason",
        "structured_output_request",
        "use_structured_output",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        *,
        arrival_time: float | None = None,
        client_index: int = 0,
        priority: int = 0,
        cache_salt: str | None = None,
        kv_transfer_params: dict[str, Any] | None = None,
        block_hasher: BlockHasher | None = None,
        encoder_token_ids: list[int] | None = None,
    ) -> None:
        self.request_id = request_id
        self.encoder_token_ids = encoder_token_ids
        self.client_index = client_index
        self.priority = priority
        self.sampling_params = sampling_params
        self.arrival_time = time.time() if arrival_time is None else arrival_time
        self.cache_salt = cache_salt
        self.kv_transfer_params = kv_transfer_params

        self.status = RequestStatus.WAITING
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.error_type: str | None = None
        self.events: list[EngineCoreEvent] = []

        self.prompt_token_ids = prompt_token_ids
        self.num_prompt_tokens = len(prompt_token_ids)
        self.all_token_ids = prompt_token_ids.copy()
        self.num_tokens = self.num_expected_tokens = self.num_prompt_tokens

        self.num_computed_tokens = 0
        self.num_cached_tokens = -1
        """Prompt tokens found in a cache at first admission; -1 before it."""
        self.num_external_computed_tokens = 0
        self.num_preemptions = 0
        self.kv_capacity = 0
        """Tokens that the blocks held now can take; kept by the KV cache manager."""

        # None means as many as fit; the scheduler lowers max_total_tokens to what fits.
        self.max_tokens = sampling_params.max_tokens
        self.max_total_tokens = (
            self.num_prompt_tokens + self.max_tokens if self.max_tokens is not None else 1 << 62
        )
        self.stop_ids = _stop_ids(sampling_params)
        skip = sampling_params.skip_reading_prefix_cache
        # Prompt log-probabilities exist only for positions that are computed.
        self.skip_reading_prefix_cache = (
            sampling_params.prompt_logprobs is not None if skip is None else skip
        )
        self.use_structured_output = sampling_params.structured_outputs is not None
        self.structured_output_request: StructuredOutputState | None = None
        self.needs_known_tokens = self.use_structured_output or _follows_its_tokens(sampling_params)
        """Each token has to be known before the next can be sampled."""

        self.block_hashes: list[bytes] = []
        self._block_hasher: BlockHasher | None = None
        self._next_hash_at = 1 << 62
        if block_hasher is not None:
            self.set_block_hasher(block_hasher)

    @classmethod
    def from_engine_core_request(
        cls,
        request: EngineCoreRequest,
        block_hasher: BlockHasher | None = None,
    ) -> Request:
        return cls(
            request.request_id,
            request.prompt_token_ids,
            request.sampling_params,
            arrival_time=request.arrival_time,
            client_index=request.client_index,
            priority=request.priority,
            cache_salt=request.cache_salt,
            kv_transfer_params=request.kv_transfer_params,
            block_hasher=block_hasher,
            encoder_token_ids=request.encoder_token_ids,
        )

    def set_block_hasher(self, block_hasher: BlockHasher) -> None:
        """Hash the full blocks there are, and later ones as tokens arrive."""
        self._block_hasher = block_hasher
        self.block_hashes = []
        self._hash_new_blocks()

    @property
    def has_block_hasher(self) -> bool:
        return self._block_hasher is not None

    def _hash_new_blocks(self) -> None:
        hasher = self._block_hasher
        assert hasher is not None
        self.block_hashes.extend(hasher(self))
        self._next_hash_at = (len(self.block_hashes) + 1) * hasher.block_size

    def drop_last_prompt_token(self) -> None:
        """Compute one token less of the prompt; before anything is computed."""
        assert self.num_computed_tokens == 0
        assert self.num_tokens == self.num_prompt_tokens
        self.prompt_token_ids = self.prompt_token_ids[:-1]
        self.all_token_ids.pop()
        self.num_prompt_tokens -= 1
        self.num_tokens -= 1
        self.num_expected_tokens -= 1
        if self.max_tokens is not None:
            self.max_total_tokens -= 1
        if self._block_hasher is not None:
            self.set_block_hasher(self._block_hasher)

    def append_output_token_id(self, token_id: int) -> int:
        """Returns the number of tokens there are then."""
        self.all_token_ids.append(token_id)
        self.num_tokens = num_tokens = self.num_tokens + 1
        if num_tokens > self.num_expected_tokens:
            self.num_expected_tokens = num_tokens
        if num_tokens >= self._next_hash_at:
            self._hash_new_blocks()
        return num_tokens

    @property
    def looks_at(self) -> int:
        """At how many tokens there is more to do than to count them."""
        return min(self._next_hash_at, self.max_total_tokens)

    def hash_new_blocks(self) -> None:
        """Hash the full blocks that tokens added outside of this class have made."""
        if self.num_tokens >= self._next_hash_at:
            self._hash_new_blocks()

    def append_output_token_ids(self, token_ids: list[int] | int) -> None:
        for token_id in (token_ids,) if isinstance(token_ids, int) else token_ids:
            self.append_output_token_id(token_id)

    @property
    def num_encoder_tokens(self) -> int:
        """Size of the cross-attention cache."""
        return len(self.encoder_token_ids or ())

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of what comes after the prompt."""
        return self.all_token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        return self.status > RequestStatus.PREEMPTED

    def get_finished_reason(self) -> FinishReason | None:
        return _FINISH_REASONS.get(self.status)

    def fail(self, message: str, error_type: str) -> None:
        """End with an error for the client; ``error_type`` names a class of ``vllm.errors``."""
        self.status = RequestStatus.FINISHED_ERROR
        self.error = message
        self.error_type = error_type

    def record_event(self, event_type: EngineCoreEventType, timestamp: float | None = None) -> None:
        self.events.append(EngineCoreEvent.new_event(event_type, timestamp))

    def take_events(self) -> list[EngineCoreEvent] | None:
        if not self.events:
            return None
        events, self.events = self.events, []
        return events

    @property
    def priority_key(self) -> tuple[int, float, str]:
        """Smaller is served earlier, and preempted later, by the priority policy."""
        return self.priority, self.arrival_time, self.request_id

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status}, {self.num_prompt_tokens} prompt + "
            f"{self.num_output_tokens} output tokens, {self.num_computed_tokens} computed)"
        )


def _follows_its_tokens(params: SamplingParams) -> bool:
    return bool(
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or params.bad_words_token_ids
    )


def _stop_ids(params: SamplingParams) -> frozenset[int]:
    ids = set(params.stop_token_ids or ())
    if params.eos_token_id is not None and not params.ignore_eos:
        ids.add(params.eos_token_id)
    return frozenset(ids)
