"""Log-probabilities of one sequence as users see them, from the rows that the engine sends."""

from functools import lru_cache
from typing import Any

from vllm.logprobs import Logprob, PromptLogprobs, SampleLogprobs
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import LogprobsRow

__all__ = ["LogprobsCollector", "TokenText"]


class TokenText:
    """Text of single tokens, remembered: the same few thousand come up again and again."""

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decode = (backend or tokenizer).decode

        @lru_cache(maxsize=65536)
        def text_of(token_id: int) -> str:
            return decode([token_id], skip_special_tokens=False)

        self.text_of = text_of


class LogprobsCollector:
    """Collects rows; all stay None where the request asked for none."""

    def __init__(self, token_text: TokenText | None, params: SamplingParams) -> None:
        self._token_text = token_text if params.detokenize else None
        self.logprobs: SampleLogprobs | None = None if params.logprobs is None else []
        self.prompt_logprobs: PromptLogprobs | None = (
            None if params.prompt_logprobs is None else [None]
        )
        self.cumulative_logprob: float | None = None if params.logprobs is None else 0.0
        self._num_sent = 0

    def add_sampled(self, rows: list[LogprobsRow]) -> None:
        if self.logprobs is None or self.cumulative_logprob is None:
            return
        for row in rows:
            self.logprobs.append(self._position(row))
            self.cumulative_logprob += row.logprobs[0]

    def add_prompt(self, rows: list[LogprobsRow]) -> None:
        if self.prompt_logprobs is not None:
            self.prompt_logprobs.extend(self._position(row) for row in rows)

    def _position(self, row: LogprobsRow) -> dict[int, Logprob]:
        text_of = self._token_text.text_of if self._token_text is not None else None
        position: dict[int, Logprob] = {}
        for i, (token_id, logprob) in enumerate(zip(row.token_ids, row.logprobs, strict=True)):
            # Column 0 is the chosen token with its true rank; the others are ranked in order.
            if token_id not in position:
                position[token_id] = Logprob(
                    logprob,
                    row.rank if i == 0 else i,
                    None if text_of is None else text_of(token_id),
                )
        return position

    def take(self, delta: bool) -> SampleLogprobs | None:
        """Positions to show: all of them, or with ``delta`` those not shown before."""
        if self.logprobs is None:
            return None
        if not delta:
            return list(self.logprobs)
        start = self._num_sent
        self._num_sent = len(self.logprobs)
        return self.logprobs[start:]

    def take_prompt(self, delta: bool) -> PromptLogprobs | None:
        """The prompt's positions; with ``delta`` only the first call gets them."""
        prompt_logprobs = self.prompt_logprobs
        if delta and prompt_logprobs is not None and len(prompt_logprobs) > 0:
            self.prompt_logprobs = []
        return prompt_logprobs
