"""Custom logits processors: interface, loading, and bookkeeping of batch changes."""

from vllm.v1.sample.logits_processor.interface import (
    AddedRequest,
    BatchUpdate,
    LogitsProcessor,
    MoveDirectionality,
    MovedRequest,
    RemovedRequest,
)
from vllm.v1.sample.logits_processor.state import (
    ENTRY_POINT_GROUP,
    BatchUpdateBuilder,
    LogitsProcessors,
    NullBatchUpdateBuilder,
    load_logits_processors,
)

__all__ = [
    "ENTRY_POINT_GROUP",
    "AddedRequest",
    "BatchUpdate",
    "BatchUpdateBuilder",
    "LogitsProcessor",
    "LogitsProcessors",
    "MoveDirectionality",
    "MovedRequest",
    "NullBatchUpdateBuilder",
    "RemovedRequest",
    "load_logits_processors",
]
