"""Parsers of answers by name: our own are imported when first asked for, plug-ins add theirs.

What ``ToolParserManager`` and ``ReasoningParserManager`` share. Imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

from vllm.errors import ConfigError

__all__ = ["ParserManager"]


def _load(path: str) -> type[Any]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


class ParserManager:
    """A registry with vLLM's names for plug-ins. Subclasses say of what."""

    kind: ClassVar[str]
    """As messages call one of them."""
    option: ClassVar[str]
    """Which names one of them."""
    base: ClassVar[str]
    """What they derive from, as "module:Class"."""
    _lazy: ClassVar[dict[str, str]]
    """Name -> "module:Class" of those that are imported when asked for."""
    _classes: ClassVar[dict[str, type[Any]]]

    @classmethod
    def check(cls, name: str) -> None:
        """Raises ConfigError where nobody has registered ``name``."""
        if name not in cls.list_registered():
            raise ConfigError(
                f"{cls.option}: no parser named {name!r}; there are "
                f"{', '.join(cls.list_registered())}",
                parameter=cls.option,
                value=name,
            )

    @classmethod
    def _get(cls, name: str) -> type[Any]:
        cls.check(name)
        if name not in cls._classes:
            cls._classes[name] = _load(cls._lazy[name])
        return cls._classes[name]

    @classmethod
    def list_registered(cls) -> list[str]:
        return sorted({*cls._lazy, *cls._classes})

    @classmethod
    def register_module(
        cls,
        name: str | list[str] | None = None,
        force: bool = True,
        module: type[Any] | None = None,
    ) -> Any:
        """Register ``module`` as ``name``, or decorate a class so: ``@register_module("mine")``.

        Raises:
            KeyError: the name is taken and ``force`` is off.
            TypeError: the class does not derive from ``base``.
        """
        base = _load(cls.base)

        def register(parser: type[Any]) -> type[Any]:
            if not (isinstance(parser, type) and issubclass(parser, base)):
                raise TypeError(f"{parser!r} must derive from {base.__name__}")
            names = [name] if isinstance(name, str) else name or [parser.__name__]
            for each in names:
                if not force and each in cls.list_registered():
                    raise KeyError(f"a {cls.kind} named {each!r} is registered already")
                cls._classes[each] = parser
            return parser

        return register if module is None else register(module)

    @classmethod
    def register_lazy_module(cls, name: str, module_path: str, class_name: str) -> None:
        """Register a class that is imported when first asked for."""
        cls._lazy[name] = f"{module_path}:{class_name}"
