"""``--kv-transfer-config``: which connector moves KV blocks, and its settings."""

import uuid
from dataclasses import dataclass, field
from typing import Any

from vllm.config.checks import at_least, one_of, within
from vllm.errors import ConfigError

KV_ROLES = ("kv_producer", "kv_consumer", "kv_both")
KV_LOAD_FAILURE_POLICIES = ("fail", "recompute")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVTransferConfig:
    """Connector, role and addresses of KV transfer; field names are those of vLLM's JSON.

    Raises:
        ConfigError: a field has a value that cannot work, or a connector has no role.
    """

    kv_connector: str | None = None
    """Name of a registered connector, or of a class in ``kv_connector_module_path``."""
    engine_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    """Names this engine to its peers."""
    kv_buffer_device: str | None = None
    """Device of the transfer buffer; None for the platform's."""
    kv_buffer_size: float = 1e9
    """Bytes of the transfer buffer."""
    kv_role: str | None = None
    """One of ``KV_ROLES``; needed with a connector."""
    kv_rank: int | None = None
    kv_parallel_size: int = 1
    kv_ip: str = "127.0.0.1"
    kv_port: int = 14579
    kv_connector_extra_config: dict[str, Any] = field(default_factory=dict)
    """The connector's own settings; it parses them once."""
    kv_connector_module_path: str | None = None
    """Module of a connector class that is not registered."""
    enable_permute_local_kv: bool = False
    """Take a peer's HND cache into a local NHD one."""
    kv_load_failure_policy: str = "fail"
    """"fail" ends a request whose blocks could not be loaded, "recompute" computes them."""

    def __post_init__(self) -> None:
        one_of(self, (None, *KV_ROLES), "kv_role")
        one_of(self, KV_LOAD_FAILURE_POLICIES, "kv_load_failure_policy")
        within(self, 0, 65535, "kv_port")
        at_least(self, 0, "kv_buffer_size", "kv_rank")
        at_least(self, 1, "kv_parallel_size")
        if self.kv_connector is not None and self.kv_role is None:
            raise ConfigError(
                f"kv_connector {self.kv_connector} needs a kv_role: {', '.join(KV_ROLES)}",
                parameter="kv_role",
            )

    @property
    def is_kv_transfer_instance(self) -> bool:
        """Whether blocks are moved at all."""
        return self.kv_connector is not None and self.kv_role in KV_ROLES

    @property
    def is_kv_producer(self) -> bool:
        """Whether this engine's blocks may be fetched."""
        return self.kv_connector is not None and self.kv_role in ("kv_producer", "kv_both")

    @property
    def is_kv_consumer(self) -> bool:
        """Whether this engine may fetch blocks."""
        return self.kv_connector is not None and self.kv_role in ("kv_consumer", "kv_both")

    def get_from_extra_config(self, key: str, default: Any) -> Any:
        """An entry of ``kv_connector_extra_config``, for connectors from outside."""
        return self.kv_connector_extra_config.get(key, default)
