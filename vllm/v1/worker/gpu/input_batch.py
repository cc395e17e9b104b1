"""The batch of a device that runs behind the host: tokens are counted before they are known.

A token that a step still in flight samples stands in ``token_ids`` as ``-1 - i``, where ``i`` is
its place among that step's samples on the device; input preparation there puts the token in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm.v1.worker.input_batch import CachedRequestState, InputBatch

__all__ = ["AwaitedTokens", "DeviceInputBatch"]

_GREEDY_BELOW = 1e-5


@dataclass(slots=True)
class AwaitedTokens:
    """One token each of some requests, counted but not known.

    ``positions`` int64 ``(n,)`` are their places in prompt + output; ``rows`` int64 ``(n,)`` are
    right while the batch's ``changed`` is what it was.
    """

    rows: np.ndarray
    positions: np.ndarray
    states: list[CachedRequestState]
    changed: int


class DeviceInputBatch(InputBatch):
    keeps_outputs = True
    changed = 0
    """How often a row has come, gone or moved."""

    def _fill(self, row: int, state: CachedRequestState) -> None:
        super()._fill(row, state)
        self.changed += 1

    def remove(self, req_id: str) -> int:
        self.changed += 1
        return super().remove(req_id)

    def _move(self, source: int, target: int) -> None:
        super()._move(source, target)
        self.changed += 1

    def expect_tokens(self, rows: np.ndarray, places: np.ndarray) -> AwaitedTokens:
        """Count one more token for each of ``rows``: entry ``places[i]`` of the samples."""
        positions = self.num_tokens[rows]
        self.token_ids[rows, positions] = -1 - places
        self.num_tokens[rows] += 1
        states = self.states
        if rows.size == self.num_reqs:
            states = states.copy()
        else:
            states = [states[row] for row in rows.tolist()]
        return AwaitedTokens(rows, positions, states, self.changed)

    def take_tokens(self, awaited: AwaitedTokens, token_ids: np.ndarray) -> list[int]:
        """Put the tokens in (int64 ``(n,)``; negative: there is none); returns them."""
        tokens: list[int] = token_ids.tolist()
        for state, token in zip(awaited.states, tokens, strict=True):
            if token >= 0:
                state.output_token_ids.append(token)
                if state.history is not None:
                    state.history.append(token)
        rows = awaited.rows
        if self.changed != awaited.changed:
            row_of = self.req_id_to_index
            rows = np.array([row_of.get(state.req_id, -1) for state in awaited.states])
            # A request may have been replaced by another of its name.
            for i, row in enumerate(rows.tolist()):
                if row >= 0 and self.states[row] is not awaited.states[i]:
                    rows[i] = -1
        here = rows >= 0
        if not here.all():
            rows, token_ids = rows[here], token_ids[here]
            self.token_ids[rows, awaited.positions[here]] = token_ids
        else:
            self.token_ids[rows, awaited.positions] = token_ids
        return tokens

    @property
    def draws_on_device(self) -> bool:
        """No row asks for more than a temperature, top-k, top-p and min-p."""
        summary = self._summary
        if summary is None:
            summary = self._summary = self._summarise()
        return not (summary.logprobs or summary.sparse)

    @property
    def limits_draws(self) -> bool:
        """Some row has a top-k, top-p or min-p."""
        summary = self._summary
        if summary is None:
            summary = self._summary = self._summarise()
        return summary.top_k or summary.top_p or summary.min_p

    def scales(self, rows: np.ndarray) -> np.ndarray:
        """float32 ``(n,)``: 1 / temperature, 0 for greedy rows."""
        temperature = self.temperature[rows]
        greedy = temperature < _GREEDY_BELOW
        return np.where(greedy, np.float32(0), np.float32(1) / np.where(greedy, 1, temperature))
