"""Logging in vLLM's format; ``init_logger(__name__)`` gives a module its logger."""

import json
import logging
import logging.config
import sys
from typing import Any

import vllm.envs as envs
from vllm.errors import ConfigError

_FORMAT = "%(levelname)s %(asctime)s [%(name)s:%(lineno)d] %(message)s"
_DATE_FORMAT = "%m-%d %H:%M:%S"
_root = logging.getLogger("vllm")
_seen: set[tuple[str, str]] = set()
_configured_by: list[str] = []


def read_logging_config(path: str) -> dict[str, Any]:
    """The JSON file ``path``, for ``logging.config.dictConfig``.

    Raises:
        ConfigError: it cannot be read, or is no JSON object.
    """
    name = "VLLM_LOGGING_CONFIG_PATH (--log-config-file)"
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {path}: {error}", parameter="log_config_file") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{name}: {path} holds no JSON object", parameter="log_config_file")
    return {"version": 1, "disable_existing_loggers": False, **config}


def _configure_from_file(path: str) -> None:
    if path in _configured_by:
        return
    config = read_logging_config(path)
    try:
        logging.config.dictConfig(config)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        cause = error.__cause__ or error
        raise ConfigError(
            f"VLLM_LOGGING_CONFIG_PATH (--log-config-file): {path}: {error} ({cause})",
            parameter="log_config_file",
        ) from error
    _configured_by[:] = [path]


def _configure_root() -> None:
    if not envs.VLLM_CONFIGURE_LOGGING:
        return
    if envs.VLLM_LOGGING_CONFIG_PATH:
        _configure_from_file(envs.VLLM_LOGGING_CONFIG_PATH)
        return
    if _root.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    # The prefix is text, not a format.
    prefix = envs.VLLM_LOGGING_PREFIX.replace("%", "%%")
    handler.setFormatter(logging.Formatter(prefix + _FORMAT, _DATE_FORMAT))
    _root.addHandler(handler)
    _root.setLevel(envs.VLLM_LOGGING_LEVEL)
    _root.propagate = False


def init_logger(name: str) -> logging.Logger:
    """The logger of module ``name``, below the ``vllm`` logger."""
    _configure_root()
    return logging.getLogger(name)


def set_level(level: str) -> None:
    """Log from ``level`` on, in this process and in those that it starts.

    Args:
        level: "DEBUG", "INFO", "WARNING", "ERROR" or "CRITICAL".
    """
    envs.export("VLLM_LOGGING_LEVEL", level)
    _configure_root()
    _root.setLevel(level)


def use_config_file(path: str) -> None:
    """Log as the JSON file ``path`` says, in this process and in those that it starts.

    Raises:
        ConfigError: the file cannot be read or applied, or logging is not ours to configure.
    """
    if not envs.VLLM_CONFIGURE_LOGGING:
        raise ConfigError(
            "--log-config-file needs VLLM_CONFIGURE_LOGGING=1", parameter="log_config_file"
        )
    envs.export("VLLM_LOGGING_CONFIG_PATH", path)
    _root.handlers.clear()
    _configure_root()


def log_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log ``message`` the first time it comes up in this process."""
    if (logger.name, message) not in _seen:
        _seen.add((logger.name, message))
        logger.log(level, message)
