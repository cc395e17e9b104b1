"""What the scheduler tells the workers to do in one step. Plain data; no torch.

``block_ids`` everywhere is one list of manager block ids per KV-cache group.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm.sampling_params import SamplingParams

__all__ = ["CachedRequestData", "GrammarOutput", "NewRequestData", "SchedulerOutput"]


@dataclass(slots=True)
class NewRequestData:
    """A request that the workers see for the first time.

    ``prompt_token_ids`` is the whole prompt; the first ``num_computed_tokens`` of it are in the
    cache already (prefix hit or transfer).
    """

    req_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int
    encoder_token_ids: list[int] | None = None


@dataclass(slots=True)
class CachedRequestData:
    """Changes to requests that the workers know; lists run in step with ``req_ids``.

    For an id in ``resumed_req_ids`` (it was preempted) ``new_block_ids`` replaces the block
    table and ``all_token_ids[req_id]`` holds prompt and output so far; for the others
    ``new_block_ids`` is appended, and None means nothing new.
    """

    req_ids: list[str] = field(default_factory=list)
    resumed_req_ids: set[str] = field(default_factory=set)
    all_token_ids: dict[str, list[int]] = field(default_factory=dict)
    new_block_ids: list[tuple[list[int], ...] | None] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    num_output_tokens: list[int] = field(default_factory=list)
    as_expected: bool = False
    """These are the requests of the step before, in its order, and each is one token further;
    the counts are left out."""

    @property
    def num_reqs(self) -> int:
        return len(self.req_ids)

    @classmethod
    def make_empty(cls) -> "CachedRequestData":
        return cls()


@dataclass(slots=True)
class SchedulerOutput:
    """One step's work.

    ``num_scheduled_tokens`` maps request id to how many tokens to compute;
    ``total_num_scheduled_tokens`` is their sum. ``new_block_ids_to_zero`` lists, per group,
    blocks that must be zeroed before the step (state caches). ``num_common_prefix_blocks`` is
    per group, for cascade attention. ``blocks_arriving`` are those that a connector may be writing
    during the step; known in debug mode only.
    """

    scheduled_new_reqs: list[NewRequestData]
    scheduled_cached_reqs: CachedRequestData
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    num_common_prefix_blocks: list[int]
    finished_req_ids: set[str]
    preempted_req_ids: set[str] = field(default_factory=set)
    scheduled_spec_decode_tokens: dict[str, list[int]] = field(default_factory=dict)
    new_block_ids_to_zero: tuple[list[int], ...] | None = None
    has_structured_output_requests: bool = False
    kv_connector_metadata: Any = None
    blocks_arriving: Collection[int] = ()


@dataclass(slots=True)
class GrammarOutput:
    """Token bitmasks of the structured-output requests that sample in this step.

    ``grammar_bitmask`` is int32 of shape ``(len(structured_output_request_ids),
    ceil(vocab_size / 32))``, bit 1 = allowed.
    """

    structured_output_request_ids: list[str]
    grammar_bitmask: np.ndarray
