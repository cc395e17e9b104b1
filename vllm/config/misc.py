"""The small configs: loading, device, attention, structured outputs, observability."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    load_format: str = "auto"
    """"auto", "safetensors", "gguf" or "dummy" (or a name registered by a plug-in)."""
    download_dir: str | None = None
    use_tqdm_on_load: bool = True
    model_loader_extra_config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    device_type: str = "cpu"
    """"cpu" or "cuda"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    backend: str | None = None
    """--attention-backend: a name of the backend registry, or None to choose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsConfig:
    backend: str = "xgrammar"
    reasoning_parser: str = ""
    disable_any_whitespace: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservabilityConfig:
    disable_log_stats: bool = False
    show_hidden_metrics_for_version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEventsConfig:
    enable_kv_cache_events: bool = False
    publisher: str = "null"
    endpoint: str = "tcp://127.0.0.1:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""
