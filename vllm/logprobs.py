"""Log-probabilities as users see them."""

from dataclasses import dataclass

__all__ = ["Logprob", "PromptLogprobs", "SampleLogprobs"]


@dataclass(slots=True)
class Logprob:
    """One token's log-probability at one position.

    ``rank`` counts from 1 over the whole vocabulary; ``decoded_token`` is None where the
    request asked for no detokenisation.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# Per generated position: token id -> Logprob (the sampled token and the top ones).
SampleLogprobs = list[dict[int, Logprob]]
# Per prompt position; the first has no predecessor and is None.
PromptLogprobs = list[dict[int, Logprob] | None]
