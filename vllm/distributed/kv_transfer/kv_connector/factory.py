"""Finds and makes connectors by name: registered dotted paths, or a class of an outside module.

Imports a connector's module only when that connector is asked for.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    supports_hma,
)
from vllm.errors import ConfigError
from vllm.logger import init_logger
from vllm.utils.flags import nearest

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["KVConnectorFactory"]

logger = init_logger(__name__)

_V1 = "vllm.distributed.kv_transfer.kv_connector.v1"

# Connectors of vLLM that are not here -> what to use.
_ELSEWHERE = {
    "LMCacheConnectorV1": "offload with OffloadingConnector, or name LMCache's own class with "
    "kv_connector_module_path",
    "LMCacheMPConnector": "offload with OffloadingConnector",
    "MooncakeStoreConnector": "offload with OffloadingConnector, its file_path for files",
    "P2pNcclConnector": "use NixlConnector",
    "SharedStorageConnector": "it is called ExampleConnector now",
    "SimpleCPUOffloadConnector": "use OffloadingConnector",
}


class KVConnectorFactory:
    """The registry of connectors; plug-ins may add theirs with ``register_connector``."""

    _registry: dict[str, tuple[str, str]] = {
        "ExampleConnector": (f"{_V1}.example_connector", "ExampleConnector"),
        "MooncakeConnector": (f"{_V1}.mooncake.mooncake_connector", "MooncakeConnector"),
        "MultiConnector": (f"{_V1}.multi_connector", "MultiConnector"),
        "NixlConnector": (f"{_V1}.nixl.connector", "NixlConnector"),
        "NixlPushConnector": (f"{_V1}.nixl.connector", "NixlPushConnector"),
        "OffloadingConnector": (f"{_V1}.offloading_connector", "OffloadingConnector"),
    }

    @classmethod
    def register_connector(cls, name: str, module_path: str, class_name: str) -> None:
        """Let ``--kv-transfer-config`` name a connector of another package.

        Raises:
            ConfigError: the name is taken.
        """
        if name in cls._registry:
            raise ConfigError(f"connector {name!r} is registered already", parameter="kv_connector")
        cls._registry[name] = (module_path, class_name)

    @classmethod
    def get_connector_class(cls, kv_transfer_config: KVTransferConfig) -> type[KVConnectorBase_V1]:
        """The class that the configuration names.

        Raises:
            ConfigError: there is none, or it is no connector.
        """
        name = kv_transfer_config.kv_connector
        assert name is not None, "no connector is configured"
        path = kv_transfer_config.kv_connector_module_path
        if path is None:
            return cls.get_connector_class_by_name(name)
        return _load(path, name, "kv_connector_module_path")

    @classmethod
    def get_connector_class_by_name(cls, name: str) -> type[KVConnectorBase_V1]:
        cls.check_name(name)
        module, class_name = cls._registry[name]
        return _load(module, class_name, "kv_connector")

    @classmethod
    def check_name(cls, name: str) -> None:
        """Raises ConfigError if no connector of this name is registered."""
        if name in cls._registry:
            return
        if name in _ELSEWHERE:
            hint = _ELSEWHERE[name]
        else:
            guess = nearest(name, cls._registry)
            known = f"did you mean {guess}?" if guess else f"known: {', '.join(cls._registry)}."
            hint = f"{known} A class of your own needs kv_connector_module_path"
        raise ConfigError(
            f"kv_connector {name!r} is unknown; {hint}", parameter="kv_connector", value=name
        )

    @classmethod
    def create_connector(
        cls,
        config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: KVCacheConfig | None = None,
    ) -> KVConnectorBase_V1:
        """One half of the configured connector.

        Raises:
            ConfigError: the class does not take (config, role, kv_cache_config), or the cache has
                several groups and the connector knows only one.
        """
        transfer = config.kv_transfer_config
        assert transfer is not None, "no connector is configured"
        connector_class = cls.get_connector_class(transfer)
        _check_signature(connector_class)
        groups = 0 if kv_cache_config is None else len(kv_cache_config.kv_cache_groups)
        if groups > 1 and not supports_hma(connector_class):
            raise ConfigError(
                f"{connector_class.__name__} does not support the {groups} cache groups of this "
                "model (SupportsHMA): set --disable-hybrid-kv-cache-manager if the model allows it",
                parameter="kv_connector",
                value=transfer.kv_connector,
            )
        logger.info("KV connector %s (%s)", connector_class.__name__, role.name.lower())
        return connector_class(config, role, kv_cache_config)


def _load(module_path: str, class_name: str, parameter: str) -> type[KVConnectorBase_V1]:
    try:
        module = import_module(module_path)
    except ImportError as error:
        raise ConfigError(
            f"{parameter}: {module_path} cannot be imported: {error}",
            parameter=parameter,
            value=module_path,
        ) from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, KVConnectorBase_V1)):
        raise ConfigError(
            f"{parameter}: {module_path} has no connector {class_name} (a subclass of "
            "KVConnectorBase_V1)",
            parameter=parameter,
            value=class_name,
        )
    return found


def _check_signature(connector_class: type[KVConnectorBase_V1]) -> None:
    try:
        inspect.signature(connector_class).bind(None, None, None)
    except TypeError:
        raise ConfigError(
            f"{connector_class.__name__} must take (vllm_config, role, kv_cache_config); its "
            f"signature is {inspect.signature(connector_class)}",
            parameter="kv_connector",
        ) from None
