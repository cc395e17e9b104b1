"""What a configured connector asks of the cache's layout, before any connector is built.

Owns the names of the connectors that move blocks by the cache's descriptors, in whatever layout.
A connector from outside states a layout through ``get_required_kvcache_layout``, or gets LBHNC.
Imports no torch; a connector's class is only loaded where it comes from outside.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vllm.errors import ConfigError
from vllm.utils.flags import nearest
from vllm.v1.kv_cache.resolver import CacheMovement
from vllm.v1.kv_cache_layout import KVCacheLayout

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["DESCRIPTOR_CONNECTORS", "cache_movement", "movement_of"]

DESCRIPTOR_CONNECTORS = (
    "MooncakeConnector",
    "MooncakeStoreConnector",
    "NixlConnector",
    "NixlPushConnector",
    "OffloadingConnector",
    "SimpleCPUOffloadConnector",
)
"""They copy byte runs of descriptors and never look at a tensor's shape."""
OUTSIDE_CONNECTORS = ("FlexKVConnectorV1", "LMCacheConnectorV1", "LMCacheMPConnector")
"""Packages of their own, which read a layer's tensor."""


def movement_of(connector: str) -> CacheMovement:
    """The movement of a connector known by name; "Nixl" is short for NixlConnector.

    Raises:
        ConfigError: the name is unknown.
    """
    known = {name.lower(): name for name in (*DESCRIPTOR_CONNECTORS, *OUTSIDE_CONNECTORS)}
    for suffix in ("", "connector", "connectorv1"):
        name = known.get(connector.lower() + suffix)
        if name in DESCRIPTOR_CONNECTORS:
            return CacheMovement(connector=name, takes_descriptors=True)
        if name is not None:
            return CacheMovement(connector=name, layout=KVCacheLayout.LBHNC)
    names = sorted(known.values())
    guess = nearest(connector, names)
    hint = f"did you mean {guess}?" if guess else f"known: {', '.join(names)}"
    raise ConfigError(
        f"connector {connector!r} is unknown; {hint}", parameter="kv_connector", value=connector
    )


def cache_movement(vllm_config: VllmConfig) -> CacheMovement | None:
    """What moves blocks of this engine, None where nothing does.

    Raises:
        ConfigError: the connector is unknown, or its module has no such class.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return None
    name = transfer.kv_connector
    if transfer.kv_connector_module_path is None:
        return movement_of(name)
    module = import_module(transfer.kv_connector_module_path)
    connector = getattr(module, name, None)
    if connector is None:
        raise ConfigError(
            f"kv_connector_module_path {transfer.kv_connector_module_path} has no class {name}",
            parameter="kv_connector_module_path",
            value=transfer.kv_connector_module_path,
        )
    stated = connector.get_required_kvcache_layout(vllm_config)
    layout = KVCacheLayout.LBHNC if stated is None else KVCacheLayout.from_str(stated)
    return CacheMovement(connector=name, layout=layout)
