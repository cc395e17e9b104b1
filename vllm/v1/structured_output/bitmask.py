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
        pairs = [
            (row_of[req_id], i)
            for i, req_id in enumerate(grammar_output.structured_output_request_ids)
            if req_id in row_of
        ]
        self._rows = np.array([row for row, _ in pairs], dtype=np.int64)
        self._masks = grammar_output.grammar_bitmask[[i for _, i in pairs]]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask ``logits`` (``(R, V)``, any float dtype) in place and return it."""
        if not self._rows.size:
            return logits
        words = np.ascontiguousarray(self._masks)
        bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
        # Entries past the mask's width belong to no token: they stay forbidden.
        width = logits.shape[-1]
        if bits.shape[1] < width:
            bits = np.pad(bits, ((0, 0), (0, width - bits.shape[1])))
        forbidden = torch.from_numpy(bits[:, :width] == 0).to(logits.device)
        if self._rows.size == logits.shape[0] and (np.diff(self._rows) == 1).all():
            return logits.masked_fill_(forbidden, float("-inf"))
        index = torch.from_numpy(self._rows).to(logits.device)
        logits[index] = logits[index].masked_fill(forbidden, float("-inf"))
        return logits
