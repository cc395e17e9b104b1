"""What the sampler has to know about the rows of logits it is given. Plain data.

Row ``i`` of everything here belongs to row ``i`` of the logits. Fields that few requests use are
None where no row uses them, or name the rows that do, so that nobody else pays.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vllm.v1.sample.history import TokenHistory

__all__ = ["PenaltyRows", "SamplingMetadata", "TokenEdits"]


@dataclass(slots=True, kw_only=True)
class PenaltyRows:
    """Rows with a repetition, frequency or presence penalty, in step with each other.

    ``repetition``, ``frequency`` and ``presence`` are float32 ``(P,)``.
    """

    rows: np.ndarray
    histories: list[TokenHistory]
    repetition: np.ndarray
    frequency: np.ndarray
    presence: np.ndarray


@dataclass(slots=True, kw_only=True)
class TokenEdits:
    """Single logits to change: ``rows[i]``, ``token_ids[i]`` int64, ``values[i]`` float32."""

    rows: np.ndarray
    token_ids: np.ndarray
    values: np.ndarray


@dataclass(slots=True, kw_only=True)
class SamplingMetadata:
    """How to sample ``num_rows`` rows.

    Attributes:
        temperature: float32 ``(R,)``; below 1e-5 the row is greedy. None: all rows are.
        top_k: int64 ``(R,)``, 0 for no limit. None: no row has one.
        top_p: float32 ``(R,)``. None: 1 everywhere.
        min_p: float32 ``(R,)``. None: 0 everywhere.
        seeds: uint64 ``(R,)``, the request's key for random numbers.
        positions: int64 ``(R,)``, index in prompt + output of the token to sample.
        num_logprobs: int64 ``(R,)``: how many top tokens' log-probabilities a row asks for, -1
            for none. None: no row asks.
        penalties: rows with penalties.
        bias: logits to add to.
        banned: logits to set to minus infinity (min tokens, bad words); values unused.
        allowed: row -> the only token ids (int64) that it may sample.
    """

    num_rows: int
    temperature: np.ndarray | None = None
    top_k: np.ndarray | None = None
    top_p: np.ndarray | None = None
    min_p: np.ndarray | None = None
    seeds: np.ndarray | None = None
    positions: np.ndarray | None = None
    num_logprobs: np.ndarray | None = None
    penalties: PenaltyRows | None = None
    bias: TokenEdits | None = None
    banned: TokenEdits | None = None
    allowed: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def all_greedy(self) -> bool:
        return self.temperature is None

    @property
    def edits_logits(self) -> bool:
        """Some row's logits change before the choice is made."""
        return bool(
            self.penalties is not None
            or self.bias is not None
            or self.banned is not None
            or self.allowed
        )
