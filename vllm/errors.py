"""Every exception that this package raises on purpose.

    Exception
    ├── ValueError
    │   └── VLLMValidationError      a value that the user gave and can correct
    │       ├── ConfigError          ... of an option, flag or environment variable
    │       └── UnsupportedError     ... that vLLM knows and this engine does not have yet
    └── RuntimeError
        └── VLLMError
            ├── CapacityError        there is less memory (or fewer blocks) than asked for
            ├── QueueFullError       the waiting queue is at --max-num-queued-reqs
            ├── EngineDeadError      the engine process is gone; nothing more can be served
            ├── EngineGenerateError  one request failed inside the engine; the engine lives
            ├── WorkerError          a worker process has failed or died, and the engine with it
            └── KVTransferError      a KV transfer failed or was refused

Broken invariants are ``assert``; they are our bugs, never the user's.
This module imports nothing, so every layer may use it.
"""

__all__ = [
    "CapacityError",
    "ConfigError",
    "EngineDeadError",
    "EngineGenerateError",
    "KVTransferError",
    "QueueFullError",
    "UnsupportedError",
    "VLLMError",
    "VLLMValidationError",
    "WorkerError",
]


class VLLMValidationError(ValueError):
    """A value given by the user is wrong; ``parameter`` names the option or field.

    Args:
        message: one line saying what is wrong and what would work.
        parameter: name of the request field, flag or variable, if one is at fault.
        value: the offending value, if it can be shown.
    """

    def __init__(
        self, message: str, *, parameter: str | None = None, value: object | None = None
    ) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = value


class ConfigError(VLLMValidationError):
    """An option, flag or environment variable has a value that cannot work."""


class UnsupportedError(VLLMValidationError):
    """vLLM has this option, field or feature; this engine does not have it yet."""


class VLLMError(RuntimeError):
    """Base of the errors that no change of a single value by the user would have avoided."""


class CapacityError(VLLMError):
    """Less memory, or fewer cache blocks, than were asked for; the message says what fits."""


class QueueFullError(VLLMError):
    """The waiting queue holds ``--max-num-queued-reqs`` requests already."""


class EngineDeadError(VLLMError):
    """The engine process has ended; no request can be served any more."""


class EngineGenerateError(VLLMError):
    """One request failed inside the engine; others go on."""


class WorkerError(VLLMError):
    """A worker process has failed or died; its engine cannot go on without it."""


class KVTransferError(VLLMError):
    """A KV-cache transfer failed, or was refused by a comparison of descriptors."""
