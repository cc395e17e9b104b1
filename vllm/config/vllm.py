"""The one object that every part of the engine is configured from."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm.config.cache import CacheConfig
from vllm.config.kv_transfer import KVTransferConfig
from vllm.config.misc import (
    AttentionConfig,
    DeviceConfig,
    KVEventsConfig,
    LoadConfig,
    ObservabilityConfig,
    StructuredOutputsConfig,
)
from vllm.config.model import ModelConfig
from vllm.config.parallel import ParallelConfig
from vllm.config.scheduler import SchedulerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmConfig:
    """All settings, resolved and checked. Frozen: what planning finds out lives elsewhere."""

    model_config: ModelConfig
    scheduler_config: SchedulerConfig
    cache_config: CacheConfig = field(default_factory=CacheConfig)
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    load_config: LoadConfig = field(default_factory=LoadConfig)
    device_config: DeviceConfig = field(default_factory=DeviceConfig)
    attention_config: AttentionConfig = field(default_factory=AttentionConfig)
    structured_outputs_config: StructuredOutputsConfig = field(
        default_factory=StructuredOutputsConfig
    )
    observability_config: ObservabilityConfig = field(default_factory=ObservabilityConfig)
    kv_transfer_config: KVTransferConfig | None = None
    kv_events_config: KVEventsConfig | None = None
    additional_config: dict[str, Any] = field(default_factory=dict)
    instance_id: str = ""
    """Names the engine to all its processes."""


_current = threading.local()


@contextlib.contextmanager
def set_current_vllm_config(vllm_config: VllmConfig) -> Iterator[None]:
    """Make ``vllm_config`` what ``get_current_vllm_config`` answers while a model is built."""
    previous = getattr(_current, "config", None)
    _current.config = vllm_config
    try:
        yield
    finally:
        _current.config = previous


def get_current_vllm_config() -> VllmConfig:
    """The config that the model under construction belongs to.

    Raises:
        RuntimeError: called outside ``set_current_vllm_config``.
    """
    config = getattr(_current, "config", None)
    if config is None:
        raise RuntimeError("no current VllmConfig: build layers inside set_current_vllm_config()")
    return config
