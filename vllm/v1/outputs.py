"""What the model runner returns to the engine core after one step."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "EMPTY_MODEL_RUNNER_OUTPUT",
    "KVConnectorOutput",
    "LogprobsLists",
    "ModelRunnerOutput",
    "PendingModelRunnerOutput",
]


class LogprobsLists(NamedTuple):
    """Log-probabilities of several positions, on the host.

    ``logprob_token_ids`` int32 and ``logprobs`` float32 have shape ``(positions, k + 1)``,
    column 0 being the sampled (or prompt) token and the rest the top k, best first;
    ``sampled_token_ranks`` int32 ``(positions,)`` counts from 1.
    """

    logprob_token_ids: np.ndarray
    logprobs: np.ndarray
    sampled_token_ranks: np.ndarray


@dataclass(slots=True)
class KVConnectorOutput:
    """What the connector's worker half reports after a step."""

    finished_sending: set[str] | None = None
    finished_recving: set[str] | None = None
    kv_connector_stats: Any = None
    kv_cache_events: Any = None
    invalid_block_ids: set[int] = field(default_factory=set)
    failed_recving: set[str] = field(default_factory=set)
    stuck_recving: set[str] = field(default_factory=set)
    """Loads that cannot be waited for; their blocks stay until they have ended."""
    kv_connector_worker_meta: Any = None

    @property
    def ends_transfers(self) -> bool:
        """Somebody need not wait any more."""
        return bool(
            self.finished_sending
            or self.finished_recving
            or self.failed_recving
            or self.stuck_recving
        )

    def is_empty(self) -> bool:
        return not (
            self.ends_transfers
            or self.kv_connector_stats
            or self.kv_cache_events
            or self.invalid_block_ids
            or self.kv_connector_worker_meta
        )


@dataclass(slots=True)
class ModelRunnerOutput:
    """``sampled_token_ids[i]`` belongs to ``req_ids[i]``; empty for a prompt not yet finished.

    ``logprobs`` holds one entry per request that asked for them and sampled in this step;
    ``prompt_logprobs_dict`` those of prompts whose last position was computed in this step.
    ``request_errors`` says why a request cannot go on (its logits leave no token to choose); the
    others of the step are unaffected.
    """

    req_ids: list[str]
    req_id_to_index: dict[str, int]
    sampled_token_ids: list[list[int]]
    logprobs: dict[str, LogprobsLists] = field(default_factory=dict)
    prompt_logprobs_dict: dict[str, LogprobsLists] = field(default_factory=dict)
    kv_connector_output: KVConnectorOutput | None = None
    num_nans_in_logits: dict[str, int] | None = None
    request_errors: dict[str, str] = field(default_factory=dict)

    @property
    def ended_transfers(self) -> bool:
        """Somebody need not wait for KV any more."""
        return self.kv_connector_output is not None and self.kv_connector_output.ends_transfers


class PendingModelRunnerOutput(ABC):
    """The output of a step that a device may still be running."""

    __slots__ = ()

    @abstractmethod
    def result(self) -> ModelRunnerOutput:
        """The output, once the device has computed it; to be called once."""


EMPTY_MODEL_RUNNER_OUTPUT = ModelRunnerOutput(req_ids=[], req_id_to_index={}, sampled_token_ids=[])
