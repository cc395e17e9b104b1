"""Token ids to text, a few at a time, and the search for stop strings in that text.

Owns what has been shown of one sequence's text. Knows nothing of requests' batching, of processes
or of log-probabilities.
"""

from collections.abc import Callable, Sequence
from typing import Any

from vllm.sampling_params import SamplingParams

__all__ = ["IncrementalDetokenizer", "TextStream", "find_stop", "token_decoder"]

_REPLACEMENT = "�"
# A UTF-8 character has at most four bytes and so at most four tokens; a run that is still not
# valid after this many never will be.
_MAX_PENDING_TOKENS = 16
# Tokens of the prompt that are decoded with the first new one, so that it keeps its leading space.
_NUM_CONTEXT_TOKENS = 6

DecodeFn = Callable[[Sequence[int]], str]


def token_decoder(tokenizer: Any, skip_special_tokens: bool) -> DecodeFn:
    """The cheapest ``ids -> text`` of ``tokenizer``; no clean-up of spaces, which would change
    text already shown."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        decode = backend.decode
        return lambda ids: decode(ids, skip_special_tokens=skip_special_tokens)
    return lambda ids: tokenizer.decode(
        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


class TextStream:
    """Text of a growing token sequence; what ``push`` has returned never changes.

    Each new token is decoded after the tokens shown before it, since both the leading space and
    multi-byte characters depend on neighbours; text that ends within a character is held back.
    (``tokenizers.DecodeStream`` does the same in half the time, 0.7 against 1.6 us a token, but
    it raises when a prompt ends within a character and cannot give out what it holds at the end.)
    """

    def __init__(self, decode: DecodeFn, context_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._context = list(context_ids)
        self._context_text = decode(self._context) if self._context else ""
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes, perhaps empty."""
        pending = self._pending
        pending.append(token_id)
        text = self._decode(self._context + pending)
        if text.endswith(_REPLACEMENT) and len(pending) < _MAX_PENDING_TOKENS:
            return ""
        new_text = self._after_context(text)
        if not new_text:
            if len(pending) >= _MAX_PENDING_TOKENS:
                pending.clear()
            return ""
        self._context = pending
        self._context_text = self._decode(pending)
        self._pending = []
        return new_text

    def flush(self) -> str:
        """What was held back, with U+FFFD for bytes that make no character."""
        if not self._pending:
            return ""
        text = self._after_context(self._decode(self._context + self._pending))
        self._context, self._context_text, self._pending = [], "", []
        return text

    def _after_context(self, text: str) -> str:
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # The context ended within a character, which the new token has completed.
        pairs = enumerate(zip(text, self._context_text, strict=False))
        return text[next((i for i, (a, b) in pairs if a != b), len(text)) :]


def find_stop(text: str, num_new_chars: int, stop: Sequence[str]) -> tuple[str, int] | None:
    """The stop string that begins first in ``text`` and where it begins.

    Only matches that end within the last ``num_new_chars`` are looked for; of two that begin at
    the same place the longer wins.
    """
    best: tuple[str, int] | None = None
    for candidate in stop:
        start = max(0, len(text) - num_new_chars - len(candidate) + 1)
        index = text.find(candidate, start)
        if index == -1:
            continue
        if best is None or (index, -len(candidate)) < (best[1], -len(best[0])):
            best = (candidate, index)
    return best


class IncrementalDetokenizer:
    """Text and token ids of one sequence.

    ``tokenizer`` None, or ``detokenize=False``, leaves the text empty and only keeps the ids.
    """

    def __init__(
        self, tokenizer: Any, params: SamplingParams, prompt_token_ids: Sequence[int]
    ) -> None:
        self.token_ids: list[int] = []
        self._text = ""
        # What comes after it, put together when somebody looks.
        self._pieces: list[str] = []
        self._num_sent_chars = 0
        self._num_sent_tokens = 0
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output
        stop = params.stop or []
        self._stop: Sequence[str] = [stop] if isinstance(stop, str) else stop
        self._stream: TextStream | None = None
        if tokenizer is not None and params.detokenize:
            self._stream = TextStream(
                token_decoder(tokenizer, params.skip_special_tokens),
                prompt_token_ids[-_NUM_CONTEXT_TOKENS:],
            )

    @property
    def output_text(self) -> str:
        """The text so far; where there are no stop strings, without what was shown as a delta."""
        if self._pieces:
            self._text = "".join((self._text, *self._pieces))
            self._pieces.clear()
        return self._text

    def update(
        self, new_token_ids: Sequence[int], finished: bool, by_stop_token: bool
    ) -> str | None:
        """Take in new tokens; returns the stop string that ends the sequence, if one does.

        ``finished``: the engine has ended the sequence; ``by_stop_token``: with the last of these
        tokens, whose text is then left out unless the request includes stop strings.
        """
        stream = self._stream
        if stream is None:
            self.token_ids.extend(new_token_ids)
            return None
        last = len(new_token_ids) - 1
        for i, token_id in enumerate(new_token_ids):
            self.token_ids.append(token_id)
            if by_stop_token and i == last and not self._include_stop:
                break
            stopped = self._append_text(stream.push(token_id))
            if stopped is not None:
                return stopped
        return self._append_text(stream.flush()) if finished else None

    def _append_text(self, text: str) -> str | None:
        if not text:
            return None
        self._pieces.append(text)
        if not self._stop or len(self.token_ids) <= self._min_tokens:
            return None
        match = find_stop(self.output_text, len(text), self._stop)
        if match is None:
            return None
        stop, index = match
        end = index + len(stop) if self._include_stop else index
        self._text = self.output_text[:end]
        return stop

    def _num_held_chars(self) -> int:
        """How much of the text's end may turn out to be the beginning of a stop string."""
        if self._include_stop:
            return 0
        text = self.output_text
        held = 0
        for stop in self._stop:
            # The longest end of the text that may begin ``stop``, and is longer than ``held``.
            tail = text[-(len(stop) - 1) :] if len(stop) > 1 else ""
            index = tail.find(stop[0])
            while index != -1 and len(tail) - index > held:
                if stop.startswith(tail[index:]):
                    held = len(tail) - index
                    break
                index = tail.find(stop[0], index + 1)
        return held

    def take_text(self, finished: bool, delta: bool) -> str:
        """Text to show: all of it, or with ``delta`` what was not shown before."""
        if delta and not self._stop:
            text = "".join(self._pieces)
            self._pieces.clear()
            return text
        end = len(self.output_text)
        if not finished:
            end -= self._num_held_chars()
        if not delta:
            return self.output_text[:end]
        start = self._num_sent_chars
        if end <= start:
            return ""
        self._num_sent_chars = end
        return self.output_text[start:end]

    def take_token_ids(self, delta: bool) -> list[int]:
        """Ids to show: all of them, or with ``delta`` those not shown before."""
        if not delta:
            return list(self.token_ids)
        start = self._num_sent_tokens
        self._num_sent_tokens = len(self.token_ids)
        return self.token_ids[start:]
