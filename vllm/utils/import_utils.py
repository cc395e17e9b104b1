"""Classes that an option names by dotted path, Python files that one names, and much at once."""

import contextlib
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from vllm.errors import ConfigError

__all__ = ["import_class", "import_plugin_file", "without_collector"]


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """For the imports of a process of our own: what they make stays, and is never looked through.

    Torch's are 180,000 objects; collections meanwhile take 0.2 s.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


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


def import_plugin_file(path: str, option: str) -> None:
    """Run the Python file ``path``, as a module of its name.

    Args:
        option: what the user set, for the error.

    Raises:
        ConfigError: the file cannot be imported.
    """
    name = os.path.splitext(os.path.basename(path))[0]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{option}: not a Python file: {path}", parameter=option, value=path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError, OSError, AttributeError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{option}: {path} cannot be imported: {error}", parameter=option, value=path
        ) from error
