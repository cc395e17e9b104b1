"""Token bitmasks on logits: what a grammar forbids becomes minus infinity."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from vllm.v1.core.sched.output import GrammarOutput

__all__ = ["GrammarMask"]


class GrammarMask:
    """The masks of one step, ready to be applied.

    Args:
        row_of: request id to row of the logits; requests that do not sample are absent.
    """

    def __init__(self, grammar_output: GrammarOutput, row_of: Mapping[str, int]) -> None:
        ids = grammar_output.structured_output_request_ids
        picked = [i for i, req_id in enumerate(ids) if req_id in row_of]
        self._req_ids = [ids[i] for i in picked]
        self._rows = np.array([row_of[req_id] for req_id in self._req_ids], dtype=np.int64)
        self._words = np.ascontiguousarray(grammar_output.grammar_bitmask[picked])

    def allow_nothing_but(self, token_ids: Mapping[str, np.ndarray]) -> set[str]:
        """Of these requests, those whose mask allows none but the given tokens."""
        found = set()
        for req_id, words in zip(self._req_ids, self._words, strict=True):
            ids = token_ids.get(req_id)
            if ids is not None:
                others = words.view(np.uint32).copy()
                np.bitwise_and.at(
                    others, ids // 32, ~(np.uint32(1) << (ids % 32).astype(np.uint32))
                )
                if not others.any():
                    found.add(req_id)
        return found

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask ``logits`` (``(R, V)``, any float dtype) in place and return it."""
        if not self._rows.size:
            return logits
        width = logits.shape[-1]
        forbidden = np.unpackbits((~self._words).view(np.uint8), axis=1, bitorder="little")
        # Entries past the mask's width belong to no token.
        if forbidden.shape[1] < width:
            missing = width - forbidden.shape[1]
            forbidden = np.pad(forbidden, ((0, 0), (0, missing)), constant_values=1)
        mask = torch.from_numpy(forbidden[:, :width].view(np.bool_)).to(logits.device)
        if self._rows.size == logits.shape[0] and (np.diff(self._rows) == 1).all():
            return logits.masked_fill_(mask, float("-inf"))
        index = torch.from_numpy(self._rows).to(logits.device)
        logits[index] = logits[index].masked_fill(mask, float("-inf"))
        return logits
