"""How much a test does. Where tests marked slow run too, the others take their time as well."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")
_is_thorough = False


def set_thorough(value: bool) -> None:
    """Once, before any test's module is imported."""
    global _is_thorough
    _is_thorough = value


def by_effort(quick: T, thorough: T) -> T:
    """``quick`` where slow tests are left out, as in ``make test``; else ``thorough``."""
    return thorough if _is_thorough else quick
