"""Logging in vLLM's format; ``init_logger(__name__)`` gives a module its logger."""

import logging
import sys

import vllm.envs as envs

_FORMAT = "%(levelname)s %(asctime)s [%(name)s:%(lineno)d] %(message)s"
_DATE_FORMAT = "%m-%d %H:%M:%S"
_root = logging.getLogger("vllm")
_seen: set[tuple[str, str]] = set()


def _configure_root() -> None:
    if _root.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT, _DATE_FORMAT))
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


def log_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log ``message`` the first time it comes up in this process."""
    if (logger.name, message) not in _seen:
        _seen.add((logger.name, message))
        logger.log(level, message)
