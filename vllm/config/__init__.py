"""Configuration dataclasses: frozen, keyword-only, resolved once by ``EngineArgs``."""

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
from vllm.config.vllm import VllmConfig, get_current_vllm_config, set_current_vllm_config

__all__ = [
    "AttentionConfig",
    "CacheConfig",
    "DeviceConfig",
    "KVEventsConfig",
    "KVTransferConfig",
    "LoadConfig",
    "ModelConfig",
    "ObservabilityConfig",
    "ParallelConfig",
    "SchedulerConfig",
    "StructuredOutputsConfig",
    "VllmConfig",
    "get_current_vllm_config",
    "set_current_vllm_config",
]
