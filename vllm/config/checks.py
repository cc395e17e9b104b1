"""Checks that the configuration classes make of their own fields, whoever fills them."""

from collections.abc import Sequence
from typing import Any

from vllm.errors import ConfigError

__all__ = ["at_least", "one_of", "within"]


def at_least(config: Any, minimum: int, *names: str) -> None:
    """Each of these fields of ``config`` is None or at least ``minimum``.

    Raises:
        ConfigError: naming the field.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= minimum:
            raise ConfigError(
                f"{name} must be at least {minimum}, not {value!r}", parameter=name, value=value
            )


def within(config: Any, low: float, high: float, *names: str) -> None:
    """Each of these fields of ``config`` lies between ``low`` and ``high``, both included.

    Raises:
        ConfigError: naming the field.
    """
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:
            raise ConfigError(
                f"{name} must be between {low:g} and {high:g}, not {value!r}",
                parameter=name,
                value=value,
            )


def one_of(config: Any, choices: Sequence[str | None], *names: str) -> None:
    """Each of these fields of ``config`` is one of ``choices``.

    Raises:
        ConfigError: naming the field and the choices.
    """
    for name in names:
        value = getattr(config, name)
        if value not in choices:
            allowed = ", ".join(str(choice) for choice in choices)
            raise ConfigError(
                f"{name} must be one of {allowed}, not {value!r}", parameter=name, value=value
            )
