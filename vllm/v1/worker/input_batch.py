"""The running requests, row by row, in arrays that survive from step to step.

A row is one request. Arrays are numpy side arrays, so that a step's inputs are made by a few
whole-array operations; only a change of the batch touches single rows. Rows are kept dense: when
one ends, a new request or the last row takes its place. Knows nothing of models or logits.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from vllm.sampling_params import SamplingParams
from vllm.v1.sample.history import TokenHistory
from vllm.v1.sample.logits_processor import BatchUpdateBuilder, NullBatchUpdateBuilder
from vllm.v1.sample.metadata import PenaltyRows, SamplingMetadata, TokenEdits
from vllm.v1.worker.block_table import MultiGroupBlockTable

__all__ = ["CachedRequestState", "InputBatch"]

_GREEDY_BELOW = 1e-5
_NO_EDITS = np.empty(0, dtype=np.int64)


@dataclass(slots=True)
class CachedRequestState:
    """One request as the worker knows it, in the batch or not (not scheduled, or preempted).

    ``num_computed_tokens`` and ``block_ids`` are kept up to date only while the request is outside
    the batch, and so is ``output_token_ids`` but for requests that need it between steps.
    """

    req_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int
    seed: int
    """Key of its random numbers, in [0, 2**64)."""
    output_token_ids: list[int] = field(default_factory=list)
    history: TokenHistory | None = None
    """Only for a request with penalties."""
    encoder_token_ids: list[int] | None = None
    """Only where the model has an encoder."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def keep_output(self, count: int) -> None:
        """Forget all but the first ``count`` output tokens: the scheduler did not take the rest."""
        if count < len(self.output_token_ids):
            del self.output_token_ids[count:]
            if self.history is not None:
                self.history = TokenHistory(self.prompt_token_ids, self.output_token_ids)


def _has_penalties(params: SamplingParams) -> bool:
    return bool(
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


class InputBatch:
    """Up to ``max_num_reqs`` requests.

    Attributes:
        token_ids: int32 ``(max_num_reqs, max_model_len + 1)``, prompt then output.
        num_tokens: int64 ``(max_num_reqs,)``, how many of ``token_ids`` are known.
        num_computed: int64 ``(max_num_reqs,)``, how many of them are in the cache.
        num_prompt: int64 ``(max_num_reqs,)``.
        num_encoder: int64 ``(max_num_reqs,)``, tokens that an encoder reads.
    """

    keeps_outputs: ClassVar[bool] = False
    """Every request's ``output_token_ids`` is kept up to date, by whoever learns of its tokens."""

    def __init__(
        self,
        max_num_reqs: int,
        max_model_len: int,
        vocab_size: int,
        block_table: MultiGroupBlockTable,
        changes: BatchUpdateBuilder | None = None,
    ) -> None:
        self.max_num_reqs = max_num_reqs
        self.vocab_size = vocab_size
        self.block_table = block_table
        # Custom logits processors follow the rows; without them nobody takes notes.
        self.changes = changes or NullBatchUpdateBuilder()
        self.req_ids: list[str] = []
        self.req_id_to_index: dict[str, int] = {}
        self.states: list[CachedRequestState] = []
        # One more column than a request may have tokens: the token sampled from the last one.
        self.token_ids = np.zeros((max_num_reqs, max_model_len + 1), dtype=np.int32)
        self._flat_ids = self.token_ids.reshape(-1)
        self._row_starts = np.arange(max_num_reqs) * (max_model_len + 1)
        # Outputs of the others are put together from their rows once they leave.
        self._follows_all = self.keeps_outputs or not isinstance(
            self.changes, NullBatchUpdateBuilder
        )
        self.num_tokens = np.zeros(max_num_reqs, dtype=np.int64)
        self.num_prompt = np.zeros(max_num_reqs, dtype=np.int64)
        self.num_computed = np.zeros(max_num_reqs, dtype=np.int64)
        self.num_encoder = np.zeros(max_num_reqs, dtype=np.int64)

        self.temperature = np.zeros(max_num_reqs, dtype=np.float32)
        self.top_k = np.zeros(max_num_reqs, dtype=np.int64)
        self.top_p = np.ones(max_num_reqs, dtype=np.float32)
        self.min_p = np.zeros(max_num_reqs, dtype=np.float32)
        self.seeds = np.zeros(max_num_reqs, dtype=np.uint64)
        self.num_logprobs = np.full(max_num_reqs, -1, dtype=np.int64)
        self.min_tokens = np.zeros(max_num_reqs, dtype=np.int64)
        self._arrays = (
            self.num_tokens,
            self.num_prompt,
            self.num_computed,
            self.num_encoder,
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.seeds,
            self.num_logprobs,
            self.min_tokens,
        )
        # Requests of the batch whose rows need more than the arrays say.
        self._penalised: dict[str, CachedRequestState] = {}
        self._biased: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._allowed: dict[str, np.ndarray] = {}
        self._bad_words: dict[str, CachedRequestState] = {}
        self.min_tokens_stop_ids: dict[str, np.ndarray] = {}
        """Of requests with ``min_tokens``: the tokens that would end them."""
        self._sparse: tuple[dict, ...] = (
            self._penalised,
            self._biased,
            self._allowed,
            self._bad_words,
            self.min_tokens_stop_ids,
        )
        self._summary: _Summary | None = None

    @property
    def num_reqs(self) -> int:
        return len(self.req_ids)

    # ---- rows come, go and move -------------------------------------------------------------

    def add(self, state: CachedRequestState) -> int:
        """Give ``state`` the next row and return it."""
        row = self.num_reqs
        assert row < self.max_num_reqs, "the scheduler runs more than max_num_seqs requests"
        self.req_ids.append(state.req_id)
        self.states.append(state)
        self.req_id_to_index[state.req_id] = row
        self._fill(row, state)
        return row

    def replace(self, row: int, state: CachedRequestState) -> None:
        """Put ``state`` where a request has just been removed."""
        self.req_ids[row] = state.req_id
        self.states[row] = state
        self.req_id_to_index[state.req_id] = row
        self._fill(row, state)

    def _fill(self, row: int, state: CachedRequestState) -> None:
        params = state.sampling_params
        num_prompt, num_tokens = len(state.prompt_token_ids), state.num_tokens
        self.token_ids[row, :num_prompt] = state.prompt_token_ids
        self.token_ids[row, num_prompt:num_tokens] = state.output_token_ids
        self.num_prompt[row] = num_prompt
        self.num_tokens[row] = num_tokens
        self.num_computed[row] = state.num_computed_tokens
        self.num_encoder[row] = len(state.encoder_token_ids or ())
        self.block_table.set_row(row, state.block_ids)

        self.temperature[row] = params.temperature
        self.top_k[row] = params.top_k if 0 < params.top_k < self.vocab_size else 0
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.seeds[row] = state.seed
        logprobs = params.logprobs
        self.num_logprobs[row] = (
            -1 if logprobs is None else self.vocab_size if logprobs < 0 else logprobs
        )
        self._fill_sparse(row, state)
        self.changes.note_added(row, params, state.prompt_token_ids, state.output_token_ids)
        self._summary = None

    def _fill_sparse(self, row: int, state: CachedRequestState) -> None:
        params, req_id = state.sampling_params, state.req_id
        if _has_penalties(params):
            if state.history is None:
                state.history = TokenHistory(state.prompt_token_ids, state.output_token_ids)
            self._penalised[req_id] = state
        if params.logit_bias:
            self._biased[req_id] = (
                np.fromiter(params.logit_bias.keys(), dtype=np.int64),
                np.fromiter(params.logit_bias.values(), dtype=np.float32),
            )
        if params.allowed_token_ids:
            self._allowed[req_id] = np.array(params.allowed_token_ids, dtype=np.int64)
        if params.bad_words_token_ids:
            self._bad_words[req_id] = state
        stop_ids = _stop_token_ids(params)
        self.min_tokens[row] = params.min_tokens if stop_ids.size else 0
        if self.min_tokens[row]:
            self.min_tokens_stop_ids[req_id] = stop_ids

    def remove(self, req_id: str) -> int:
        """Take a request out and return its row, which ``replace`` or ``condense`` must fill."""
        row = self.req_id_to_index.pop(req_id)
        state = self.states[row]
        if not self._is_followed(req_id):
            output = state.output_token_ids
            known = self.num_prompt[row] + len(output)
            output.extend(self.token_ids[row, known : self.num_tokens[row]].tolist())
        for rows in self._sparse:
            rows.pop(req_id, None)
        state.num_computed_tokens = int(self.num_computed[row])
        state.block_ids = self.block_table.get_row(row)
        self.changes.note_removed(row)
        self._summary = None
        return row

    def condense(self, empty_rows: list[int]) -> None:
        """Fill the rows that ``remove`` left empty from the end of the batch."""
        for row in sorted(empty_rows, reverse=True):
            last = self.num_reqs - 1
            if row != last:
                self._move(last, row)
            self.req_ids.pop()
            self.states.pop()

    def _move(self, source: int, target: int) -> None:
        req_id = self.req_ids[source]
        self.req_ids[target] = req_id
        self.states[target] = self.states[source]
        self.req_id_to_index[req_id] = target
        for array in self._arrays:
            array[target] = array[source]
        count = self.num_tokens[source]
        self.token_ids[target, :count] = self.token_ids[source, :count]
        self.block_table.move_row(source, target)
        self.changes.note_moved(source, target)

    # ---- tokens -----------------------------------------------------------------------------

    def tokens_at(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int32 ``(n,)``, the tokens at ``positions`` of ``rows`` (both int64 ``(n,)``)."""
        return self._flat_ids[self._row_starts[rows] + positions]

    def append_tokens(self, rows: np.ndarray, token_ids: np.ndarray) -> None:
        """Note one sampled token for each of ``rows`` (both int64 ``(n,)``, the rows ascending)."""
        if rows.size == self.num_reqs:
            counts = self.num_tokens[: rows.size]
            self._flat_ids[self._row_starts[: rows.size] + counts] = token_ids
            counts += 1
        else:
            self.token_ids[rows, self.num_tokens[rows]] = token_ids
            self.num_tokens[rows] += 1
        if self._follows_all or self._penalised or self._bad_words:
            for row, token in zip(rows.tolist(), token_ids.tolist(), strict=True):
                state = self.states[row]
                if self._is_followed(state.req_id):
                    state.output_token_ids.append(token)
                    if state.history is not None:
                        state.history.append(token)

    def _is_followed(self, req_id: str) -> bool:
        """Somebody looks at the request's outputs between steps."""
        return self._follows_all or req_id in self._penalised or req_id in self._bad_words

    def rewind(
        self, rows: np.ndarray, num_computed: Sequence[int], num_output: Sequence[int]
    ) -> None:
        """Set ``rows`` to what the scheduler counts; tokens that it did not take are forgotten."""
        self.num_computed[rows] = num_computed
        counted = self.num_prompt[rows] + num_output
        surplus = self.num_tokens[rows] > counted
        if surplus.any():
            for row, count in zip(rows[surplus].tolist(), counted[surplus].tolist(), strict=True):
                self.num_tokens[row] = count
                self.states[row].keep_output(count - int(self.num_prompt[row]))

    # ---- what the sampler needs -------------------------------------------------------------

    def sampling_metadata(
        self, rows: np.ndarray, may_stop: Set[str] = frozenset()
    ) -> SamplingMetadata:
        """How to sample ``rows`` (int64 ``(R,)``, ascending) of the batch.

        ``may_stop``: requests that may end before their ``min_tokens``.
        """
        summary = self._summary
        if summary is None:
            summary = self._summary = self._summarise()
        if summary.plain:
            return SamplingMetadata(num_rows=rows.size)
        metadata = SamplingMetadata(
            num_rows=rows.size,
            temperature=self.temperature[rows] if summary.random else None,
            top_k=self.top_k[rows] if summary.top_k else None,
            top_p=self.top_p[rows] if summary.top_p else None,
            min_p=self.min_p[rows] if summary.min_p else None,
            seeds=self.seeds[rows] if summary.random else None,
            positions=self.num_tokens[rows] if summary.random else None,
        )
        if summary.logprobs and (wanted := self.num_logprobs[rows]).max() >= 0:
            metadata.num_logprobs = wanted
        if summary.sparse:
            index = {self.req_ids[row]: i for i, row in enumerate(rows.tolist())}
            self._describe_sparse(metadata, index, may_stop)
        return metadata

    def _summarise(self) -> _Summary:
        n = self.num_reqs
        random = self.temperature[:n] >= _GREEDY_BELOW
        return _Summary(
            random=bool(random.any()),
            top_k=bool((random & (self.top_k[:n] > 0)).any()),
            top_p=bool((random & (self.top_p[:n] < 1)).any()),
            min_p=bool((random & (self.min_p[:n] > 0)).any()),
            logprobs=bool((self.num_logprobs[:n] >= 0).any()),
            sparse=any(self._sparse),
        )

    def _describe_sparse(
        self, metadata: SamplingMetadata, index: dict[str, int], may_stop: Set[str]
    ) -> None:
        """Fill in what few rows need. ``index``: request id to row of the logits."""
        penalised = [s for req_id, s in self._penalised.items() if req_id in index]
        if penalised:
            params = [state.sampling_params for state in penalised]
            metadata.penalties = PenaltyRows(
                rows=np.array([index[s.req_id] for s in penalised], dtype=np.int64),
                histories=[s.history for s in penalised if s.history is not None],
                repetition=np.array([p.repetition_penalty for p in params], dtype=np.float32),
                frequency=np.array([p.frequency_penalty for p in params], dtype=np.float32),
                presence=np.array([p.presence_penalty for p in params], dtype=np.float32),
            )
        biased = [(index[r], *bias) for r, bias in self._biased.items() if r in index]
        if biased:
            metadata.bias = _edits(biased)
        metadata.allowed = {index[r]: ids for r, ids in self._allowed.items() if r in index}
        banned = [
            (index[r], ids, ids)
            for r, ids in self.min_tokens_stop_ids.items()
            if r in index and r not in may_stop and self._is_short(r)
        ]
        for req_id, state in self._bad_words.items():
            if req_id in index:
                ids = banned_by_bad_words(
                    state.sampling_params.bad_words_token_ids or [], state.output_token_ids
                )
                if ids.size:
                    banned.append((index[req_id], ids, ids))
        if banned:
            metadata.banned = _edits(banned)

    def _is_short(self, req_id: str) -> bool:
        row = self.req_id_to_index[req_id]
        return bool(self.num_tokens[row] - self.num_prompt[row] < self.min_tokens[row])


@dataclass(slots=True, frozen=True)
class _Summary:
    """What any row of the batch uses; kept until the batch changes."""

    random: bool
    top_k: bool
    top_p: bool
    min_p: bool
    logprobs: bool
    sparse: bool

    @property
    def plain(self) -> bool:
        return not (self.random or self.logprobs or self.sparse)


def _edits(parts: list[tuple[int, np.ndarray, np.ndarray]]) -> TokenEdits:
    return TokenEdits(
        rows=np.repeat([row for row, _, _ in parts], [ids.size for _, ids, _ in parts]),
        token_ids=np.concatenate([ids for _, ids, _ in parts]),
        values=np.concatenate([values for _, _, values in parts]).astype(np.float32),
    )


def _stop_token_ids(params: SamplingParams) -> np.ndarray:
    """Tokens that would end the request: what ``min_tokens`` forbids for a while."""
    ids = set(params.all_stop_token_ids)
    ids.update(params.stop_token_ids or ())
    if params.eos_token_id is not None and not params.ignore_eos:
        ids.add(params.eos_token_id)
    return np.array(sorted(ids), dtype=np.int64)


def banned_by_bad_words(bad_words: list[list[int]], output_token_ids: list[int]) -> np.ndarray:
    """Tokens (int64) that would complete a bad word after ``output_token_ids``."""
    banned = {
        word[-1]
        for word in bad_words
        if len(word) == 1 or output_token_ids[-(len(word) - 1) :] == word[:-1]
    }
    return np.array(sorted(banned), dtype=np.int64) if banned else _NO_EDITS
