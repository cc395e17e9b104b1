"""One definition of an option: name, kind, default, limits, help.

The command line, ``EngineArgs`` and the keyword arguments of ``LLM`` are all read from the same
``Flag``. Knows nothing of which options there are.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

from vllm.errors import ConfigError, UnsupportedError

__all__ = [
    "Flag",
    "Kind",
    "NotYet",
    "arg",
    "dash",
    "flags_of",
    "nearest",
    "parse_size",
]

_METADATA_KEY = "flag"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)(i?)[bB]?")
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class Kind(Enum):
    """How the text of an option becomes a value."""

    STR = "text"
    INT = "a whole number"
    SIZE = "a whole number such as 8192, 8k, 8K (k = 1000, K = 1024)"
    FLOAT = "a number"
    SWITCH = "a switch"
    JSON = "a JSON object"
    LIST = "one or more values"
    JSON_LIST = "a JSON list"
    APPEND = "a value; the option may come several times"


_LISTS = (Kind.LIST, Kind.JSON_LIST, Kind.APPEND)


def _is_plain(text: str) -> bool:
    # An argument that is no UTF-8 arrives with lone surrogates in the place of its bytes.
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in text)


def dash(name: str) -> str:
    """The option of the field ``name``: ``max_model_len`` is ``--max-model-len``."""
    return "--" + name.replace("_", "-")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The entry of ``known`` that ``name`` was most likely meant to be."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def parse_size(text: str) -> int:
    """A whole number with a unit: lower-case k, m, g, t are decimal, upper-case or "i" binary.

    >>> parse_size("8k"), parse_size("8K"), parse_size("2GiB")
    (8000, 8192, 2147483648)

    Raises:
        ValueError: ``text`` is no such number, or not whole.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    number, unit, binary = match.groups()
    if binary and not unit:
        raise ValueError(text)
    table = _BINARY if unit and (binary or unit.isupper()) else _DECIMAL
    value = (float(number) if "." in number else int(number)) * table[unit.lower()]
    if value != int(value):
        raise ValueError(text)
    return int(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """An option that this engine has."""

    name: str
    """With underscores; also the field of ``EngineArgs`` and the keyword of ``LLM``."""
    kind: Kind
    default: Any
    group: str
    help: str
    short: str | None = None
    """Such as ``-tp``."""
    choices: tuple[str, ...] | None = None
    later: tuple[str, ...] = ()
    """Choices that vLLM has and this engine does not have yet."""
    minimum: float | None = None
    maximum: float | None = None
    words: tuple[tuple[str, Any], ...] = ()
    """Words that stand for a value, such as ("auto", -1); their values pass the limits."""

    @property
    def option(self) -> str:
        return dash(self.name)

    def parse(self, text: str) -> Any:
        """The value that ``text`` from the command line stands for.

        Raises:
            ConfigError: ``text`` is not of this kind, or outside the limits.
        """
        for word, value in self.words:
            if text.lower() == word:
                return value
        try:
            value = self._convert(text)
        except ValueError:
            raise ConfigError(
                f"{self.option} takes {self._expected()}, not {text!r}",
                parameter=self.name,
                value=text,
            ) from None
        return self.check(value)

    def _convert(self, text: str) -> Any:
        if self.kind is Kind.INT:
            return int(text)
        if self.kind is Kind.SIZE:
            return int(text) if text.lstrip("-").isdigit() else parse_size(text)
        if self.kind is Kind.FLOAT:
            return float(text)
        if self.kind in (Kind.JSON, Kind.JSON_LIST):
            value = json.loads(text)
            if not isinstance(value, dict if self.kind is Kind.JSON else list):
                raise ValueError(text)
            return value
        return text

    def check(self, value: Any) -> Any:
        """``value``, checked against type and limits (keyword arguments come here unparsed).

        Raises:
            ConfigError: of another type, not among the choices, or outside the limits.
        """
        if value is None and self.default is None:
            return value
        if any(value == special and type(value) is type(special) for _, special in self.words):
            return value
        if self.kind is Kind.SIZE and isinstance(value, str):
            return self.parse(value)
        if not self._has_type(value):
            raise ConfigError(
                f"{self.option} takes {self._expected()}, not {value!r}",
                parameter=self.name,
                value=value,
            )
        items = value if self.kind in _LISTS else (value,)
        for item in items:
            self._check_text(item)
            if item in self.later:
                raise UnsupportedError(
                    f"{self.option} {item}: vLLM has this; this engine does not yet "
                    f"(accepted: {', '.join(self.choices or ())})",
                    parameter=self.name,
                    value=item,
                )
            if self.choices is not None and item not in self.choices:
                raise ConfigError(
                    f"{self.option} must be one of {', '.join(self.choices)}, not {item!r}",
                    parameter=self.name,
                    value=item,
                )
        if self.kind in (Kind.INT, Kind.SIZE, Kind.FLOAT):
            self._check_limits(value)
        return value

    def _check_text(self, value: Any) -> None:
        """Lists hold text, and text can be sent: answers, logs and messages are UTF-8."""
        if self.kind in _LISTS and not isinstance(value, str):
            raise ConfigError(
                f"{self.option} takes {self._expected()}, each of them text, not {value!r}",
                parameter=self.name,
                value=value,
            )
        if isinstance(value, str) and not _is_plain(value):
            raise ConfigError(
                f"{self.option} takes text in UTF-8 without NUL characters, not {value!a}",
                parameter=self.name,
                value=value,
            )

    def _check_limits(self, value: float) -> None:
        low = self.minimum is not None and value < self.minimum
        high = self.maximum is not None and value > self.maximum
        if not (low or high or math.isnan(value) or math.isinf(value)):
            return
        if self.minimum is not None and self.maximum is not None:
            limits = f"between {self.minimum} and {self.maximum}"
        elif self.minimum is not None:
            limits = f"at least {self.minimum}"
        elif self.maximum is not None:
            limits = f"at most {self.maximum}"
        else:
            limits = "finite"
        words = "".join(f", or {word}" for word, _ in self.words)
        raise ConfigError(
            f"{self.option} must be {limits}{words}, not {value}",
            parameter=self.name,
            value=value,
        )

    def _has_type(self, value: Any) -> bool:
        if self.kind is Kind.SWITCH:
            return isinstance(value, bool)
        if self.kind in (Kind.INT, Kind.SIZE):
            return isinstance(value, int) and not isinstance(value, bool)
        if self.kind is Kind.FLOAT:
            return isinstance(value, int | float) and not isinstance(value, bool)
        if self.kind is Kind.JSON:
            return isinstance(value, dict)
        if self.kind is Kind.STR:
            return isinstance(value, str)
        return isinstance(value, list | tuple)

    def _expected(self) -> str:
        words = "".join(f", or {word}" for word, _ in self.words)
        return f"{self.kind.value}{words}"


def arg(
    default: Any,
    group: str,
    kind: Kind,
    help: str,
    *,
    short: str | None = None,
    choices: tuple[str, ...] | None = None,
    later: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    words: tuple[tuple[str, Any], ...] = (),
) -> Any:
    """A dataclass field that is also a flag; the field's name is the flag's."""
    details = {
        "group": group,
        "kind": kind,
        "help": help,
        "short": short,
        "choices": choices,
        "later": later,
        "minimum": minimum,
        "maximum": maximum,
        "words": words,
    }
    if isinstance(default, dict | list):
        factory = type(default)
        values = default
        return dataclasses.field(
            default_factory=lambda: factory(values), metadata={_METADATA_KEY: details}
        )
    return dataclasses.field(default=default, metadata={_METADATA_KEY: details})


_flags_by_class: dict[type, Mapping[str, Flag]] = {}


def flags_of(cls: type) -> Mapping[str, Flag]:
    """The flags that the fields of the dataclass ``cls`` define, by field name."""
    if cls in _flags_by_class:
        return _flags_by_class[cls]
    flags = {}
    for field in dataclasses.fields(cls):
        if _METADATA_KEY not in field.metadata:
            continue
        default = (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        flags[field.name] = Flag(name=field.name, default=default, **field.metadata[_METADATA_KEY])
    _flags_by_class[cls] = MappingProxyType(flags)
    return _flags_by_class[cls]


@dataclass(frozen=True, slots=True, kw_only=True)
class NotYet:
    """An option that vLLM has and this engine does not have yet."""

    name: str
    group: str
    takes_value: bool
    """False for a switch."""
    off: tuple[str, ...] = ()
    """Values, as text, that ask for nothing this engine lacks; for a switch, such spellings."""
    short: str | None = None
    off_at_zero: bool = False
    """Whether a JSON object of zeros alone asks for nothing, too."""

    @property
    def option(self) -> str:
        return dash(self.name)

    def refusal(self, spelling: str | None = None) -> UnsupportedError:
        """The error that refuses this option, under the spelling the user chose."""
        name = spelling or self.option
        works = f" (accepted: {', '.join(self.off)})" if self.off else ""
        return UnsupportedError(
            f"{name}: vLLM has this; this engine does not yet{works}", parameter=self.name
        )

    def is_off(self, value: Any) -> bool:
        """Whether ``value`` (text, or a Python value given to ``LLM``) asks for nothing."""
        if not self.takes_value:
            spelling = self.option if value else "--no-" + self.option[2:]
            return value is None or spelling in self.off
        if value is None or value == "":
            return True
        if isinstance(value, dict | list | tuple) and not value:
            return True
        if self.off_at_zero and _all_zero(value):
            return True
        return str(value).lower() in self.off


def _all_zero(value: Any) -> bool:
    """Whether ``value``, a dictionary or JSON text, is zero or maps names to nothing but zeros."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    if isinstance(value, dict):
        return all(map(_all_zero, value.values()))
    return type(value) is int and value == 0
