"""Log-probabilities in OpenAI's two forms, as plain data."""

from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.openai.serving_engine import TokenNames, finite_logprob
from vllm.logprobs import Logprob

__all__ = ["chat_logprobs", "completion_logprobs"]

Position = dict[int, Logprob]


def _entry(name: str, logprob: float) -> dict[str, Any]:
    return {
        "token": name,
        "logprob": finite_logprob(logprob),
        "bytes": list(name.encode("utf-8", errors="replace")),
    }


def chat_logprobs(
    token_ids: Sequence[int], positions: Sequence[Position], num_top: int, names: TokenNames
) -> list[dict[str, Any]]:
    """One entry per token, with its ``num_top`` best rivals (-1: all there are), best first."""
    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        chosen = position[token_id]
        best = sorted(position.items(), key=lambda item: -item[1].logprob)
        best = best if num_top == -1 else best[:num_top]
        content.append(
            {
                **_entry(names.name(token_id, chosen), chosen.logprob),
                "top_logprobs": [
                    _entry(names.name(other, entry), entry.logprob) for other, entry in best
                ],
            }
        )
    return content


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[Position | None],
    names: TokenNames,
    first_offset: int = 0,
    token_text: dict[int, str] | None = None,
) -> dict[str, list[Any]]:
    """Four lists of one entry per token.

    Args:
        positions: None at a position without a predecessor, the first of a prompt.
        first_offset: characters before the first token in the answer's text.
        token_text: texts of tokens at positions that are None.
    """
    offsets: list[int] = []
    logprobs: list[float | None] = []
    tokens: list[str] = []
    top: list[dict[str, float] | None] = []
    offset = first_offset
    for token_id, position in zip(token_ids, positions, strict=True):
        if position is None:
            chosen = Logprob(0.0, None, (token_text or {}).get(token_id))
            logprobs.append(None)
            top.append(None)
        else:
            chosen = position[token_id]
            logprobs.append(finite_logprob(chosen.logprob))
            best: dict[str, float] = {}
            for other, entry in position.items():
                # Two tokens may have one text; the first, which is the likelier, keeps it.
                best.setdefault(names.name(other, entry), finite_logprob(entry.logprob))
            top.append(best)
        name = names.name(token_id, chosen)
        tokens.append(name)
        offsets.append(offset)
        offset += len(chosen.decoded_token or "")
    return {
        "text_offset": offsets,
        "token_logprobs": logprobs,
        "tokens": tokens,
        "top_logprobs": top,
    }
