"""Beam search over any function that scores the next tokens of token sequences.

Owns beams and how they are ranked; knows no engine. ``LLM.beam_search`` drives it.
"""

from dataclasses import dataclass, field

from vllm.logprobs import Logprob
from vllm.sampling_params import BeamSearchParams

__all__ = ["BeamSearchOutput", "BeamSearchSequence", "BeamSearchState", "beam_search_score"]


@dataclass(slots=True)
class BeamSearchSequence:
    """One beam; ``tokens`` begins with the prompt."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The best beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


def beam_search_score(
    tokens: list[int], cum_logprob: float, eos_token_id: int | None, length_penalty: float = 1.0
) -> float:
    """``cum_logprob / length ** length_penalty``; an end-of-sequence token doesn't count."""
    length = len(tokens) - (1 if tokens and tokens[-1] == eos_token_id else 0)
    return cum_logprob / max(length, 1) ** length_penalty


class BeamSearchState:
    """The beams of one prompt."""

    def __init__(
        self, prompt_token_ids: list[int], params: BeamSearchParams, eos_token_id: int | None
    ) -> None:
        self._params = params
        self._eos_token_id = eos_token_id
        self._num_prompt_tokens = len(prompt_token_ids)
        self._completed: list[BeamSearchSequence] = []
        self.beams = [BeamSearchSequence(list(prompt_token_ids))]
        """Beams that still grow."""

    def advance(self, next_tokens: list[dict[int, Logprob]]) -> None:
        """Grow each beam by each of its candidates and keep the best.

        Args:
            next_tokens: per beam the candidates' log-probabilities, at least ``2 * beam_width``
                of them, so that beams remain where all the best end the sequence.
        """
        grown: list[BeamSearchSequence] = []
        for beam, candidates in zip(self.beams, next_tokens, strict=True):
            for token_id, logprob in candidates.items():
                sequence = BeamSearchSequence(
                    tokens=[*beam.tokens, token_id],
                    logprobs=[*beam.logprobs, candidates],
                    cum_logprob=beam.cum_logprob + logprob.logprob,
                )
                if token_id == self._eos_token_id and not self._params.ignore_eos:
                    sequence.finish_reason = "stop"
                    sequence.stop_reason = self._eos_token_id
                    self._completed.append(sequence)
                else:
                    grown.append(sequence)
        grown.sort(key=lambda sequence: sequence.cum_logprob, reverse=True)
        self.beams = grown[: self._params.beam_width]

    def best(self) -> list[BeamSearchSequence]:
        """The best ``beam_width`` sequences, ended or not, best first."""
        for beam in self.beams:
            beam.finish_reason = "length"
        return sorted(
            self._completed + self.beams,
            key=lambda sequence: beam_search_score(
                sequence.tokens,
                sequence.cum_logprob,
                self._eos_token_id,
                self._params.length_penalty,
            ),
            reverse=True,
        )[: self._params.beam_width]

    def output_ids(self, sequence: BeamSearchSequence) -> list[int]:
        """Generated ids to show: without the end-of-sequence token unless stops are included."""
        ids = sequence.tokens[self._num_prompt_tokens :]
        hide = sequence.finish_reason == "stop" and not self._params.include_stop_str_in_output
        return ids[:-1] if hide else ids
