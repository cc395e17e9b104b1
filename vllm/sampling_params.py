"""How one request is sampled: the fields users set, and the checks on them.

Knows nothing of models or tokenizers; what needs a vocabulary (stop token ids of the model,
bad words as token ids) is filled in by the input processor. No torch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from enum import Enum, IntEnum
from typing import Any

import msgspec

from vllm.errors import UnsupportedError, VLLMValidationError

__all__ = [
    "BeamSearchParams",
    "RequestOutputKind",
    "SamplingParams",
    "SamplingType",
    "StructuredOutputsParams",
]

_SAMPLING_EPS = 1e-5
_MAX_N = 16_384
_INT64 = 1 << 63
# Beyond this a bias forbids or forces a token already, whatever the model says.
_MAX_BIAS = 100.0
# Logits are divided by it; below, a quotient may be infinite in fp32.
_LEAST_PENALTY = 1e-30
# Stop strings and bad words are looked for after every token, so their number is bounded.
_MAX_STRINGS = 4096
_MAX_CHARACTERS = 32_768


def _refuse(name: str, value: object, wanted: str) -> VLLMValidationError:
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return VLLMValidationError(f"{name} must be {wanted}, not {shown}", parameter=name, value=value)


def _integer(name: str, value: Any, minimum: int, maximum: int, wanted: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise _refuse(name, value, wanted)
    value = value.__index__()
    if not minimum <= value <= maximum:
        raise _refuse(name, value, wanted)
    return value


def _number(name: str, value: Any, allowed: Callable[[float], bool], wanted: str) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise _refuse(name, value, wanted)
    number = float(value)
    if not math.isfinite(number) or not allowed(number):
        raise _refuse(name, value, wanted)
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(name, value, "true or false")
    return value


def _strings(name: str, value: Any) -> list[str]:
    """A string alone counts as a list of one."""
    items = [value] if isinstance(value, str) else value
    wanted = "a string or a list of strings, none of them empty"
    if isinstance(items, Mapping) or not isinstance(items, Iterable):
        raise _refuse(name, value, wanted)
    items = list(items)
    if not all(isinstance(item, str) and item for item in items):
        raise _refuse(name, value, wanted)
    if not all(map(_is_text, items)):
        raise _refuse(name, value, "valid Unicode text, without lone surrogates")
    return items


def _is_text(value: str) -> bool:
    """Whether ``value`` can be sent; a Python string may hold halves of characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _few_strings(name: str, value: Any) -> list[str]:
    """As ``_strings``, for strings whose search costs time at every token."""
    items = _strings(name, value)
    num_characters = sum(map(len, items))
    if len(items) > _MAX_STRINGS or num_characters > _MAX_CHARACTERS:
        raise VLLMValidationError(
            f"{name} must be at most {_MAX_STRINGS} strings of {_MAX_CHARACTERS} characters in "
            f"all, not {len(items)} strings of {num_characters}",
            parameter=name,
        )
    return items


def _token_ids(name: str, value: Any) -> list[int]:
    wanted = "a list of token ids, whole numbers from 0"
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _refuse(name, value, wanted)
    return [_integer(name, item, 0, _INT64 - 1, wanted) for item in value]


class SamplingType(IntEnum):
    GREEDY = 0
    RANDOM = 1
    RANDOM_SEED = 2


class RequestOutputKind(Enum):
    """CUMULATIVE: an output holds all so far. DELTA: only what is new. FINAL_ONLY: one output."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class StructuredOutputsParams(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A constraint on the output; exactly one of the first six is set."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _CONSTRAINTS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise VLLMValidationError(
                f"structured_outputs needs exactly one of {', '.join(_CONSTRAINTS)}; "
                + (f"it has {' and '.join(given)}" if given else "it has none"),
                parameter="structured_outputs",
            )
        if self.json is not None and not isinstance(self.json, (str, dict)):
            raise _refuse("structured_outputs.json", self.json, "a JSON schema")
        for name in ("regex", "grammar", "structural_tag"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise _refuse(f"structured_outputs.{name}", value, "a string that is not empty")
        if self.choice is not None:
            self.choice = _strings("structured_outputs.choice", self.choice)
            if not self.choice:
                raise _refuse("structured_outputs.choice", [], "a list of at least one string")
        _flag("structured_outputs.disable_any_whitespace", self.disable_any_whitespace)
        if self.whitespace_pattern is not None:
            raise UnsupportedError(
                "structured_outputs.whitespace_pattern is not available; "
                "disable_any_whitespace leaves out all optional whitespace",
                parameter="structured_outputs",
            )


_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


class BeamSearchParams(msgspec.Struct, kw_only=True):
    """Parameters of ``LLM.beam_search``.

    Raises:
        VLLMValidationError: naming the field.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        self.beam_width = _integer(
            "beam_width", self.beam_width, 1, _MAX_N, "a whole number of at least 1"
        )
        self.max_tokens = _integer(
            "max_tokens", self.max_tokens, 1, _INT64 - 1, "a whole number of at least 1"
        )
        self.temperature = _number(
            "temperature", self.temperature, lambda x: x >= 0, "a number of at least 0"
        )
        self.length_penalty = _number(
            "length_penalty", self.length_penalty, lambda x: True, "a finite number"
        )
        _flag("ignore_eos", self.ignore_eos)
        _flag("include_stop_str_in_output", self.include_stop_str_in_output)


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True, dict=False):
    """Sampling parameters of one request; names and defaults are vLLM's.

    Values are checked and brought to one form when the object is made: ``stop`` and ``bad_words``
    become lists, ``top_k`` -1 becomes 0, ``seed`` -1 becomes None, ``logprobs`` True becomes 1, a
    ``logit_bias`` beyond 100 becomes 100, and a greedy request (temperature below 1e-5) loses its
    top-k, top-p and min-p, which could not change it.

    Raises:
        VLLMValidationError: naming the field and what would work.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None
    truncate_prompt_tokens: int | None = None
    skip_reading_prefix_cache: bool | None = None
    stream_interval: int | None = None

    # Filled in by the input processor; not for users.
    eos_token_id: int | None = None
    all_stop_token_ids: list[int] = []
    bad_words_token_ids: list[list[int]] | None = None
    output_text_buffer_length: int = 0

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lengths()
        self._check_lists()
        self._check_rest()
        if self.temperature < _SAMPLING_EPS:
            self.temperature, self.top_p, self.top_k, self.min_p = 0.0, 1.0, 0, 0.0

    def _check_numbers(self) -> None:
        self.n = _integer("n", self.n, 1, _MAX_N, f"a whole number from 1 to {_MAX_N}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = _number(
                name, getattr(self, name), lambda x: -2 <= x <= 2, "a number from -2 to 2"
            )
            setattr(self, name, value)
        self.repetition_penalty = _number(
            "repetition_penalty",
            self.repetition_penalty,
            lambda x: x >= _LEAST_PENALTY,
            f"a number above 0, at least {_LEAST_PENALTY}",
        )
        self.temperature = _number(
            "temperature", self.temperature, lambda x: x >= 0, "a number of at least 0"
        )
        self.top_p = _number(
            "top_p", self.top_p, lambda x: 0 < x <= 1, "a number above 0 and at most 1"
        )
        self.top_k = max(
            0,
            _integer("top_k", self.top_k, -1, _INT64 - 1, "a whole number: 0 or -1 for all tokens"),
        )
        self.min_p = _number("min_p", self.min_p, lambda x: 0 <= x <= 1, "a number from 0 to 1")
        if self.seed is not None:
            self.seed = _integer(
                "seed", self.seed, -_INT64, _INT64 - 1, "a whole number of 64 bits, or null"
            )
            if self.seed == -1:
                self.seed = None

    def _check_lengths(self) -> None:
        if self.max_tokens is not None:
            self.max_tokens = _integer(
                "max_tokens", self.max_tokens, 1, _INT64 - 1, "a whole number of at least 1"
            )
        self.min_tokens = _integer(
            "min_tokens", self.min_tokens, 0, _INT64 - 1, "a whole number of at least 0"
        )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise VLLMValidationError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, not {self.min_tokens}",
                parameter="min_tokens",
                value=self.min_tokens,
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is None or value is False:
                setattr(self, name, None)
            elif value is True:
                setattr(self, name, 1)
            else:
                wanted = "a whole number of at least 0, or -1 for the whole vocabulary"
                setattr(self, name, _integer(name, value, -1, _INT64 - 1, wanted))
        if self.truncate_prompt_tokens is not None:
            wanted = "a whole number of at least 1, or -1 for the model's context"
            limit = _integer(
                "truncate_prompt_tokens", self.truncate_prompt_tokens, -1, _INT64 - 1, wanted
            )
            if limit == 0:
                raise _refuse("truncate_prompt_tokens", limit, wanted)
            self.truncate_prompt_tokens = limit
        if self.stream_interval is not None:
            self.stream_interval = _integer(
                "stream_interval", self.stream_interval, 1, _INT64 - 1, "a whole number from 1"
            )

    def _check_lists(self) -> None:
        self.stop = [] if self.stop is None else _few_strings("stop", self.stop)
        if self.stop and not self.detokenize:
            raise VLLMValidationError(
                "stop strings need detokenize=True; use stop_token_ids without it",
                parameter="stop",
            )
        for name in ("stop_token_ids", "allowed_token_ids"):
            if getattr(self, name) is not None:
                setattr(self, name, _token_ids(name, getattr(self, name)))
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise _refuse("allowed_token_ids", [], "null or a list of at least one token id")
            self.allowed_token_ids = list(dict.fromkeys(self.allowed_token_ids))
        if self.bad_words is not None:
            self.bad_words = _few_strings("bad_words", self.bad_words)
        if self.logit_bias is not None:
            self.logit_bias = _logit_bias(self.logit_bias)

    def _check_rest(self) -> None:
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
        ):
            _flag(name, getattr(self, name))
        if self.skip_reading_prefix_cache is not None:
            _flag("skip_reading_prefix_cache", self.skip_reading_prefix_cache)
            if self.prompt_logprobs is not None and not self.skip_reading_prefix_cache:
                raise VLLMValidationError(
                    "prompt_logprobs exist only for tokens that are computed: leave out "
                    "skip_reading_prefix_cache, or set it to true",
                    parameter="skip_reading_prefix_cache",
                )
        if not isinstance(self.output_kind, RequestOutputKind):
            raise _refuse("output_kind", self.output_kind, "a RequestOutputKind")
        if isinstance(self.structured_outputs, dict):
            try:
                self.structured_outputs = StructuredOutputsParams(**self.structured_outputs)
            except TypeError as error:
                raise _refuse(
                    "structured_outputs", self.structured_outputs, f"known fields ({error})"
                ) from error
        elif not isinstance(self.structured_outputs, (StructuredOutputsParams, type(None))):
            raise _refuse("structured_outputs", self.structured_outputs, "StructuredOutputsParams")
        if self.extra_args is not None and not isinstance(self.extra_args, dict):
            raise _refuse("extra_args", self.extra_args, "a dictionary")

    @classmethod
    def from_optional(cls, **fields: Any) -> SamplingParams:
        """From fields of which any may be None, which then has its default.

        Raises:
            VLLMValidationError: a value cannot be used, or there is no such field.
        """
        unknown = fields.keys() - set(cls.__struct_fields__)
        if unknown:
            name = sorted(unknown)[0]
            raise VLLMValidationError(f"there is no sampling parameter {name!r}", parameter=name)
        return cls(**{name: value for name, value in fields.items() if value is not None})

    def clone(self) -> SamplingParams:
        """A copy that shares nothing that can be changed with this one."""
        return copy.deepcopy(self)

    def update_from_generation_config(
        self, generation_config: Mapping[str, Any], eos_token_id: int | None = None
    ) -> None:
        """Fill in what ends a request: the model's end-of-sequence ids, and ``stop_token_ids``.

        Args:
            generation_config: the model's; its ``eos_token_id`` is one id, a list or absent.
            eos_token_id: the tokenizer's.
        """
        listed = generation_config.get("eos_token_id")
        others = [listed] if isinstance(listed, int) else list(listed or ())
        if eos_token_id is None and others:
            eos_token_id = others[0]
        stop_ids = list(self.stop_token_ids or ())
        if not self.ignore_eos:
            stop_ids += [i for i in others if i != eos_token_id and i not in stop_ids]
        self.stop_token_ids = stop_ids
        self.eos_token_id = eos_token_id
        self.all_stop_token_ids = list(stop_ids)
        if eos_token_id is not None and not self.ignore_eos:
            self.all_stop_token_ids.append(eos_token_id)

    @property
    def sampling_type(self) -> SamplingType:
        if self.temperature < _SAMPLING_EPS:
            return SamplingType.GREEDY
        return SamplingType.RANDOM if self.seed is None else SamplingType.RANDOM_SEED


def _logit_bias(value: Any) -> dict[int, float]:
    wanted = "a map of token id to a number from -100 to 100"
    if not isinstance(value, Mapping):
        raise _refuse("logit_bias", value, wanted)
    bias = {}
    for key, number in value.items():
        if isinstance(key, str) and key.isdecimal() and len(key) <= 18:
            key = int(key)
        token = _integer("logit_bias", key, 0, _INT64 - 1, wanted)
        number = _number("logit_bias", number, lambda x: True, wanted)
        bias[token] = min(_MAX_BIAS, max(-_MAX_BIAS, number))
    return bias
