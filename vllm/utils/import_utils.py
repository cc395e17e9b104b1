"""Classes that an option names by dotted path."""

from importlib import import_module
from typing import Any

from vllm.errors import ConfigError

__all__ = ["import_class"]


def import_class(path: str, option: str) -> type[Any]:
    """The class at ``module.Class`` or ``module:Class``.

    Args:
        option: what the user set, for the error.

    Raises:
        ConfigError: there is no such class.
    """
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{option} {path} cannot be imported ({error}); give module.Class",
            parameter=option.removeprefix("--").replace("-", "_"),
            value=path,
        ) from error
    if not isinstance(found, type):
        raise ConfigError(
            f"{option} {path} is no class; give module.Class",
            parameter=option.removeprefix("--").replace("-", "_"),
            value=path,
        )
    return found
