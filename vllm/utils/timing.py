"""A start-up line per phase with its time."""

import contextlib
import logging
import time
from collections.abc import Iterator

__all__ = ["phase"]


@contextlib.contextmanager
def phase(logger: logging.Logger, name: str) -> Iterator[None]:
    """Log ``name`` with the seconds that the body took; nothing where the body raises.

    >>> with phase(logger, "Loading weights"):
    ...     load()
    INFO 11-22 12:00:00 [loader.py:10] Loading weights: 0.84 s
    """
    start = time.perf_counter()
    yield
    logger.info("%s: %.2f s", name, time.perf_counter() - start, stacklevel=3)
