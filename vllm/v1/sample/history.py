"""Which tokens a request has seen, and how often: what penalties are computed from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["TokenHistory"]


class TokenHistory:
    """The distinct tokens of one request, with how often each came up in its output.

    Kept up to date token by token, so that a penalty costs the number of distinct tokens and
    not the size of the vocabulary.
    """

    __slots__ = ("_counts", "_ids", "_size", "_slot_of")

    def __init__(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]) -> None:
        distinct = dict.fromkeys(prompt_token_ids)
        self._slot_of: dict[int, int] = {token: slot for slot, token in enumerate(distinct)}
        self._size = len(distinct)
        capacity = max(64, 2 * self._size)
        self._ids = np.zeros(capacity, dtype=np.int64)
        self._ids[: self._size] = list(distinct)
        self._counts = np.zeros(capacity, dtype=np.float32)
        for token in output_token_ids:
            self.append(token)

    @property
    def token_ids(self) -> np.ndarray:
        """int64 ``(n,)``: the distinct tokens of prompt and output."""
        return self._ids[: self._size]

    @property
    def output_counts(self) -> np.ndarray:
        """float32 ``(n,)``: how often each of ``token_ids`` is in the output."""
        return self._counts[: self._size]

    def append(self, token: int) -> None:
        """Take note of a token of the output."""
        slot = self._slot_of.get(token)
        if slot is None:
            slot = self._slot_of[token] = self._size
            if slot == self._ids.size:
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[slot] = token
            self._size += 1
        self._counts[slot] += 1
