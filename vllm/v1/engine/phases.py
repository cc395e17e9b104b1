"""Start-up, phase by phase: how long each took, one log line per phase."""

import contextlib
import logging
import time
from collections.abc import Iterator

__all__ = ["StartupPhases"]


class StartupPhases:
    """Times of phases in seconds, in the order in which they ended."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._begin = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block and log it; a phase that fails is not logged."""
        begin = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - begin
        # The caller of ``with``: past this generator and contextlib.
        self._logger.info("Start-up: %s took %.2f s", name, self.seconds[name], stacklevel=3)

    def total(self) -> float:
        return time.monotonic() - self._begin
