"""The small configs: loading, device, attention, structured outputs, observability, KV events."""

from dataclasses import dataclass, field
from typing import Any

from vllm.config.checks import at_least, one_of


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """How weights are read."""

    load_format: str = "auto"
    """"auto", "safetensors", "gguf" or "dummy" (or a name registered by a plug-in)."""
    download_dir: str | None = None
    """Where hub downloads are kept; None for the hub's own cache."""
    use_tqdm_on_load: bool = True
    model_loader_extra_config: dict[str, Any] = field(default_factory=dict)
    """The loader's own settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """What the model runs on."""

    device_type: str = "cpu"
    """"cpu" or "cuda", or what a platform plug-in names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """Which attention backend computes."""

    backend: str | None = None
    """--attention-backend: a name of the backend registry, or None to choose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsConfig:
    """How constrained output is made."""

    backend: str = "xgrammar"
    reasoning_parser: str = ""
    """Name of a reasoning parser; empty for none."""
    disable_any_whitespace: bool = False
    """Allow no white space between the tokens of JSON."""

    def __post_init__(self) -> None:
        one_of(self, ("xgrammar",), "backend")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservabilityConfig:
    """What is told about the engine's work."""

    disable_log_stats: bool = False
    """No periodic line of throughput, and no engine metrics."""
    show_hidden_metrics_for_version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEventsConfig:
    """``--kv-events-config``: publication of stored and removed blocks."""

    enable_kv_cache_events: bool = False
    publisher: str = "null"
    """"null" or "zmq"."""
    endpoint: str = "tcp://127.0.0.1:5557"
    replay_endpoint: str | None = None
    """Where missed batches can be asked for; None for nowhere."""
    buffer_steps: int = 10_000
    """Batches kept for replay."""
    hwm: int = 100_000
    """ZMQ's high-water mark: batches queued for a slow subscriber."""
    max_queue_size: int = 100_000
    """Batches waiting to be published."""
    topic: str = ""

    def __post_init__(self) -> None:
        one_of(self, ("null", "zmq"), "publisher")
        at_least(self, 0, "buffer_steps", "hwm")
        at_least(self, 1, "max_queue_size")
