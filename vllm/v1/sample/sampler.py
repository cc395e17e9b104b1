"""Turns logits into tokens.

Order of work, for the rows that need it: raw log-probabilities; grammar mask; allowed token ids;
banned tokens (bad words, min tokens); logit bias; custom processors; penalties; temperature; min-p;
top-k and top-p; the draw. A batch of plain greedy rows is one argmax over the logits as the
model left them. Knows nothing of requests; rows come described by ``SamplingMetadata``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

import vllm._custom_ops as ops
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.logprobs import gather_logprobs
from vllm.v1.sample.ops.penalties import apply_penalties
from vllm.v1.sample.ops.random import draw, uniform
from vllm.v1.sample.ops.topk_topp import apply_min_p, apply_top_k_top_p, truncate

__all__ = ["LogprobsTensors", "Sampler", "SamplerOutput"]

_GREEDY_BELOW = 1e-5


class LogprobsTensors(NamedTuple):
    """Log-probabilities of ``rows`` (int64 ``(P,)``); the rest as in ``LogprobsLists``."""

    rows: np.ndarray
    logprob_token_ids: torch.Tensor
    logprobs: torch.Tensor
    sampled_token_ranks: torch.Tensor


@dataclass(slots=True)
class SamplerOutput:
    """``sampled_token_ids`` int64 ``(R,)``; -1 where the row's logits allow no choice."""

    sampled_token_ids: torch.Tensor
    logprobs: LogprobsTensors | None = None


LogitsEdit = Callable[[torch.Tensor], torch.Tensor]


def _no_edit(logits: torch.Tensor) -> torch.Tensor:
    return logits


class Sampler:
    """Samples one token for each row of logits.

    Args:
        logprobs_mode: which values are reported, see ``ops.logprobs.LOGPROBS_MODES``.
    """

    def __init__(self, logprobs_mode: str = "raw_logprobs") -> None:
        self._raw_mode = logprobs_mode.startswith("raw")
        self._as_logits = logprobs_mode.endswith("logits")

    def __call__(
        self,
        logits: torch.Tensor,
        metadata: SamplingMetadata,
        grammar_mask: LogitsEdit | None = None,
        before_penalties: LogitsEdit | None = None,
        after_temperature: LogitsEdit = _no_edit,
    ) -> SamplerOutput:
        """Sample one token per row.

        Args:
            logits: ``(R, V)`` in any float dtype; may be overwritten.
            metadata: how to sample each row.
            grammar_mask: sets what a grammar forbids to minus infinity, in place.
            before_penalties: custom processors that may change a row's best token.
            after_temperature: custom processors that never do.
        """
        if (
            metadata.all_greedy
            and metadata.num_logprobs is None
            and not metadata.edits_logits
            and before_penalties is None
        ):
            if grammar_mask is not None:
                logits = grammar_mask(logits)
            return SamplerOutput(ops.argmax(logits))

        asking = None
        if metadata.num_logprobs is not None:
            asking = np.flatnonzero(metadata.num_logprobs >= 0)
        # Before anything is edited in place; indexing copies the rows.
        raw = (
            logits[_tensor(asking, logits.device)]
            if self._raw_mode and asking is not None
            else None
        )
        logits = logits.float()
        if grammar_mask is not None:
            logits = grammar_mask(logits)
        logits = _edit(logits, metadata)
        if before_penalties is not None:
            logits = before_penalties(logits)
        if metadata.penalties is not None:
            apply_penalties(logits, metadata.penalties)

        sampled, processed = self._choose(
            logits, metadata, after_temperature, need_processed=asking is not None and raw is None
        )
        if asking is None:
            return SamplerOutput(sampled)
        index = _tensor(asking, logits.device)
        source = processed[index] if raw is None else raw
        assert metadata.num_logprobs is not None
        ids, values, ranks = gather_logprobs(
            source,
            sampled[index].clamp(min=0),
            int(metadata.num_logprobs.max()),
            self._as_logits,
        )
        return SamplerOutput(sampled, LogprobsTensors(asking, ids, values, ranks))

    def _choose(
        self,
        logits: torch.Tensor,
        metadata: SamplingMetadata,
        after_temperature: LogitsEdit,
        need_processed: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sampled tokens, and the logits that they were drawn from, if those are needed."""
        if metadata.temperature is None:
            return ops.argmax(logits), logits
        device = logits.device
        greedy_rows = metadata.temperature < _GREEDY_BELOW
        greedy = ops.argmax(logits) if greedy_rows.any() else None
        scale = np.where(greedy_rows, np.float32(1), metadata.temperature)
        logits.div_(torch.from_numpy(scale).to(device).unsqueeze(-1))
        logits = after_temperature(logits)
        if metadata.min_p is not None:
            apply_min_p(logits, torch.from_numpy(metadata.min_p).to(device))

        assert metadata.seeds is not None and metadata.positions is not None
        uniforms = torch.from_numpy(uniform(metadata.seeds, metadata.positions)).to(device)
        if need_processed:
            top_k, top_p = _tensor(metadata.top_k, device), _tensor(metadata.top_p, device)
            logits = apply_top_k_top_p(logits, top_k, top_p)
            sampled = draw(logits.softmax(dim=-1), uniforms)
        else:
            sampled = _draw_truncated(logits, metadata, uniforms)
        if greedy is not None:
            sampled = torch.where(torch.from_numpy(greedy_rows).to(device), greedy, sampled)
        return sampled, logits


def _tensor(array: np.ndarray | None, device: torch.device) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array).to(device)


def _edit(logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
    """Allowed token ids, banned tokens and logit bias, in place."""
    device = logits.device
    for row, token_ids in metadata.allowed.items():
        ids = torch.from_numpy(token_ids).to(device)
        kept = logits[row, ids]
        logits[row].fill_(float("-inf"))
        logits[row, ids] = kept
    if metadata.banned is not None:
        rows = torch.from_numpy(metadata.banned.rows).to(device)
        tokens = torch.from_numpy(metadata.banned.token_ids).to(device)
        logits[rows, tokens] = float("-inf")
    if metadata.bias is not None:
        rows = torch.from_numpy(metadata.bias.rows).to(device)
        tokens = torch.from_numpy(metadata.bias.token_ids).to(device)
        logits[rows, tokens] += torch.from_numpy(metadata.bias.values).to(device)
    return logits


def _draw_truncated(
    logits: torch.Tensor, metadata: SamplingMetadata, uniforms: torch.Tensor
) -> torch.Tensor:
    """Draw one token per row within its top-k and top-p, sorting only rows that have one."""
    limited = np.zeros(metadata.num_rows, dtype=bool)
    if metadata.top_k is not None:
        limited |= metadata.top_k > 0
    if metadata.top_p is not None:
        limited |= metadata.top_p < 1
    if not limited.any():
        return draw(logits.softmax(dim=-1), uniforms)
    device = logits.device
    top_k, top_p = _tensor(metadata.top_k, device), _tensor(metadata.top_p, device)
    if limited.all():
        return _draw_among(logits, top_k, top_p, uniforms)
    sampled = torch.empty(metadata.num_rows, dtype=torch.int64, device=device)
    some = torch.from_numpy(np.flatnonzero(limited)).to(device)
    sampled[some] = _draw_among(
        logits[some],
        None if top_k is None else top_k[some],
        None if top_p is None else top_p[some],
        uniforms[some],
    )
    rest = torch.from_numpy(np.flatnonzero(~limited)).to(device)
    sampled[rest] = draw(logits[rest].softmax(dim=-1), uniforms[rest])
    return sampled


def _draw_among(
    logits: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    uniforms: torch.Tensor,
) -> torch.Tensor:
    values, token_ids = truncate(logits, top_k, top_p)
    column = draw(values.softmax(dim=-1), uniforms)
    token = token_ids.gather(-1, column.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(column >= 0, token, -1)
